"""Tests of NLL and distance against closed forms, and of the figures computed from them."""

import math

import pytest
import torch
from gaussian_mixture import GaussianMixture

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.toy import comparison
from pi0fm.toy.comparison import DistanceAtEvaluations, fewest_evaluations, held_out_nll, quality_curve, seconds_to, sliced_wasserstein
from pi0fm.toy.training import NllAtMark

MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.5], [-1.0, -0.5]]), torch.tensor([0.5, 0.5]), 0.4)


def exact(flow, data=MIXTURE):
    """The network that answers the mixture's own field, or its own noise."""
    if flow.prediction == "velocity":
        return lambda x, t: data.velocity(flow.path, x, t)
    return lambda x, t: -flow.path.sigma(t)[:, None] * data.score(flow.path, x, t)


def held_out_and_noise():
    generator = torch.Generator().manual_seed(2)
    return MIXTURE.sample(1000, generator), torch.randn(1000, 2, generator=generator)


@pytest.mark.parametrize(
    ("path", "prediction"), [("cond_ot", "velocity"), ("cosine", "velocity"), ("vp", "noise"), ("vp", "velocity"), ("ve", "velocity")]
)
def test_the_nll_of_the_exact_field_is_the_mixtures(path, prediction):
    flow = FlowMatching.from_config(FlowConfig(path=path, prediction=prediction))
    x = MIXTURE.sample(300, torch.Generator().manual_seed(0))
    expected = -float(MIXTURE.log_prob(flow.path, x, torch.ones(len(x))).mean())
    # The start of VP and VE is an approximation of p_0, and their path ends a margin before the data.
    assert held_out_nll(flow, exact(flow), x, 40) == pytest.approx(expected, abs=2e-4 if path in ("cond_ot", "cosine") else 2e-2)


def test_the_distance_of_a_shift_is_its_length_over_root_two():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert sliced_wasserstein(x, x.flip(0)) == 0
    # The mean of cos^2 over evenly spread directions is 1/2.
    assert sliced_wasserstein(x, x + torch.tensor([0.3, 0.4], dtype=torch.float64)) == pytest.approx(0.5 / math.sqrt(2), rel=1e-9)


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_more_evaluations_bring_samples_of_the_exact_field_nearer(solver):
    flow = FlowMatching.from_config(FlowConfig(solver=solver))
    held_out, noise = held_out_and_noise()
    curve, samples = quality_curve(comparison.ode_samplers(flow, noise), exact(flow), held_out)
    counts = [point.evaluations for point in curve]
    assert solver == "dopri5" or counts == sorted(counts)  # a rejected step may make a looser tolerance dearer
    assert counts[0] >= {"euler": 2, "rk4": 4, "dopri5": 7}[solver]
    assert sliced_wasserstein(samples, held_out) == curve[-1].distance < 0.12
    if solver != "dopri5":
        assert curve[0].distance > curve[-1].distance


def test_ancestral_sampling_of_the_exact_noise_reaches_the_data(monkeypatch):
    monkeypatch.setattr(comparison, "ANCESTRAL_STEPS", (4, 60))
    flow = FlowMatching.from_config(FlowConfig(path="vp", prediction="noise"))
    held_out, noise = held_out_and_noise()
    curve, _ = quality_curve(comparison.ancestral_samplers(flow, noise, 0), exact(flow), held_out)
    assert [point.evaluations for point in curve] == [4, 60]
    assert curve[1].distance < min(0.12, curve[0].distance)


def test_a_path_that_is_singular_at_data_is_followed_in_small_steps_there(monkeypatch):
    flow = FlowMatching.from_config(FlowConfig(path="vp", prediction="noise"))
    sharp = GaussianMixture(MIXTURE.means, MIXTURE.weights, 0.01)
    x = sharp.sample(300, torch.Generator().manual_seed(0))
    expected = -float(sharp.log_prob(flow.path, x, torch.ones(len(x))).mean())
    fine = abs(held_out_nll(flow, exact(flow, sharp), x, 16) - expected)
    monkeypatch.setattr(comparison, "grid", lambda flow, num_steps: flow.grid(num_steps))
    assert fine < 0.5 < abs(held_out_nll(flow, exact(flow, sharp), x, 16) - expected)


def test_samples_that_are_not_finite_are_infinitely_far():
    held_out, noise = held_out_and_noise()
    assert quality_curve([lambda _: noise * math.nan], lambda x, t: x, held_out)[0] == ((0, math.inf),)


def test_the_fewest_evaluations_stay_within_the_distance():
    curve = (DistanceAtEvaluations(2, 0.1), DistanceAtEvaluations(4, 0.5), DistanceAtEvaluations(8, 0.2), DistanceAtEvaluations(16, 0.1))
    assert fewest_evaluations(curve, 0.2) == 8, "2 came close by luck"
    assert fewest_evaluations(curve, 0.05) is None


def test_seconds_to_an_nll_are_those_of_the_first_mark_there():
    curve = (NllAtMark(1.0, 10, 3.0), NllAtMark(2.0, 20, 2.0), NllAtMark(4.0, 40, 2.1))
    assert seconds_to(curve, 2.5) == 2.0
    assert seconds_to(curve, 1.9) is None
