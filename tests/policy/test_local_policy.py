"""Tests of batched inference: a chunk depends only on its observation and seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pi0fm.data.chain import Sample
from pi0fm.data.order.counter import draw
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.saved import bundle
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import Observation

SEEDS = [11, 12, 13, 14]


def test_a_chunk_does_not_depend_on_its_batch(small_policy, observations):
    policy = small_policy.in_memory()
    together = policy.infer_batch(observations, SEEDS)
    for chunk, observation, seed in zip(together, observations, SEEDS, strict=True):
        alone = policy.infer_batch([observation], [seed])[0].actions
        np.testing.assert_allclose(chunk.actions, alone, rtol=0, atol=1e-4)
    turned = policy.infer_batch(observations[::-1], SEEDS[::-1])[::-1]
    for chunk, other in zip(together, turned, strict=True):
        np.testing.assert_allclose(chunk.actions, other.actions, rtol=0, atol=1e-4)


def test_infer_takes_a_flat_map_as_a_client_does(small_policy, observations):
    policy, seen = small_policy.in_memory(), observations[0]
    flat = {policy.metadata["cameras"][name]: picture for name, picture in seen.images.items()}
    flat |= {policy.metadata["state_key"]: seen.state, "prompt": seen.prompt}
    assert np.array_equal(policy.infer(flat, 5).actions, policy.infer_batch([seen], [5])[0].actions)


def test_infer_refuses_an_observation_by_name(small_policy, observations, shapes_unchecked):
    with pytest.raises(ObservationError, match=r"infer takes a flat map of keys, found an Observation: type infer_batch"):
        small_policy.in_memory().infer(observations[0])


def test_seeds_fix_the_chunk_and_no_seed_draws_fresh_noise(small_policy, observations):
    policy = small_policy.in_memory()
    assert np.array_equal(policy.infer_batch(observations[:1], [5])[0].actions, policy.infer_batch(observations[:1], [5])[0].actions)
    assert not np.allclose(policy.infer_batch(observations[:1], [5])[0].actions, policy.infer_batch(observations[:1], [6])[0].actions)
    assert not np.allclose(policy.infer_batch(observations[:1])[0].actions, policy.infer_batch(observations[:1])[0].actions)


def test_a_chunk_is_euler_steps_from_the_seeds_noise(small_policy, observations):
    """Written out once more: padded dimensions held at 0, four Euler steps, the inverse chain."""
    policy, observation = small_policy.in_memory(), observations[0]
    inputs = policy.chain.observe([observation])
    real = torch.arange(5) < 3
    x = torch.from_numpy(draw(21, 0, 0, 0, (4, 5))[0])[None] * real
    with torch.no_grad():
        for step in range(4):
            x = x + 0.25 * policy.model(inputs, x, torch.tensor([step / 4])) * real
    expected = policy.chain.inverse(Sample(inputs.state.numpy(), x.numpy())).actions[0]
    np.testing.assert_allclose(policy.infer_batch([observation], [21])[0].actions, expected, atol=1e-4)


def test_actions_are_in_robot_units(small_policy, observations):
    """Dimension 0 is trained as a difference: an action that stays means the state's own value."""
    policy = small_policy.in_memory()
    moved = Observation(observations[0].images, observations[0].state.copy(), observations[0].prompt)
    chunk = policy.infer_batch([moved], [1])[0].actions
    state = policy.chain.observe([moved]).state.numpy()
    normal = policy.chain.forward(Sample(moved.state[None], chunk[None])).actions
    assert np.abs(normal[..., :3]).max() < 10
    assert state.shape == (1, 6)


def test_bfloat16_is_near_float32(small_policy, observations):
    exact = small_policy.in_memory().infer_batch(observations, SEEDS)
    rough = small_policy.in_memory(torch.bfloat16).infer_batch(observations, SEEDS)
    differences = [np.abs(a.actions - b.actions).max() for a, b in zip(exact, rough, strict=True)]
    spread = small_policy.stats.action.std.max()
    assert 0 < max(differences) < 0.1 * spread
    assert all(chunk.actions.dtype == np.float32 for chunk in rough)


def test_no_observation_no_chunk(small_policy):
    assert small_policy.in_memory().infer_batch([]) == []


@pytest.mark.parametrize(
    ("images", "state", "prompt", "words"),
    [
        (None, np.zeros(3, np.float32), "press", r"numbers \[4\]"),
        (None, np.zeros(1, np.float32), "press", r"numbers \[4\]"),
        (None, np.array([0, np.nan, 0, 0], np.float32), "press", "finite"),
        ({}, np.zeros(4, np.float32), "press", "must hold pictures"),
        ({"head": np.zeros((4, 4, 3), np.uint8)}, np.zeros(4, np.float32), "press", "head"),
        ({"base": np.zeros((4, 4), np.uint8)}, np.zeros(4, np.float32), "press", "uint8"),
        (None, np.zeros(4, np.float32), " ", "must say something"),
        (None, np.zeros(4, np.float32), "a" * 24, "must fit into 24 tokens, found 25"),
    ],
)
def test_wrong_observations(small_policy, observations, images, state, prompt, words):
    wrong = Observation(observations[0].images if images is None else images, state, prompt)
    with pytest.raises(ObservationError, match=words):
        small_policy.in_memory().infer_batch([observations[0], wrong])


def test_one_seed_for_each(small_policy, observations):
    with pytest.raises(ObservationError, match="expected 2, found 1"):
        small_policy.in_memory().infer_batch(observations[:2], [1])


def test_what_is_compiled_gives_no_scores(saved, observations):
    with pytest.raises(ConfigError, match="type --compile kernels, or off"):
        bundle.load(saved, device="cpu", compile="graph")
    compiled = bundle.load(saved, device="cpu", precision="float32", compile="kernels")
    with pytest.raises(ConfigError, match="scores need a policy that is not compiled"):
        compiled.infer_batch(observations[:1], [1], scores=True)


def test_another_solver_with_the_same_weights(small_policy, observations):
    policy = small_policy.in_memory()

    def sampled(num_flow_steps, solver):
        flow = replace(policy.flow, num_flow_steps=num_flow_steps, solver=solver)
        changed = LocalPolicy(policy.model, flow, policy.chain, policy.metadata, policy.device, policy.dtype)
        return changed.infer_batch(observations[:1], [3])[0].actions

    finer, finest = sampled(64, "euler"), sampled(128, "euler")
    coarse = policy.infer_batch(observations[:1], [3])[0].actions
    assert np.abs(finer - finest).max() < np.abs(coarse - finest).max()
    fourth_order = sampled(32, "rk4")
    assert np.abs(fourth_order - finest).max() < np.abs(coarse - finest).max()


def test_a_policy_takes_no_gradient(small_policy):
    policy = small_policy.in_memory()
    assert not any(parameter.requires_grad for parameter in policy.model.parameters())
    assert not policy.model.training
