"""Tests of the planning measurement: an exchange of the network's units without computation, and the rates from it."""

import math

import pytest
import torch

from pi0fm.bench.harness.exchange import WeightSumNetwork
from pi0fm.bench.planning import FEW, LARGE, MANY, SMALL, rates
from pi0fm.models.config import TINY
from pi0fm.models.pi0 import Pi0
from pi0fm.train.components import FULL, GRADIENTS, NONE, Adaptation
from pi0fm.train.plan.memory import count_network
from pi0fm.train.plan.network import Network


def test_a_still_network_has_the_weights_and_passes_of_the_units():
    with torch.device("meta"):
        network = Pi0(TINY)
    counted, still = count_network(TINY, Adaptation(), torch.float32), WeightSumNetwork(network, 1.0)
    assert still.bytes() == counted.weights
    units = (*still.vision.layers, *still.decoder.layers, still.prompt_embedding, still.rest)
    assert sorted(sum(weight.numel() for weight in unit.parameters()) for unit in units) == sorted(
        unit.numbers for unit in counted.units.values()
    )
    still(torch.zeros((), requires_grad=True)).backward()
    assert all((weight.grad == 1).all() for weight in still.parameters())
    assert WeightSumNetwork(network, 2.0).bytes() == pytest.approx(2 * counted.weights, rel=0.01)


def test_rates_are_those_that_made_the_seconds():
    count, real = 4, Network(2e9, 2e9, 3e-4, 4, scatter_times=1.5, reduce_times=1.8)
    group, counted = real.group(count), count_network(TINY, Adaptation(), torch.float32)
    found = {f"pass {SMALL}": 0.05, f"pass {LARGE}": 0.2, "optimizer": 0.01}
    for times in (FEW, MANY):
        size, units = times * counted.weights, len(counted.units)
        gather, scatter = real.gather(group, size, units), real.scatter(group, size, units)
        seconds = {NONE: real.reduce(group, size), GRADIENTS: gather + scatter, FULL: 2 * gather + scatter, "bytes": size}
        found |= {f"{what} {times}": figure for what, figure in seconds.items()}
    network = rates(found, count)[1]
    for name in ("inside", "between", "latency", "scatter_times", "reduce_times"):
        assert math.isclose(getattr(network, name), getattr(real, name), rel_tol=1e-6), name
