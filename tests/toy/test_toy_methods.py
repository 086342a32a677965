"""Tests of each method's divergence, loss and gradient against the formulas, and of the training loop's budget."""

import math
from dataclasses import replace

import pytest
import torch

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import DensityOptions, exact_divergence, log_prob
from pi0fm.flow.matching import FlowMatching
from pi0fm.toy import methods
from pi0fm.toy.comparison import held_out_nll
from pi0fm.toy.datasets import DATASETS
from pi0fm.toy.methods import PlaneField, negative_log_likelihood
from pi0fm.toy.training import MARKS, learning_rate_factor, train


def field(**sizes):
    """A network with every weight drawn; its last layer starts at 0 otherwise."""
    generator = torch.Generator().manual_seed(7)
    network = PlaneField(generator, **sizes).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return network


def points(count, seed=8):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_value_and_divergence_are_those_of_the_library_and_so_is_the_gradient():
    network, x = field(width=16), points(7).requires_grad_()
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    value, divergence = network.value_and_divergence(x, t)
    expected_value, expected = exact_divergence(lambda y: network(y, t), x.detach())
    torch.testing.assert_close(value, expected_value, rtol=0, atol=1e-13)
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-13)

    def trace(x, t):
        jacobian = torch.autograd.functional.jacobian(lambda y: network(y[None], t[None])[0], x, create_graph=True)
        return torch.trace(jacobian)

    inputs = [x, *(parameter for name, parameter in network.named_parameters() if name != "layers.3.bias")]
    found = torch.autograd.grad(divergence.sum(), inputs)
    direct = torch.autograd.grad(sum(trace(each, at) for each, at in zip(x, t, strict=True)), inputs)
    for a, b in zip(found, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_weights_are_a_function_of_the_generator_alone():
    torch.manual_seed(0)
    first = PlaneField(torch.Generator().manual_seed(5)).state_dict()
    torch.manual_seed(1)
    second = PlaneField(torch.Generator().manual_seed(5)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_cnfs_loss_is_the_librarys_density():
    network, x = field(width=12, layers=2), points(16)
    flow = FlowMatching.from_config(FlowConfig(time_density="uniform"))
    expected = -log_prob(flow, network, x, options=DensityOptions(solver="rk4", num_flow_steps=24)).mean()
    # The two rules of order 4 differ: ours is the classical one, torchdiffeq's the 3/8 rule.
    torch.testing.assert_close(negative_log_likelihood(network, x, "rk4", 24), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("solver", "order"), [("midpoint", 2), ("rk4", 4)])
def test_the_adjoints_gradient_converges_to_backpropagations_at_the_solvers_order(solver, order):
    network, x = field(width=12, layers=2), points(16)

    def gradient(steps, adjoint):
        found = torch.autograd.grad(negative_log_likelihood(network, x, solver, steps, adjoint=adjoint), list(network.parameters()))
        return torch.cat([each.flatten() for each in found])

    errors = [float((gradient(steps, True) - (exact := gradient(steps, False))).norm() / exact.norm()) for steps in (6, 12)]
    # Twice the steps, 2^order times less; half of that leaves room for the terms of higher order.
    assert 0 < errors[1] < min(1e-3, errors[0] / 2 ** (order - 1))


@pytest.mark.parametrize("make", [methods.flow_matching, methods.diffusion])
def test_the_loss_of_a_network_that_answers_zero_is_the_mean_square_of_the_target(make):
    network = PlaneField(torch.Generator().manual_seed(0))  # its last layer starts at 0
    x_1 = DATASETS["moons"].sample(20000, torch.Generator().manual_seed(10))
    loss = make(FlowConfig(time_density="uniform")).loss(network, x_1, torch.Generator().manual_seed(100))
    # Noise has mean square 1; x_1 - x_0 has that of the data more, since the two are independent.
    expected = 1.0 if make is methods.diffusion else 1.0 + float(x_1.square().mean())
    assert float(loss.detach()) == pytest.approx(expected, abs=0.03)


@pytest.mark.usefixtures("shapes_unchecked")
def test_training_lowers_the_nll_and_is_a_function_of_the_seed():
    dataset = DATASETS["eight_gaussians"]
    held_out = dataset.sample(64, torch.Generator().manual_seed(3))
    method = replace(methods.flow_matching(FlowConfig(time_density="uniform")), global_batch_size=64)
    curves = [train(method, dataset, seed, lambda net: held_out_nll(method.flow, net, held_out, 8), steps=60)[1] for seed in (0, 0, 1)]
    assert [mark.steps for mark in curves[0]] == sorted({math.ceil(60 * mark - 1e-9) for mark in MARKS})
    assert curves[0][-1].nll < curves[0][0].nll - 0.3
    assert [mark.nll for mark in curves[0]] == [mark.nll for mark in curves[1]]
    assert curves[0][-1].nll != curves[2][-1].nll


def test_seconds_are_spent_on_training_alone(monkeypatch):
    clock = 0.0
    method = replace(methods.flow_matching(FlowConfig()), global_batch_size=64)
    monkeypatch.setattr("time.process_time", lambda: clock)

    def loss(*arguments):
        nonlocal clock
        clock += 1.0
        return method.loss(*arguments)

    def judge(network):
        nonlocal clock
        clock += 100.0
        return 0.0

    network, curve = train(replace(method, loss=loss), DATASETS["moons"], 0, judge, seconds=8.0)
    assert [mark.steps for mark in curve] == [mark.seconds for mark in curve] == [1, 2, 3, 4, 6, 8]
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_gradient_that_is_not_finite_ends_the_training():
    method = replace(methods.flow_matching(FlowConfig()), loss=lambda network, x, _: network(x, x[:, 0]).sum() * math.inf)
    with pytest.raises(FlowError, match=r"flow matching: the gradient must stay finite, found .* at step 1; try"):
        train(method, DATASETS["moons"], 0, lambda _: 0.0, steps=2)


def test_the_rate_warms_up_and_ends_at_zero():
    assert 0 < learning_rate_factor(0.0) < 0.2
    assert learning_rate_factor(0.02) == pytest.approx(1)
    assert learning_rate_factor(1.0) == pytest.approx(0, abs=1e-12)
    assert all(learning_rate_factor(a) > learning_rate_factor(a + 0.05) for a in (0.1, 0.3, 0.6, 0.9))
