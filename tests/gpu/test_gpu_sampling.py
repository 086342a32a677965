"""Tests of chunks and scores on the device against the host's, and of compiled, recorded and plain chunks."""

import copy

import numpy as np
import pytest
import torch
from device_cases import apart, configuration, observe
from small_pi0 import network
from smooth_network import smooth_in_time

from pi0fm.flow.config import SOLVERS, STOCHASTIC_SOLVERS, FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import num_increments
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.sampling import noise
from pi0fm.policy.sampling.sampler import Sampler

CPU = torch.device("cpu")
SEEDS = [11, 12, 13, 14]


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("name", ["pi0", "pi05"])
@pytest.mark.parametrize("solver", [*SOLVERS, *STOCHASTIC_SOLVERS])
def test_every_solver_gives_the_host_s_chunk(device, name, solver):
    """With a missing camera and prompts of three lengths."""
    config = configuration(name, "small")
    change = {"path": "vp"} if solver == "ancestral" else {"tolerance": 1e-3} if solver == "dopri5" else {}
    flow = FlowMatching.from_config(FlowConfig(solver=solver, num_flow_steps=4, **change))
    seen, shape = observe(config, 3, 2, missing=True), (config.action_horizon, config.action_dim)
    start, increments = noise.starting_noise(SEEDS[:3], shape), noise.increments(SEEDS[:3], num_increments(flow), shape)
    mask = torch.ones_like(start, dtype=torch.bool)
    mask[..., -1] = False
    model = network(config)
    smooth_in_time(model)
    here, there = (Sampler(copy.deepcopy(model), flow, where, torch.float32)(seen, start, mask, increments) for where in (CPU, device))
    assert apart(there, here) < (5e-4 if solver == "dopri5" else 2e-5)
    assert (there[..., -1] == 0).all()


def made(small_policy, device: torch.device) -> LocalPolicy:
    config = small_policy.config
    model = Pi0(config.model)
    model.load_state_dict(small_policy.weights)
    return LocalPolicy(model, FlowMatching.from_config(config.flow), config.chain(small_policy.stats), {}, device, torch.float32)


def test_a_policy_and_its_scores_are_the_host_s(device, small_policy, observations):
    here, there = made(small_policy, CPU), made(small_policy, device)
    for scores in (False, True):
        for ours, theirs in zip(there.infer_batch(observations, SEEDS, scores), here.infer_batch(observations, SEEDS, scores), strict=True):
            np.testing.assert_allclose(ours.actions, theirs.actions, rtol=0, atol=2e-4)
            for score, value in theirs.scores.items():
                assert ours.scores[score] == pytest.approx(value, rel=1e-3)
    chunks = np.stack([chunk.actions for chunk in here.infer_batch(observations, SEEDS)])
    given = [policy.log_prob(observations, chunks, SEEDS).log_prob for policy in (there, here)]
    np.testing.assert_allclose(*given, rtol=1e-3)


def test_a_chunk_does_not_depend_on_its_batch(device, small_policy, observations):
    policy = made(small_policy, device)
    together = policy.infer_batch(observations, SEEDS)
    for chunk, observation, seed in zip(together, observations, SEEDS, strict=True):
        np.testing.assert_allclose(chunk.actions, policy.infer_batch([observation], [seed])[0].actions, rtol=0, atol=1e-4)
