"""Tests of the log-density of a chunk given an observation, in robot units."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from smooth_network import smooth_in_time

from pi0fm.data.chain import Sample
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import DensityOptions, push_backward, push_forward
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import SAMPLERS
from pi0fm.policy.local import LocalPolicy, Scoring
from pi0fm.policy.sampling import noise
from pi0fm.policy.sampling.scores import ScoreOptions, conditioned, log_jacobian, sample_and_score
from pi0fm.policy.saved import bundle
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import Policy

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # test_local_policy and tests/flow check the same calls
SEEDS = [11, 12, 13, 14]
EXACT = ScoreOptions(num_probes=0)
SAMPLED = [*((solver, torch.float32) for solver in SAMPLERS if solver != "dopri5"), ("heun", torch.bfloat16)]


def changed(policy, **flow):
    return LocalPolicy(policy.model, replace(policy.flow, **flow), policy.chain, policy.metadata, policy.device, policy.dtype)


@pytest.fixture
def fine(small_policy):
    """The small policy, smooth in time, with a solver whose error is far below what is compared."""
    policy = small_policy.in_memory()
    smooth_in_time(policy.model)
    return changed(policy, solver="rk4", num_flow_steps=12)


def real(policy, batch):
    return policy.mask(batch)


@pytest.mark.parametrize(("solver", "dtype"), SAMPLED)
def test_scores_never_change_an_action(small_policy, observations, solver, dtype):
    policy = changed(small_policy.in_memory(dtype), solver=solver)
    without = policy.infer_batch(observations, SEEDS)
    scored = policy.infer_batch(observations, SEEDS, scores=True)
    assert policy.infer_batch(observations[:1], [SEEDS[0]], scores=True)[0].scores.keys() == {"log_prob", "noise_norm"}
    for one, other in zip(without, scored, strict=True):
        assert np.array_equal(one.actions, other.actions)
        assert one.scores.keys() == {"spread"}
        assert set(other.scores) == {"log_prob", "noise_norm"}
        assert all(math.isfinite(value) for value in other.scores.values())


def test_a_solver_that_chooses_its_steps_samples_without_looking_at_the_density():
    """On a smooth field: with the density in its state dopri5 would take other steps and end at another chunk."""
    flow = FlowMatching.from_config(FlowConfig(solver="dopri5", tolerance=1e-2))
    start, mask = noise.starting_noise(SEEDS, (4, 5)), torch.ones(4, 4, 5, dtype=torch.bool)

    def field(x, t):
        return 3 * torch.tanh(2 * x.flip(1)) * (1 + t.reshape(-1, 1, 1))

    with torch.no_grad():
        found = sample_and_score(flow, field, field, start, mask, EXACT, probes=None, increments=None)
        joint = push_forward(flow, field, start, mask)
    assert torch.equal(found.actions, flow.sample(field, start, mask=mask))
    assert not torch.equal(found.actions, joint.actions)


@pytest.mark.parametrize("options", [EXACT, ScoreOptions(2), ScoreOptions(0, 12, "heun"), ScoreOptions(0, float64=True)], ids=str)
def test_one_pass_is_sampling_and_then_scoring(fine, observations, options):
    """Backwards the solver makes another error than forwards: both far below the tolerance with these steps."""
    chunks = fine.infer_batch(observations, SEEDS, options)
    found = fine.log_prob(observations, [chunk.actions for chunk in chunks], SEEDS, options)
    np.testing.assert_allclose([chunk.scores["log_prob"] for chunk in chunks], found.log_prob, rtol=0, atol=2e-2)
    np.testing.assert_allclose([chunk.scores["noise_norm"] for chunk in chunks], found.noise_norm, rtol=0, atol=2e-3)
    assert found.log_prob.std() > 0.1


def test_noise_to_chunk_to_noise(fine, observations):
    start = noise.starting_noise(SEEDS, (4, 5)) * real(fine, 4)
    actions = np.stack([chunk.actions for chunk in fine.infer_batch(observations, SEEDS)])
    found = fine.log_prob(observations, actions, options=EXACT)
    np.testing.assert_allclose(found.noise_norm, start.flatten(1).norm(dim=1), rtol=0, atol=2e-3)


def test_the_cached_prefix_is_the_joint_pass(fine, observations):
    inputs = fine.chain.observe(observations)
    actions = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cached = push_backward(fine.flow, conditioned(fine.model, fine.model.encode_prefix(inputs), inputs.state), actions, real(fine, 4))
        joint = push_backward(fine.flow, lambda x, t: fine.model(inputs, x, t), actions, real(fine, 4))
    torch.testing.assert_close(cached.log_prob, joint.log_prob, rtol=0, atol=1e-3)
    torch.testing.assert_close(cached.noise, joint.noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "ancestral"])
def test_padded_dimensions_hold_anything(small_policy, observations, solver):
    policy = changed(small_policy.in_memory(), solver=solver)
    inputs, mask = policy.chain.observe(observations), real(policy, 4)
    start, steps, probes = noise.starting_noise(SEEDS, (4, 5)), noise.increments(SEEDS, 4, (4, 5)), noise.probes(SEEDS, 2, (4, 5))
    with torch.no_grad():
        velocity = conditioned(policy.model, policy.model.encode_prefix(inputs), inputs.state)

        def pushed():
            return sample_and_score(policy.flow, velocity, velocity, start, mask, ScoreOptions(2), probes=probes, increments=steps)

        first = pushed()
        for tensor in (start, steps, probes):
            tensor.masked_fill_(~mask, math.nan)
        second = pushed()
        given = torch.where(mask, first.actions, torch.full_like(first.actions, math.nan))
        back = [push_backward(policy.flow, velocity, actions, mask).log_prob for actions in (first.actions, given)]
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.log_prob, second.log_prob)
    assert torch.equal(first.noise_norm, second.noise_norm)
    assert torch.equal(*back)


def test_hutchinson_is_unbiased(small_policy, observations):
    policy, chunk = small_policy.in_memory(), small_policy.in_memory().infer_batch(observations[:1], [1])[0].actions
    exact = float(policy.log_prob(observations[:1], [chunk], options=EXACT).log_prob[0])
    estimates = policy.log_prob(observations[:1] * 300, [chunk] * 300, range(300)).log_prob
    error = estimates.std() / math.sqrt(300)
    assert error > 1e-3
    assert abs(estimates.mean() - exact) < 4 * error
    many = policy.log_prob(observations[:1] * 300, [chunk] * 300, range(300), ScoreOptions(4)).log_prob
    assert many.std() < 0.7 * estimates.std()


def test_a_score_is_a_function_of_observation_chunk_and_seed_alone(small_policy, observations):
    policy = small_policy.in_memory()
    actions = [chunk.actions for chunk in policy.infer_batch(observations, SEEDS)]
    together = policy.log_prob(observations, actions, SEEDS)
    for k in range(4):
        alone = policy.log_prob(observations[k : k + 1], actions[k : k + 1], SEEDS[k : k + 1])
        np.testing.assert_allclose(together.log_prob[k], alone.log_prob[0], atol=1e-3)
    assert not np.allclose(together.log_prob, policy.log_prob(observations, actions, [1, 2, 3, 4]).log_prob)


@pytest.mark.parametrize("solver", ["euler_maruyama", "ancestral"])
def test_a_stochastic_chunk_does_not_depend_on_its_batch(small_policy, observations, solver):
    policy = changed(small_policy.in_memory(), solver=solver, num_flow_steps=8)
    together = policy.infer_batch(observations, SEEDS)
    for chunk, observation, seed in zip(together, observations, SEEDS, strict=True):
        np.testing.assert_allclose(chunk.actions, policy.infer_batch([observation], [seed])[0].actions, rtol=0, atol=1e-3)
    assert not np.allclose(together[0].actions, policy.infer_batch(observations[:1], [99])[0].actions)
    assert not np.allclose(together[0].actions, changed(policy, solver="euler").infer_batch(observations[:1], [SEEDS[0]])[0].actions)


def test_a_policy_that_samples_with_noise_is_scored_by_heun(small_policy, observations):
    policy = changed(small_policy.in_memory(), solver="ancestral")
    actions = [chunk.actions for chunk in policy.infer_batch(observations, SEEDS)]
    found = policy.log_prob(observations, actions, options=EXACT).log_prob
    np.testing.assert_array_equal(found, policy.log_prob(observations, actions, options=ScoreOptions(0, solver="heun")).log_prob)
    assert not np.allclose(found, policy.log_prob(observations, actions, options=ScoreOptions(0, solver="euler")).log_prob)


def test_float64_is_near_float32(fine, observations):
    actions = [chunk.actions for chunk in fine.infer_batch(observations, SEEDS)]
    rough = fine.log_prob(observations, actions, options=EXACT)
    precise = fine.log_prob(observations, actions, options=ScoreOptions(0, float64=True))
    np.testing.assert_allclose(rough.log_prob, precise.log_prob, rtol=0, atol=2e-3)
    assert not np.array_equal(rough.log_prob, precise.log_prob)
    assert {parameter.dtype for parameter in fine.model.parameters()} == {torch.float32}


def test_the_jacobian_to_robot_units_is_that_of_the_chain(small_policy):
    """By the chain itself: each entry of a chunk moved by one unit."""
    policy = small_policy.in_memory()
    state, actions = np.ones((1, 4), np.float32), np.zeros((1, 4, 3), np.float32)

    def forward(chunk):
        return policy.chain.forward(Sample(state, chunk)).actions[0, :, :3].reshape(-1).astype(np.float64)

    columns = []
    for k in range(12):
        moved = actions.copy()
        moved.reshape(-1)[k] = 1
        columns.append(forward(moved) - forward(actions))
    expected = np.linalg.slogdet(np.stack(columns, axis=1))[1]
    assert log_jacobian(policy.chain, 4) == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1


def test_the_density_in_robot_units_adds_the_jacobian(small_policy, observations):
    found = small_policy.in_memory().log_prob(observations[:1], [np.zeros((4, 3), np.float32)], [1])
    assert found.robot_log_prob[0] == pytest.approx(found.log_prob[0] + found.log_jacobian)


def test_scoring_is_a_policy_with_scores(small_policy, observations):
    policy = small_policy.in_memory()
    scoring = Scoring(policy, ScoreOptions(3))
    assert isinstance(scoring, Policy)
    assert scoring.metadata is policy.metadata
    found = scoring.infer_batch(observations, SEEDS)
    assert [chunk.scores for chunk in found] == [chunk.scores for chunk in policy.infer_batch(observations, SEEDS, ScoreOptions(3))]


@pytest.mark.parametrize(
    ("actions", "rule"),
    [
        ([np.zeros((4, 3))] * 3, "for each of 4 observations, found 3"),
        ([np.zeros((4, 3))] * 3 + [np.zeros((3, 3))], r"shape \[4, 3\].*one of shape \[3, 3\]"),
        (np.zeros((4, 4, 5)), r"one of shape \[4, 5\]"),
        (np.full((4, 4, 3), np.nan), "must be finite"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(small_policy, observations, actions, rule):
    with pytest.raises(ObservationError, match=rule) as caught:
        small_policy.in_memory().log_prob(observations, actions)
    assert "\n" not in str(caught.value)


def test_no_observation_and_no_seed_for_it(small_policy, observations):
    policy = small_policy.in_memory()
    with pytest.raises(ObservationError, match="one observation or more"):
        policy.log_prob([], [])
    with pytest.raises(ObservationError, match="expected 1, found 2"):
        policy.log_prob(observations[:1], np.zeros((1, 4, 3)), [1, 2])


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"num_probes": -1}, "0 or more, found -1"),
        ({"num_flow_steps": 0}, "1 or more, found 0"),
        ({"solver": "ancestral"}, "solves no ODE"),
        ({"solver": "eulr"}, "did you mean 'euler'"),
    ],
)
def test_options_out_of_range(wrong, rule):
    with pytest.raises(ConfigError, match=rule):
        ScoreOptions(**wrong)


def test_random_numbers_of_a_seed_are_apart_and_its_own():
    start, steps, probes = noise.starting_noise([5, 6], (4, 5)), noise.increments([5, 6], 3, (4, 5)), noise.probes([5, 6], 3, (4, 5))
    assert (start.shape, steps.shape, probes.shape) == ((2, 4, 5), (3, 2, 4, 5), (3, 2, 4, 5))
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    everything = torch.cat([start[None], steps, probes]).flatten(2).flatten(0, 1)
    assert len({tuple(row) for row in everything.tolist()}) == len(everything)
    assert not torch.equal(torch.sign(steps), probes)
    torch.testing.assert_close(noise.increments([6], 3, (4, 5))[:, 0], steps[:, 1], rtol=0, atol=0)
    assert noise.increments([5], 0, (4, 5)) is None
    assert noise.probes([5], 0, (4, 5)) is None


def test_a_bundle_samples_with_noise_when_asked(saved, observations):
    noisy = bundle.load(saved, device="cpu", precision="float32", solver="euler_maruyama", noise_level=0.5, num_flow_steps=6)
    assert {name: noisy.metadata[name] for name in ("solver", "noise_level")} == {"solver": "euler_maruyama", "noise_level": 0.5}
    quiet = bundle.load(saved, device="cpu", precision="float32", solver="euler_maruyama", noise_level=0.0, num_flow_steps=6)
    assert not np.allclose(noisy.infer_batch(observations[:1], [1])[0].actions, quiet.infer_batch(observations[:1], [1])[0].actions)
    with pytest.raises(ConfigError, match="noise_level belongs to solver euler_maruyama"):
        bundle.load(saved, noise_level=0.5)


def test_density_options_pass_through():
    probes = torch.ones(1, 2, 3)
    found = vars(ScoreOptions(1, 7, "heun", True, 5).density(probes))
    assert found.pop("probes") is probes
    assert found == {name: value for name, value in vars(DensityOptions(probes, 7, "heun", None, 5, True)).items() if name != "probes"}
