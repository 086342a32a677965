"""Tests of matrices cast once per update: bitwise equal to autocast, with one copy instead of one per micro batch."""

import copy

import pytest
import torch
from small_pi0 import BOTH, LIKE_PI0, network, observation, question
from torch.utils._python_dispatch import TorchDispatchMode

from pi0fm.models.config import CHECKPOINTING
from pi0fm.models.layers import Linear


class Casts(TorchDispatchMode):
    """Counts the writes of bfloat16 tensors of one shape from float32 ones."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.count += found.dtype == torch.bfloat16 and found.shape == self.shape
        return found


def three_steps(name, how, cast_once, micro_batches=2):
    """Gradients and weights of three updates, and how often a matrix was cast."""
    model = network(BOTH[name]).train()
    model.checkpoint_activations(how)
    model.cast_once(cast_once)
    optimizer, (x_t, t) = torch.optim.AdamW(model.parameters(), lr=1e-2), question()
    gradients, counts = [], []
    for step in range(3):
        with Casts(model.decoder.layers[0].backbone.mlp.gate_up.weight.shape) as casts:
            for micro in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16):
                    velocity = model(observation(), x_t + step, t / (micro + 1))
                velocity.square().mean().backward()
        counts.append(casts.count)
        gradients.append({key: value.grad.clone() for key, value in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return gradients, model, counts


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("name", list(BOTH))
def test_the_numbers_are_autocast_s_and_the_casts_one_an_update(name, how):
    (expected, plain, many), (found, ours, few) = (three_steps(name, how, wanted) for wanted in (False, True))
    for one, other in zip(found, expected, strict=True):
        assert [key for key in other if not torch.equal(one[key], other[key])] == []
    assert [key for key, value in plain.state_dict().items() if not torch.equal(ours.state_dict()[key], value)] == []
    layers = LIKE_PI0.decoder.depth - 1  # of the last, the prefix has no such matrix
    assert few == [layers] * 3
    assert many == [layers * 2 * (2 if how == "full" else 1)] * 3


def test_weights_that_were_loaded_are_cast_anew_and_copies_are_not_copied():
    _, model, _ = three_steps("pi0", "none", True)
    seen, (x_t, t) = observation(), question()
    fresh = network(LIKE_PI0).train()
    model.load_state_dict(fresh.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(seen, x_t, t), fresh(seen, x_t, t))
    assert model.vision.projector._copy is not None
    assert all(module._copy is None for module in copy.deepcopy(model).modules() if isinstance(module, Linear))
    assert torch.equal(model.eval()(seen, x_t, t), fresh.eval()(seen, x_t, t)), "evaluation in float32 takes the weights themselves"
