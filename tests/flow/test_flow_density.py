import math

import pytest
import torch
from gaussian_mixture import rademacher_probes

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import (
    DensityOptions,
    exact_divergence,
    gaussian_log_prob,
    hutchinson_divergence,
    log_prob,
    push_backward,
    push_forward,
)
from pi0fm.flow.matching import FlowMatching

FLOW = FlowMatching.from_config(FlowConfig(solver="rk4", num_flow_steps=8))


class Network(torch.nn.Module):
    """A small smooth field that mixes all entries of a chunk."""

    def __init__(self, width, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = torch.nn.Linear(width + 1, 32), torch.nn.Linear(32, width)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(torch.cat([x.flatten(1), t[:, None]], 1)))).reshape(x.shape)


def chunks(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_chunk_s_density_is_the_jacobian_determinant_of_the_discretised_flow():
    """[16, 4]: brute force differentiates the whole sampler, one chunk of 64 entries, and takes slogdet."""
    network = Network(64).double()
    noise = chunks(2, 16, 4)
    pushed = push_forward(FLOW, network, noise)
    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda z: FLOW.sample(network, z[None])[0], noise[k], vectorize=True).reshape(64, 64)
        brute = gaussian_log_prob(noise[k : k + 1], 1.0)[0] - torch.linalg.slogdet(jacobian).logabsdet
        assert abs(float(pushed.log_prob[k] - brute)) < 1e-4
    torch.testing.assert_close(pushed.actions, FLOW.sample(network, noise))


def test_both_directions_agree():
    network = Network(12).double()
    noise = chunks(3, 4, 3)
    forward = push_forward(FLOW, network, noise)
    backward = push_backward(FLOW, network, forward.actions)
    torch.testing.assert_close(backward.noise, noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(backward.log_prob, forward.log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(forward.noise_norm, noise.flatten(1).norm(dim=1))
    torch.testing.assert_close(log_prob(FLOW, network, forward.actions), backward.log_prob)


@pytest.mark.parametrize("garbage", [0.0, math.nan, 1e6])
@pytest.mark.parametrize("probed", [False, True])
def test_masked_entries_change_nothing_and_equal_a_smaller_chunk(garbage, probed):
    """Three steps and two dimensions of a [4, 3] chunk: the density of the [3, 2] chunk under the field restricted to it."""
    network = Network(12).double()
    mask = torch.zeros(2, 4, 3, dtype=torch.bool)
    mask[:, :3, :2] = True
    small = chunks(2, 3, 2)
    padded = torch.full((2, 4, 3), garbage, dtype=torch.float64)
    padded[mask] = small.flatten()

    def restricted(x, t):
        return network(torch.nn.functional.pad(x, (0, 1, 0, 1)), t)[:, :3, :2]

    probes = rademacher_probes(3, padded, 1) if probed else None
    small_probes = probes[:, :, :3, :2] if probes is not None else None
    found = push_backward(FLOW, network, padded, mask, DensityOptions(probes=probes))
    expected = push_backward(FLOW, restricted, small, None, DensityOptions(probes=small_probes))
    torch.testing.assert_close(found.log_prob, expected.log_prob)
    torch.testing.assert_close(found.noise[:, :3, :2], expected.noise)
    assert (found.noise[~mask] == 0).all()


def test_masks_may_differ_between_chunks():
    network = Network(12).double()
    actions = chunks(2, 4, 3)
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0, 2:] = False
    both = log_prob(FLOW, network, actions, mask)
    for k in range(2):
        torch.testing.assert_close(both[k : k + 1], log_prob(FLOW, network, actions[k : k + 1], mask[k : k + 1]))


def test_hutchinson_is_unbiased_for_the_density():
    network = Network(12).double()
    actions = chunks(1, 4, 3).expand(600, 4, 3).contiguous()
    exact = log_prob(FLOW, network, actions[:1])
    estimates = log_prob(FLOW, network, actions, options=DensityOptions(probes=rademacher_probes(1, actions, 5)))
    error = float(estimates.std() / math.sqrt(600))
    assert error > 0
    assert abs(float(estimates.mean() - exact[0])) < 4 * error


def test_float64_mode_is_the_precise_answer_for_float32_input():
    network = Network(12)
    actions = chunks(2, 4, 3, dtype=torch.float32)
    with pytest.raises(FlowError, match=r"answers in float64.*module.double"):
        log_prob(FLOW, lambda x, t: network(x.float(), t.float()), actions, options=DensityOptions(float64=True))
    rough = log_prob(FLOW, network, actions)
    precise = log_prob(FLOW, network.double(), actions, options=DensityOptions(float64=True))
    assert (rough.dtype, precise.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(rough.double(), precise, rtol=0, atol=1e-4)
    torch.testing.assert_close(precise, log_prob(FLOW, network, actions.double()), rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "dopri5"])
def test_every_solver_carries_the_density(solver):
    network = Network(6).double()
    noise = chunks(2, 3, 2)
    steps = 250 if solver == "euler" else 30
    found = push_forward(FLOW, network, noise, options=DensityOptions(solver=solver, num_flow_steps=steps))
    expected = push_forward(FLOW, network, noise, options=DensityOptions(num_flow_steps=20))
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=2e-2 if solver == "euler" else 1e-3)


