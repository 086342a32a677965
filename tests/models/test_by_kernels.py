"""Tests that what a GPU computes by fewer launches is what the plain formulas give; here the same operations run on a CPU."""

from dataclasses import replace

import pytest
import torch
from small_pi0 import BOTH, network, observation, question

from pi0fm.flow.density import exact_divergence
from pi0fm.models import joint_decoder, layers
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.sampling.sampler import halve_matrices

variants = pytest.mark.parametrize("name", list(BOTH))


@pytest.fixture
def forced(monkeypatch):
    """Both streams are told that they run on a GPU. Not the vision tower: gelu within a product is another one on a CPU (not tanh's)."""

    def by_kernels(module: torch.nn.Module, x: torch.Tensor) -> bool:
        return not module.training and layers._writable(x)

    def force() -> None:
        for module in (joint_decoder, layers):
            monkeypatch.setattr(module, "by_kernels", by_kernels)

    return force


def observed(dtype: torch.dtype) -> ModelObservation:
    return replace(observation(), state=observation().state.to(dtype))


def velocities(model: Pi0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """At one time, at times of their own, for rows with two times, and of two chunks from one prefix; padding and a missing camera."""
    wide = model.action_out.weight.dtype
    seen, (x_t, t) = observed(wide), (each.to(wide) for each in question())
    seen.image_mask[1, 0] = False
    held = torch.arange(4) < torch.tensor([0, 1, 3])[:, None]
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        field, two = model.cached_velocity(seen), model.cached_velocity(seen, 2)
        found = [field.at(x_t, 0.3), field(x_t, t), field.at_rows(x_t, 0.3, held), two.at(torch.cat((x_t, -x_t), dim=1).view(6, 4, 5), 0.3)]
        return [*found, model.velocity(model.encode_prefix(seen), seen.state, x_t, t)]


@variants
def test_velocities_are_those_of_the_plain_formulas(name, forced):
    model = network(BOTH[name]).double()
    plain = velocities(model)
    forced()
    for found, expected in zip(velocities(model), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@variants
def test_bfloat16_rounds_no_more_than_the_plain_formulas(name, forced):
    """The distance from float32's velocities."""
    exact = torch.cat([each.flatten() for each in velocities(network(BOTH[name]))])
    model = network(BOTH[name]).requires_grad_(False)
    halve_matrices(model, torch.bfloat16)

    def away() -> float:
        found = torch.cat([each.flatten() for each in velocities(model, torch.bfloat16)])
        return float((found - exact).norm() / exact.norm())

    plain = away()
    forced()
    assert 0 < away() < 1.2 * plain < 0.05


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_velocity_is_equal_with_a_gradient_and_without(name, dtype, forced):
    """Bit by bit: a score changes no action."""
    forced()
    model, (x_t, _) = network(BOTH[name]).requires_grad_(False), question()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        field = model.cached_velocity(observation())
        without = field.at(x_t, 0.3)
        with torch.enable_grad():
            found = field.at(x_t.clone().requires_grad_(), 0.3)
    assert found.requires_grad and torch.equal(found, without)


@variants
def test_divergences_are_those_of_the_plain_formulas(name, forced):
    model, x_t = network(BOTH[name]).double().requires_grad_(False), question()[0].double()

    def divergence() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            field = model.cached_velocity(observed(torch.float64))
            return exact_divergence(lambda x: field.at(x, 0.3), x_t)

    plain = divergence()
    forced()
    for found, expected in zip(divergence(), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
