"""The CNF's loss and its gradient, against the library's density and against backpropagation through the solver."""

import pytest
import torch

from pi0fm.flow import likelihood
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.toy.cnf import negative_log_likelihood
from pi0fm.toy.network import PlaneField
from pi0fm_client.errors import ConfigError


def field():
    """Not as it begins, where the last layer is 0: with every weight drawn."""
    generator = torch.Generator().manual_seed(7)
    network = PlaneField(generator, width=12, layers=2).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return network


def data():
    return torch.randn(16, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def gradient(network, x, **options):
    network.zero_grad()
    negative_log_likelihood(network, x, **options).backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def test_the_loss_is_the_librarys_density():
    network, x = field(), data()
    flow = FlowMatching.from_config(FlowConfig(time_density="uniform"))
    options = likelihood.DensityOptions(solver="rk4", num_flow_steps=24)
    expected = -likelihood.log_prob(flow, network, x, options=options).mean()
    # The two rules of order 4 differ: ours is the classical one, torchdiffeq's the 3/8 rule.
    torch.testing.assert_close(negative_log_likelihood(network, x, "rk4", 24), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("solver", "order"), [("midpoint", 2), ("rk4", 4)])
def test_the_adjoints_gradient_converges_to_backpropagations_at_the_solvers_order(solver, order):
    network, x = field(), data()
    errors = []
    for steps in (6, 12):
        by_adjoint = gradient(network, x, solver=solver, num_steps=steps)
        by_backpropagation = gradient(network, x, solver=solver, num_steps=steps, adjoint=False)
        errors.append(float((by_adjoint - by_backpropagation).norm() / by_backpropagation.norm()))
    assert errors[1] < 1e-3
    # Twice the steps, 2^order times less; half of that leaves room for the terms of higher order.
    assert errors[1] < errors[0] / 2 ** (order - 1)


def test_bad_options_are_refused_by_name():
    with pytest.raises(ConfigError, match="unknown solver of the CNF 'rk5': did you mean 'rk4'"):
        negative_log_likelihood(field(), data(), "rk5")
    with pytest.raises(ConfigError, match="at least 1 step, found 0"):
        negative_log_likelihood(field(), data(), num_steps=0)
