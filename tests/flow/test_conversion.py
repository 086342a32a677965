import itertools

import pytest
import torch
from gaussian_mixture import GaussianMixture

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import PATHS, QUANTITIES
from pi0fm.flow.conversion import convert
from pi0fm.flow.path import VE, CondOT, Cosine, VPDiffusion, path_named
from pi0fm_client.errors import ConfigError

TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
def test_every_quantity_follows_from_every_other(name):
    path = path_named(name)
    generator = torch.Generator().manual_seed(1)
    x_0, x_1 = torch.randn(2, 19, 4, 3, generator=generator, dtype=torch.float64)
    x_t = path.sample(x_0, x_1, TIMES)
    truth = {
        "velocity": path.conditional_velocity(x_0, x_1, TIMES),
        "noise": x_0,
        "data": x_1,
        "score": -x_0 / path.sigma(TIMES)[:, None, None],
    }
    for given, wanted in itertools.product(QUANTITIES, repeat=2):
        found = convert(path, truth[given], x_t, TIMES, given, wanted)
        scale = truth[wanted].abs().max()
        torch.testing.assert_close(found / scale, truth[wanted] / scale, rtol=0, atol=1e-9, msg=f"{given} -> {wanted}")


def test_cond_ot_score_is_the_formula_of_the_page():
    generator = torch.Generator().manual_seed(2)
    x, u = torch.randn(2, 19, 2, generator=generator, dtype=torch.float64)
    t = TIMES[:, None]
    torch.testing.assert_close(convert(CondOT(), u, x, TIMES, "velocity", "score"), (t * u - x) / (1 - t))


@pytest.mark.parametrize("name", PATHS)
def test_the_marginal_score_of_a_mixture_follows_from_its_marginal_velocity(name):
    path = path_named(name)
    generator = torch.Generator().manual_seed(3)
    mixture = GaussianMixture(
        torch.tensor([[1.5, 0.0], [-1.0, 1.0]], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64), 0.4
    )
    x = torch.randn(19, 2, generator=generator, dtype=torch.float64)
    found = convert(path, mixture.velocity(path, x, TIMES), x, TIMES, "velocity", "score")
    torch.testing.assert_close(found, mixture.score(path, x, TIMES), rtol=1e-8, atol=1e-8)
    state = x.clone().requires_grad_(True)
    gradient = torch.autograd.grad(mixture.log_prob(path, state, TIMES).sum(), state)[0]
    torch.testing.assert_close(mixture.score(path, x, TIMES), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("path", "t", "given", "wanted", "rule"),
    [
        (CondOT(), 0.0, "noise", "velocity", "alpha is 0"),
        (Cosine(), 0.0, "score", "data", "alpha is 0"),
        (CondOT(), 1.0, "velocity", "score", "sigma is 0"),
        (Cosine(), 1.0, "data", "velocity", "sigma is 0"),
        (VPDiffusion(), 1.0, "noise", "score", "sigma is 0"),
        (VPDiffusion(), 1.0, "noise", "velocity", "no finite velocity"),
        (CondOT(), 1.5, "velocity", "data", r"\[0, 1\].*found values from 0.5 to 1.5"),
        (CondOT(), float("nan"), "velocity", "data", r"\[0, 1\]"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(path, t, given, wanted, rule):
    x = torch.ones(2, 3)
    with pytest.raises(FlowError, match=rule):
        convert(path, x, x, torch.tensor([0.5, t]), given, wanted)


@pytest.mark.parametrize("path", [CondOT(), Cosine(), VE()])
def test_velocity_and_data_determine_each_other_wherever_sigma_allows(path):
    x = torch.full((2, 3), 0.5)
    t = torch.tensor([0.0, 1.0])
    assert torch.isfinite(convert(path, x, x, t, "velocity", "data")).all()
    assert torch.isfinite(convert(path, x, x, t, "velocity", "noise")).all()


def test_states_that_are_not_finite_and_unknown_quantities_are_refused():
    x, t = torch.ones(2, 3), torch.full((2,), 0.5)
    broken = x.clone()
    broken[1, 2] = torch.inf
    with pytest.raises(FlowError, match="x_t must be finite, found 1 entries"):
        convert(CondOT(), x, broken, t, "velocity", "score")
    with pytest.raises(FlowError, match="velocity must be finite"):
        convert(CondOT(), broken, x, t, "velocity", "score")
    with pytest.raises(ConfigError, match=r"unknown quantity 'epsilon'.*data, noise, score, velocity"):
        convert(CondOT(), x, x, t, "epsilon", "score")
