"""Tests of initial weights: a function of (seed, name), whole or in parts, in any network; the variance of each distribution."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_dataset
import torch
from torch import nn

from pi0fm.models.config import preset
from pi0fm.models.initial import BLOCK, ConstantInit, NormalInit, UniformInit, distributions, fill, initialise, stretch
from pi0fm.models.pi0 import Pi0

LARGE = 3 * BLOCK + 17


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("bounds", [(0, LARGE), (0, 5), (7, BLOCK), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (LARGE - 3, LARGE)])
@pytest.mark.parametrize("initial", [NormalInit(0.3), UniformInit(0.2), ConstantInit(1.5)])
def test_a_stretch_is_that_part_of_the_whole(initial, bounds):
    start, stop = bounds
    whole = torch.empty(LARGE)
    fill(whole, initial, 4, "decoder.weight")
    assert np.array_equal(stretch(initial, 4, "decoder.weight", start, stop), whole[start:stop].numpy())


def test_the_numbers_are_those_of_any_release():
    """Held to the letter: a run that is resumed or reproduced elsewhere starts from the same weights."""
    found = stretch(NormalInit(1.0), 3, "action_in.weight", BLOCK - 1, BLOCK + 2)
    assert found.tolist() == [2.211010456085205, 0.8516316413879395, 0.4667406976222992]


def test_numbers_have_their_distribution_and_no_memory():
    normal, uniform = stretch(NormalInit(0.5), 0, "a", 0, LARGE), stretch(UniformInit(0.5), 0, "a", 0, LARGE)
    error = 5 / LARGE**0.5
    assert abs(normal.mean()) < 0.5 * error
    assert normal.std() == pytest.approx(0.5, rel=error)
    assert uniform.std() == pytest.approx(0.5 / 3**0.5, rel=error)
    assert (abs(uniform.min()), uniform.max()) == pytest.approx((0.5, 0.5), rel=1e-3)
    for numbers in (normal, uniform):
        for lag in (1, BLOCK):
            assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < error


def test_other_names_and_seeds_have_other_numbers():
    a, b, c = (stretch(NormalInit(1.0), seed, name, 0, 9) for seed, name in ((0, "a"), (0, "b"), (1, "a")))
    assert not np.isin(b, a).any()
    assert not np.isin(c, a).any()


def test_neither_type_nor_order_of_memory_changes_the_numbers():
    plain, turned, short = torch.empty(40, 7), torch.empty(7, 40).T, torch.empty(40, 7, dtype=torch.bfloat16)
    for parameter in (plain, turned, short):
        fill(parameter, NormalInit(1.0), 0, "a")
    assert torch.equal(turned, plain)
    assert torch.equal(short, plain.bfloat16())


def test_a_parameter_knows_nothing_of_the_rest_of_the_network():
    """A network with another size elsewhere, or built without drawing from torch, starts from the same numbers."""
    network = tiny_dataset.network()
    with torch.device("meta"):
        model = Pi0(network)
    model.to_empty(device="cpu")
    before = torch.get_rng_state()
    initialise(model, 5)
    assert torch.equal(torch.get_rng_state(), before)
    other = Pi0(replace(network, decoder=replace(network.decoder, depth=3), vocab_size=50))
    initialise(other, 5)
    ours, theirs = weights(model), weights(other)
    shared = {name for name in ours if name in theirs and ours[name].shape == theirs[name].shape and ours[name].unique().numel() > 1}
    assert shared
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)


def test_torchs_seed_is_a_new_networks_seed():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(weights(Pi0(tiny_dataset.network())))
    first, again, other = (each["action_in.weight"] for each in found)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("adaptive", [False, True])
def test_every_parameter_has_a_distribution(adaptive):
    tree = preset("pi05" if adaptive else "pi0")
    with torch.device("meta"):
        model = Pi0(tree)
    found = distributions(model)
    assert {name for name, _ in model.named_parameters()} <= found.keys()
    width = tree.decoder.backbone.width
    assert found["decoder.layers.0.backbone.qkv.weight"] == found["prompt_embedding.weight"] == NormalInit(width**-0.5)
    assert found["action_out.weight"] == UniformInit(tree.decoder.action_expert.width**-0.5)
    assert found["vision.final_norm.weight"] == ConstantInit(1.0)
    gates = {name for name in found if ".modulation." in name}
    assert bool(gates) == adaptive
    assert all(found[name] == ConstantInit(0.0) for name in gates)
