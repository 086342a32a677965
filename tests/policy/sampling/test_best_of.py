"""Tests that several chunks from one prefix equal those of separate calls, and of the choice of one by each criterion."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import VelocitySpread
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.sampling.best_of import CRITERIA, BestOf, choose, medoid_distances
from pi0fm.policy.sampling.noise import candidate_seeds
from pi0fm.policy.sampling.scores import ScoreOptions
from pi0fm_client.errors import ConfigError

SEEDS, N = [11, 12], 3


def sampled(policy, observations, seeds):
    """Normalised chunks of one call each."""
    return torch.cat([policy._sampled(policy.chain.observe([one]), [seed])[0] for one, seed in zip(observations, seeds, strict=True)])


def changed(policy, **flow):
    return LocalPolicy(policy.model, replace(policy.flow, **flow), policy.chain, policy.metadata, policy.device, policy.dtype)


@pytest.mark.parametrize(
    ("solver", "dtype"), [("euler", torch.float32), ("euler", torch.bfloat16), ("rk4", torch.float32), ("ancestral", torch.float32)]
)
def test_chunks_that_share_a_prefix_are_those_of_separate_calls(small_policy, observations, solver, dtype):
    """Observations with a missing camera and prompts of two lengths: masks differ between the rows."""
    policy = changed(small_policy.in_memory(dtype), solver=solver)
    seeds = [each for seed in SEEDS for each in candidate_seeds(seed, N)]
    together, _ = policy._sampled(policy.chain.observe(observations[:2]), seeds)
    alone = sampled(policy, [one for one in observations[:2] for _ in range(N)], seeds)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_the_prefix_is_encoded_once(small_policy, observations):
    policy, calls = small_policy.in_memory(), []
    policy.model.vision.register_forward_hook(lambda *_: calls.append(1))
    policy.infer_best(observations[:1], BestOf(8))
    assert calls == [1]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_chosen_chunk_is_the_best_of_separate_calls(small_policy, observations, criterion):
    policy = small_policy.in_memory()
    exact = ScoreOptions(num_probes=0)
    found = policy.infer_best(observations[:2], BestOf(N, criterion, exact), SEEDS)
    for one, seed, chosen in zip(observations, SEEDS, found, strict=False):
        seeds = candidate_seeds(seed, N)
        each = [policy.infer_batch([one], [other], exact if criterion == "likelihood" else False)[0] for other in seeds]
        place = int(chosen.scores["candidate"])
        np.testing.assert_allclose(chosen.actions, each[place].actions, atol=1e-4)
        if criterion == "likelihood":
            likely = [chunk.scores["log_prob"] for chunk in each]
            assert chosen.scores["log_prob"] == pytest.approx(max(likely), abs=1e-3)
        elif criterion == "spread":
            assert chosen.scores["spread"] == pytest.approx(min(spreads(policy, one, seeds)), rel=1e-3)
        else:
            distances = medoid_distances(sampled(policy, [one] * N, seeds)[..., :3].numpy().reshape(N, -1))
            assert place == int(np.argmin(distances))
            assert chosen.scores["medoid_distance"] == pytest.approx(distances.min(), rel=1e-3)


def spreads(policy, one, seeds):
    return [policy.infer_best([one], BestOf(1), [seed])[0].scores["spread"] for seed in seeds]


def test_best_of_one_is_the_chunk_itself(small_policy, observations):
    policy = small_policy.in_memory()
    (best,) = policy.infer_best(observations[:1], BestOf(1), [5])
    np.testing.assert_array_equal(best.actions, policy.infer_batch(observations[:1], [5])[0].actions)
    assert (best.scores["candidate"], best.scores["medoid_distance"]) == (0, 0)
    assert best.scores["spread"] > 0
    assert policy.infer_best([]) == []


def test_seeds_of_candidates_are_fixed_and_apart():
    assert candidate_seeds(7, 3) == candidate_seeds(7, 8)[:3]
    many = [each for seed in range(50) for each in candidate_seeds(seed, 8)]
    assert len(set(many)) == 400 and all(0 <= each < 2**63 for each in many)
    assert candidate_seeds(7, 1) == [7]


def test_a_medoid_is_in_the_crowd():
    crowd = np.array([[0.0, 0.0], [0.1, 0.0], [-0.1, 0.0], [0.0, 5.0]], np.float32)
    distances = medoid_distances(crowd)
    assert distances.argmin() == 0 and distances.argmax() == 3
    assert distances[3] == pytest.approx(np.mean([np.sqrt(((crowd[3] - other) ** 2).mean()) for other in crowd[:3]]))
    rows = {"medoid_distance": np.array([3.0, 1, 2, 9, 8, 7]), "log_prob": np.array([3.0, 1, 2, 9, 8, 7])}
    assert choose(rows, BestOf(3)).tolist() == [1, 5]
    assert choose(rows, BestOf(3, "likelihood")).tolist() == [0, 3]


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_the_spread_is_the_deviation_of_the_velocity_over_its_evaluations(solver):
    flow, seen = FlowMatching.from_config(FlowConfig(solver=solver, num_flow_steps=5)), []

    def field(x, t):
        seen.append(1000.0 + torch.tanh(x.flip(1)) * (1 + t.reshape(-1, 1, 1)))
        return seen[-1]

    noise = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    mask = torch.tensor([True, False]).expand(3, 4, 2)
    watched = VelocitySpread(field)
    flow.sample(watched, noise, mask=mask)
    expected = torch.stack(seen)[..., 0].double().var(0, correction=0).mean(1).sqrt()
    torch.testing.assert_close(watched.deviation(mask).double(), expected, rtol=1e-4, atol=0)
    straight = VelocitySpread(lambda x, t: torch.full_like(x, 3.0))
    flow.sample(straight, noise)
    assert straight.deviation(mask).tolist() == [0, 0, 0]


def test_what_cannot_be_chosen_by_is_refused():
    with pytest.raises(ConfigError, match="num_chunks must be 1 or more, found 0"):
        BestOf(0)
    with pytest.raises(ConfigError, match="criterion must be medoid, likelihood, spread, found 'medoids': did you mean 'medoid'"):
        BestOf(2, "medoids")
