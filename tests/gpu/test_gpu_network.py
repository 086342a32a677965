"""Tests of velocity, loss and every gradient on the device against float64 on the host."""

import copy
from dataclasses import replace

import pytest
import torch
from device_cases import apart, configuration, gradient_apart, gradients, in_float64, make_batch, mean_loss, observe
from small_pi0 import network

from pi0fm.models.config import CHECKPOINTING

# Euclidean, relative: velocity, loss, the worst parameter's gradient; bfloat16 keeps 8 bits, float32 24,
# of which the quickest wave of the time embedding leaves 13
BOUNDS = {torch.float32: (1e-4, 1e-4, 1e-3), torch.bfloat16: (2e-2, 2e-2, 1e-1)}
SIZES = ("small", "wide")


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("name", ["pi0", "pi05"])
@pytest.mark.parametrize("size", SIZES)
def test_velocity_loss_and_gradients_are_those_of_float64(device, name, size):
    if size == "wide" and device.type == "cpu":
        pytest.skip("the widths of released weights take a minute on a CPU; the small network has every operation")
    config = configuration(name, size)
    reference, batch = network(config).train(), make_batch(config)
    exact = copy.deepcopy(reference).double()
    velocity, loss = mean_loss(exact, in_float64(batch))
    loss.backward()
    expected = gradients(exact)
    there = batch.to(device)
    for dtype, (velocity_bound, loss_bound, gradient_bound) in BOUNDS.items():
        model = copy.deepcopy(reference).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found, mean = mean_loss(model, there)
        mean.backward()
        assert found.dtype == torch.float32
        assert apart(found, velocity) < velocity_bound, dtype
        assert apart(mean, loss) < loss_bound, dtype
        worst = gradient_apart(gradients(model), expected)
        assert {key: value for key, value in worst.items() if value > gradient_bound} == {}, dtype


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_recomputed_activations_give_the_same_gradients(device, name):
    config = configuration(name, "small")
    batch, found = make_batch(config).to(device), []
    for how in CHECKPOINTING:
        model = network(config).to(device).train()
        model.checkpoint_activations(how)
        mean_loss(model, batch)[1].backward()
        found.append(gradients(model))
    for other in found[1:]:
        worst = gradient_apart(other, found[0])
        assert max(worst.values()) <= (0 if device.type == "cpu" else 1e-6), worst


def test_what_a_mask_hides_is_not_read(device):
    """Pictures of a missing camera and words behind the prompt's end may hold anything."""
    config = configuration("pi0", "small")
    model, seen = network(config).to(device), observe(config, 3, 2, missing=True, prompt=6)
    x_t, t = torch.randn(3, config.action_horizon, config.action_dim, generator=torch.Generator().manual_seed(4)), torch.full((3,), 0.3)
    other = replace(
        seen,
        images=torch.where(seen.image_mask[:, :, None, None, None], seen.images, 255 - seen.images),
        prompt_tokens=torch.where(seen.prompt_mask, seen.prompt_tokens, 5),
    )
    with torch.no_grad():
        first, second = (model(each.to(device), x_t.to(device), t.to(device)) for each in (seen, other))
    assert apart(second, first) < 1e-6
