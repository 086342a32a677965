"""Data in the plane: samples and density of each set belong together."""

import math

import pytest
import torch

from pi0fm.toy.datasets import DATASETS, dataset_named
from pi0fm_client.errors import ConfigError

REACH, EDGE = 3.5, 176  # cells narrower than half of the least blur, and aligned with the checkerboard's squares


def cells():
    edge = (torch.arange(EDGE, dtype=torch.float64) + 0.5) / EDGE * 2 * REACH - REACH
    return torch.cartesian_prod(edge, edge), (2 * REACH / EDGE) ** 2


@pytest.mark.parametrize("name", DATASETS)
def test_density_integrates_to_one_and_its_entropy_is_that_of_the_samples(name):
    dataset = dataset_named(name)
    points, area = cells()
    log_density = dataset.log_prob(points)
    mass = log_density.exp() * area
    tolerance = 0.02 if name == "checkerboard" else 1e-3  # squares are cut by cells, blurs are smooth
    assert float(mass.sum()) == pytest.approx(1, abs=tolerance)
    entropy = -float((mass * log_density.clamp(min=-1e3)).sum())
    sample = dataset.sample(4000, torch.Generator().manual_seed(0), torch.float64)
    each = -dataset.log_prob(sample)
    assert float(each.mean()) == pytest.approx(entropy, abs=4 * float(each.std()) / math.sqrt(len(each)) + 2.1 * tolerance)


@pytest.mark.parametrize("name", DATASETS)
def test_samples_are_centred_of_unit_scale_inside_the_window_and_repeatable(name):
    dataset = dataset_named(name)
    sample = dataset.sample(20000, torch.Generator().manual_seed(1))
    assert sample.dtype == torch.float32
    assert sample.shape == (20000, 2)
    assert float(sample.mean(0).abs().max()) < 0.04
    assert 0.85 < float(sample.square().mean().sqrt()) < 1.2
    assert float((sample.abs() < dataset.extent).all(1).float().mean()) > 0.999
    assert torch.equal(sample, dataset.sample(20000, torch.Generator().manual_seed(1)))


def test_checkerboard_fills_every_other_square():
    sample = dataset_named("checkerboard").sample(5000, torch.Generator().manual_seed(2), torch.float64)
    squares = torch.floor(sample + 2).long()
    assert set((squares.sum(1) % 2).tolist()) == {0}
    assert len({tuple(square) for square in squares.tolist()}) == 8


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'moons'"):
        dataset_named("moon")
