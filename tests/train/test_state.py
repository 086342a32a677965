"""Tests of the state of a run: its tensors by name before the first step, on any device."""

from types import SimpleNamespace

import pytest
import tiny_dataset
import torch

from pi0fm.models.layers import Linear
from pi0fm.models.pi0 import Pi0
from pi0fm.train.state import StateConfig, TrainState


def network() -> Pi0:
    with torch.device("meta"):
        return Pi0(tiny_dataset.network())


def test_a_run_that_has_not_stepped_has_its_moments():
    """On the parameter's device, where a fused optimiser wants them."""
    model = network()
    held = TrainState(model, StateConfig(ema_decay=0.9)).tensors()
    names = [name for name, _ in model.named_parameters()]
    moments = [f"moments/{name}/{moment}" for name in names for moment in ("exp_avg", "exp_avg_sq")]
    weights = [f"{kind}/{name}" for kind in ("model", "average") for name in names]
    assert sorted(held) == sorted([*weights, *moments, "moments/step"])
    assert all(tensor.is_meta for tensor in held.values())


def test_one_count_is_every_parameters_count():
    state = TrainState(Pi0(tiny_dataset.network()), StateConfig())
    state.tensors()["moments/step"].fill_(7.0)
    assert {float(held["step"]) for held in state.optimizer.state.values()} == {7.0}


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("micro_steps", "device"), [(1, "cuda"), (2, "cuda"), (2, "cpu")])
def test_matrices_are_cast_once_where_several_micro_batches_make_a_step_on_a_gpu(micro_steps, device):
    """With one the cast is made once anyway, and its copy need not outlive the pass."""
    state = TrainState(Pi0(tiny_dataset.network()), StateConfig())
    accelerator = SimpleNamespace(gradient_accumulation_steps=micro_steps)
    there = torch.device(device)
    state.prepare(
        SimpleNamespace(accelerator=accelerator, device=there, prepare=lambda *given: given)
    )  # the part of a worker that is asked
    assert {module.cast_once for module in state.network.modules() if isinstance(module, Linear)} == {(micro_steps, device) == (2, "cuda")}
