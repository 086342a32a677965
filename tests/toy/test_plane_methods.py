"""Each method's loss is what it says; the loop spends its budget and no more."""

import math

import pytest
import torch

from pi0fm.flow.checks import FlowError
from pi0fm.flow.matching import FlowConfig
from pi0fm.toy import methods, quality
from pi0fm.toy.datasets import dataset_named
from pi0fm.toy.network import PlaneField
from pi0fm.toy.training import MARKS, Budget, rate, train
from pi0fm_client.errors import ConfigError


def small_step(method, **changes):
    return methods.Method(method.name, method.title, method.flow, changes.get("loss", method.loss), 64, method.learning_rate)


def nothing(spent, note):
    assert 0 < spent <= 1
    assert note


def test_diffusion_predicts_noise_on_the_vp_path_and_the_cnf_velocities():
    flow = methods.diffusion(FlowConfig(solver="rk4")).flow
    assert (type(flow.path).__name__, flow.prediction, flow.solver) == ("VPDiffusion", "noise", "rk4")
    assert methods.cnf(FlowConfig(solver="heun")).flow.solver == "heun"
    assert methods.flow_matching(FlowConfig(path="cosine", prediction="data")).flow.prediction == "data"


@pytest.mark.parametrize("path", ["cond_ot", "vp"])
def test_the_loss_of_a_network_that_answers_zero_is_the_mean_square_of_the_target(path):
    config = FlowConfig(path=path, prediction="noise" if path == "vp" else "velocity", time_density="uniform")
    network = PlaneField(torch.Generator().manual_seed(0))  # its last layer begins at 0
    x_1 = dataset_named("moons").sample(20000, torch.Generator().manual_seed(10))
    loss = methods.flow_matching(config).loss(network, x_1, torch.Generator().manual_seed(100))
    # Noise has mean square 1; x_1 - x_0 has that of the data more, since the two are independent.
    expected = 1.0 if path == "vp" else 1.0 + float(x_1.square().mean())
    assert float(loss.detach()) == pytest.approx(expected, abs=0.03)


@pytest.mark.usefixtures("shapes_unchecked")
def test_training_lowers_the_nll_and_is_a_function_of_the_seed():
    dataset = dataset_named("eight_gaussians")
    held_out = dataset.sample(200, torch.Generator().manual_seed(3))
    method = small_step(methods.flow_matching(FlowConfig(time_density="uniform")))

    def nll(network):
        return quality.held_out_nll(method.flow, network, held_out, 8)

    runs = [train(method, dataset, Budget(steps=120), seed, nll, nothing) for seed in (0, 0, 1)]
    curve = runs[0].curve
    assert [mark.steps for mark in curve] == sorted({math.ceil(120 * mark - 1e-9) for mark in MARKS})
    assert curve[-1].nll < curve[0].nll - 0.3
    assert [mark.nll for mark in curve] == [mark.nll for mark in runs[1].curve]
    assert curve[-1].nll != runs[2].curve[-1].nll


def test_seconds_are_spent_on_training_alone():
    method = small_step(methods.flow_matching(FlowConfig()))
    judged = []

    def slow(network):
        judged.append(network)
        return float(torch.ones(300, 300).matmul(torch.ones(300, 300)).mean())

    trained = train(method, dataset_named("moons"), Budget(seconds=0.05), 0, slow, nothing)
    assert trained.seconds >= 0.05
    assert len(judged) == len(trained.curve) <= len(MARKS)
    assert not any(parameter.requires_grad for parameter in trained.network.parameters())


def test_a_loss_that_leaves_the_numbers_is_said():
    method = small_step(methods.flow_matching(FlowConfig()), loss=lambda network, x, _: network(x, x[:, 0]).sum() * math.inf)
    with pytest.raises(FlowError, match=r"gradient must stay finite, found .* at step 1"):
        train(method, dataset_named("moons"), Budget(steps=2), 0, lambda _: 0.0, nothing)


def test_the_rate_warms_up_and_ends_at_zero():
    assert rate(0.0) > 0
    assert rate(0.02) == pytest.approx(1)
    assert rate(1.0) == pytest.approx(0, abs=1e-12)
    assert all(rate(a) > rate(a + 0.05) for a in (0.1, 0.3, 0.6, 0.9))


@pytest.mark.parametrize(
    ("budget", "rule"),
    [({}, "either"), ({"seconds": 1.0, "steps": 1}, "either"), ({"steps": 0}, "at least 1"), ({"seconds": -1.0}, "above 0")],
)
def test_a_budget_is_seconds_or_steps(budget, rule):
    with pytest.raises(ConfigError, match=rule):
        Budget(**budget)
