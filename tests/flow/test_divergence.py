import pytest
import torch

from pi0fm.flow.divergence import exact_divergence, hutchinson_divergence, rademacher_probes
from pi0fm_client.errors import ConfigError


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
    probes = rademacher_probes(num, x, torch.Generator().manual_seed(1))
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
    probes = rademacher_probes(1, x, torch.Generator().manual_seed(3))
    torch.testing.assert_close(hutchinson_divergence(torch.sin, x, probes)[1], torch.cos(x).sum(1))


def test_probes_are_signs_from_their_generator_alone():
    like = torch.zeros(3, 4, 2)
    mask = torch.zeros(3, 4, 2, dtype=torch.bool)
    mask[:, :2] = True
    probes = rademacher_probes(5, like, torch.Generator().manual_seed(7), mask)
    assert probes.shape == (5, 3, 4, 2)
    assert (probes[:, mask].abs() == 1).all()
    assert (probes[:, ~mask] == 0).all()
    torch.manual_seed(99)
    assert torch.equal(probes, rademacher_probes(5, like, torch.Generator().manual_seed(7), mask))
    with pytest.raises(ConfigError, match="at least 1 probe"):
        rademacher_probes(0, like, torch.Generator())


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
