"""The field's divergence by two tangents is the exact one, and so are its gradients."""

import torch

from pi0fm.flow.divergence import exact_divergence
from pi0fm.toy.network import PlaneField


def field():
    """Not as it begins, where the last layer is 0: with every weight drawn."""
    generator = torch.Generator().manual_seed(3)
    network = PlaneField(generator, width=16).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return network


def states():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(7, 2, generator=generator, dtype=torch.float64), torch.rand(7, generator=generator, dtype=torch.float64)


def test_value_and_divergence_are_those_of_the_library():
    network, (x, t) = field(), states()
    value, divergence = network.value_and_divergence(x, t)
    expected_value, expected = exact_divergence(lambda y: network(y, t), x)
    torch.testing.assert_close(value, expected_value, rtol=0, atol=1e-13)
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-13)


def test_the_divergence_has_the_gradients_of_the_jacobians_trace():
    network, (x, t) = field(), states()
    x.requires_grad_()
    inputs = [x, *network.parameters()]
    found = torch.autograd.grad(network.value_and_divergence(x, t)[1].sum(), inputs, allow_unused=True)
    jacobians = [
        torch.autograd.functional.jacobian(lambda y, k=k: network(y[None], t[k : k + 1])[0], x[k], create_graph=True) for k in range(len(x))
    ]
    expected = torch.autograd.grad(torch.stack([torch.trace(each) for each in jacobians]).sum(), inputs, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(a if a is not None else zero, b if b is not None else zero.to(a or zero), rtol=0, atol=1e-12)


def test_weights_are_a_function_of_the_generator_alone():
    torch.manual_seed(0)
    first = PlaneField(torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    second = PlaneField(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.layers[0].weight, PlaneField(torch.Generator().manual_seed(6)).layers[0].weight)
