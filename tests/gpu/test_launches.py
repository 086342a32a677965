"""Tests that a call on a GPU without a graph launches few operations, counted on fake tensors in bfloat16."""

from dataclasses import replace

import device_cases
import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from launches import Launches

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.config import PRESETS
from pi0fm.models.observation import pixels
from pi0fm.policy.sampling.sampler import Sampler
from pi0fm.train.plan.flops import empty_network

DEPTH = 3
SIZES = {
    name: replace(PRESETS[name], vision=replace(PRESETS[name].vision, depth=DEPTH), decoder=replace(PRESETS[name].decoder, depth=DEPTH))
    for name in ("pi0", "pi05")
}
PER_LAYER = {"vision": 11, "prefix": 16, "state": 18, "step": 17}
"""Vision and prefix: two norms of two launches, two residual sums, four products, attention; gelu (in a product for vision) and its product
with the other half, rotation in three. State and step: the copy of keys and values into the cache; state: that of the prefix's too."""
REST = {"vision": 9, "prefix": 17, "state": 51, "step": 11}
"""Masks, positions, embeddings, final norms and heads, whatever the depth."""
pytestmark = [pytest.mark.usefixtures("shapes_unchecked"), pytest.mark.timeout(180)]


@pytest.fixture
def cuda(monkeypatch):
    with fake_cuda(monkeypatch) as looks:
        yield looks


def made(name: str) -> Sampler:
    with torch.device(CUDA):
        model = empty_network(SIZES[name])
    return Sampler(model, FlowMatching.from_config(FlowConfig(num_flow_steps=2)), CUDA, torch.bfloat16)


def counted(call) -> int:
    with Launches() as launches:
        call()
    return sum(launches.found.values())


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "masked"])
@pytest.mark.parametrize("name", list(SIZES))
def test_a_stage_launches_no_more_than_its_bound(cuda, name, whole):
    sampler, given = made(name), device_cases.make_batch(SIZES[name], size=1, cameras=2).to(CUDA)
    x_t = given.noise[:, 0]
    with torch.inference_mode(), sampler.precision():
        pictures = pixels(given.observation.images.flatten(0, 1))
        found = {"vision": counted(lambda: sampler.model.vision(pictures))}
        found["prefix"] = counted(lambda: sampler.model.encode_prefix(given.observation, whole)) - found["vision"]
        both = counted(lambda: sampler.cached_velocity(given.observation, whole=whole))
        found["state"] = both - found["vision"] - found["prefix"]
        velocity = sampler.cached_velocity(given.observation, whole=whole)
        velocity.at(x_t, 0.5)  # makes what is kept of a flow time
        found["step"] = counted(lambda: velocity.at(x_t, 0.5))
    bounds = {stage: PER_LAYER[stage] * DEPTH + rest for stage, rest in REST.items()}
    assert {stage: number for stage, number in found.items() if number > bounds[stage]} == {}


@pytest.mark.parametrize("name", list(SIZES))
def test_the_formulas_of_training_launch_more(cuda, name):
    """So the bounds hold something: the same step with the network in training mode."""
    sampler, given = made(name), device_cases.make_batch(SIZES[name], size=1, cameras=2).to(CUDA)
    sampler.model.train()
    with torch.inference_mode(), sampler.precision():
        velocity = sampler.cached_velocity(given.observation, whole=True)
        velocity.at(given.noise[:, 0], 0.5)
        assert counted(lambda: velocity.at(given.noise[:, 0], 0.5)) > 1.5 * (PER_LAYER["step"] * DEPTH + REST["step"])