def test_the_density_can_be_trained_and_needs_no_gradient():
    network = Network(6).double()
    with torch.no_grad():
        assert not log_prob(FLOW, network, chunks(2, 3, 2)).requires_grad
    log_prob(FLOW, network, chunks(2, 3, 2), options=DensityOptions(num_flow_steps=2)).mean().backward()
    weight = network.last.weight
    step = 1e-5 * torch.sign(weight.grad)
    values = []
    for sign in (1, -1):
        moved = Network(6).double()
        moved.load_state_dict(network.state_dict())
        with torch.no_grad():
            moved.last.weight.add_(sign * step)
            values.append(log_prob(FLOW, moved, chunks(2, 3, 2), options=DensityOptions(num_flow_steps=2)).mean())
    assert float(values[0] - values[1]) == pytest.approx(2e-5 * float(weight.grad.abs().sum()), rel=1e-4)


@pytest.mark.usefixtures("shapes_unchecked")
def test_what_cannot_be_scored_is_refused():
    network = Network(6).double()
    actions = chunks(2, 3, 2)
    broken = actions.clone()
    broken[0, 0, 0] = math.inf
    with pytest.raises(FlowError, match="actions must be finite"):
        log_prob(FLOW, network, broken)
    with pytest.raises(FlowError, match=r"probes must be of shape \[n, 2, 3, 2\], found \[2, 3, 2\]"):
        log_prob(FLOW, network, actions, options=DensityOptions(probes=actions))
    with pytest.raises(FlowError, match="increase from noise to data"):
        log_prob(FLOW, network, actions, options=DensityOptions(times=[1.0, 0.0]))
    with pytest.raises(FlowError, match="log_prob"):
        log_prob(FLOW, lambda x, t: x * math.inf, actions)
    with pytest.raises(FlowError, match=r"mask must be torch.bool of shape \[2, 3, 2\]"):
        log_prob(FLOW, network, actions, torch.ones(2, 3, dtype=torch.bool))


def nonlinear(weight):
    return lambda x: torch.tanh(x.flatten(1) @ weight).reshape(x.shape) * x.flatten(1).sum(1)[:, None, None]


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    field = nonlinear(weight)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda y: field(y[None])[0], one).reshape(6, 6) for one in x])
    return x, field, jacobians


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_exact_divergence_is_the_trace_of_each_state_s_jacobian(case, chunk_size):
    x, field, jacobians = case
    value, divergence = exact_divergence(field, x, chunk_size=chunk_size)
    torch.testing.assert_close(value, field(x))
    torch.testing.assert_close(divergence, jacobians.diagonal(dim1=1, dim2=2).sum(1))


def test_chosen_entries_give_their_part_of_the_trace(case):
    x, field, jacobians = case
    _, divergence = exact_divergence(field, x, entries=[0, 4])
    torch.testing.assert_close(divergence, jacobians[:, 0, 0] + jacobians[:, 4, 4])
    assert exact_divergence(field, x, entries=[])[1].tolist() == [0] * 5


def test_hutchinson_is_unbiased_with_the_variance_of_the_page(case):
    x, field, jacobians = case
    num = 4000
    probes = rademacher_probes(num, x, 1)
    value, estimate = hutchinson_divergence(field, x, probes)
    torch.testing.assert_close(value, field(x))
    exact = jacobians.diagonal(dim1=1, dim2=2).sum(1)
    symmetric = (jacobians + jacobians.mT) / 2
    variance = 2 * (symmetric.square().sum((1, 2)) - symmetric.diagonal(dim1=1, dim2=2).square().sum(1))
    assert ((estimate - exact).abs() < 4 * (variance / num).sqrt()).all()
    copies = x.repeat(1500, 1, 1)
    singles = hutchinson_divergence(field, copies, probes[None, :1500].reshape(1, *copies.shape))[1].reshape(1500, 5)
    torch.testing.assert_close(singles.var(0), variance, rtol=0.15, atol=0)
    torch.testing.assert_close(singles.mean(0), hutchinson_divergence(field, x, probes[:1500])[1])


def test_a_diagonal_jacobian_has_no_variance():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    probes = rademacher_probes(1, x, 3)
    torch.testing.assert_close(hutchinson_divergence(torch.sin, x, probes)[1], torch.cos(x).sum(1))


def test_attention_has_a_vectorised_exact_divergence():
    """The policies' kernel: scaled_dot_product_attention under vmap of its backward pass."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)

    def field(x):
        q, k, v = (x @ one for one in weight)
        return torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    x = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    expected = [torch.autograd.functional.jacobian(lambda y: field(y[None])[0], one).reshape(20, 20).trace() for one in x]
    with torch.no_grad():
        torch.testing.assert_close(exact_divergence(field, x)[1], torch.stack(expected))
