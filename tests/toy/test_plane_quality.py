"""NLL and distance against closed forms."""

import math

import pytest
import torch

from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.flow.oracle import GaussianMixture
from pi0fm.toy import quality
from pi0fm.toy.comparison import seconds_to
from pi0fm.toy.quality import Quality
from pi0fm.toy.training import Mark


def mixture():
    return GaussianMixture(torch.tensor([[1.0, 0.5], [-1.0, -0.5]]), torch.tensor([0.5, 0.5]), 0.4)


@pytest.mark.parametrize(
    ("path", "prediction"), [("cond_ot", "velocity"), ("cosine", "velocity"), ("vp", "noise"), ("vp", "velocity"), ("ve", "velocity")]
)
def test_the_nll_of_the_exact_field_is_the_mixtures(path, prediction):
    flow = FlowMatching.from_config(FlowConfig(path=path, prediction=prediction))
    data = mixture()

    def network(x, t):
        return data.velocity(flow.path, x, t) if prediction == "velocity" else -flow.path.sigma(t)[:, None] * data.score(flow.path, x, t)

    x = data.sample(300, torch.Generator().manual_seed(0))
    expected = -float(data.log_prob(flow.path, x, torch.ones(len(x))).mean())
    # The start of VP and VE is an approximation of p_0, and their path ends a margin before the data.
    assert quality.held_out_nll(flow, network, x, 40) == pytest.approx(expected, abs=2e-4 if path in ("cond_ot", "cosine") else 2e-2)


def test_the_distance_of_a_shift_is_its_length_over_root_two():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert quality.sliced_wasserstein(x, x.flip(0)) == 0
    # The mean of cos^2 over evenly spread directions is 1/2.
    assert quality.sliced_wasserstein(x, x + torch.tensor([0.3, 0.4], dtype=torch.float64)) == pytest.approx(0.5 / math.sqrt(2), rel=1e-9)


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_more_evaluations_bring_samples_of_the_exact_field_nearer(solver):
    flow = FlowMatching.from_config(FlowConfig(solver=solver))
    data, generator = mixture(), torch.Generator().manual_seed(2)
    held_out, noise = data.sample(1000, generator), torch.randn(1000, 2, generator=generator)
    curve, _ = quality.ode_curve(flow, lambda x, t: data.velocity(flow.path, x, t), noise, held_out)
    counts = [point.evaluations for point in curve]
    assert solver == "dopri5" or counts == sorted(counts)  # a rejected step may make a looser tolerance dearer
    assert counts[0] >= {"euler": 2, "rk4": 4, "dopri5": 7}[solver]
    assert curve[-1].distance < 0.12
    if solver != "dopri5":
        assert curve[0].distance > curve[-1].distance


def test_ancestral_sampling_of_the_exact_noise_reaches_the_data(monkeypatch):
    monkeypatch.setattr(quality, "ANCESTRAL_STEPS", (4, 60))
    flow = FlowMatching.from_config(FlowConfig(path="vp", prediction="noise"))
    data, generator = mixture(), torch.Generator().manual_seed(3)
    held_out, noise = data.sample(1000, generator), torch.randn(1000, 2, generator=generator)
    curve, _ = quality.ancestral_curve(flow, lambda x, t: -flow.path.sigma(t)[:, None] * data.score(flow.path, x, t), noise, held_out, 0)
    assert [point.evaluations for point in curve] == [4, 60]
    assert curve[1].distance < min(0.12, curve[0].distance)


def test_the_fewest_evaluations_stay_within_the_distance():
    curve = (Quality(2, 0.1), Quality(4, 0.5), Quality(8, 0.2), Quality(16, 0.1))
    assert quality.fewest(curve, 0.2) == 8, "2 came close by luck"
    assert quality.fewest(curve, 0.05) is None
    assert quality.fewest((Quality(2, math.nan), Quality(4, 0.1)), 0.2) == 4


def test_seconds_to_an_nll_are_those_of_the_first_mark_there():
    curve = (Mark(1.0, 10, 3.0), Mark(2.0, 20, 2.0), Mark(4.0, 40, 2.1))
    assert seconds_to(curve, 2.5) == 2.0
    assert seconds_to(curve, 1.9) is None
