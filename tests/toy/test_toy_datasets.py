"""Tests that samples and density of each data set in the plane agree."""

import math

import pytest
import torch

from pi0fm.toy.datasets import DATASETS

REACH, EDGE = 3.5, 84  # cells as wide as the least blur, whose sum is then exact to 1e-7, and aligned with the checkerboard's squares


@pytest.mark.parametrize("name", DATASETS)
def test_density_integrates_to_one_and_its_entropy_is_that_of_the_samples(name):
    edge = (torch.arange(EDGE, dtype=torch.float64) + 0.5) / EDGE * 2 * REACH - REACH
    log_density = DATASETS[name].log_prob(torch.cartesian_prod(edge, edge))
    mass = log_density.exp() * (2 * REACH / EDGE) ** 2
    tolerance = 0.02 if name == "checkerboard" else 1e-3  # squares are cut by cells, blurs are smooth
    assert float(mass.sum()) == pytest.approx(1, abs=tolerance)
    entropy = -float((mass * log_density.clamp(min=-1e3)).sum())
    each = -DATASETS[name].log_prob(DATASETS[name].sample(4000, torch.Generator().manual_seed(0)))
    assert float(each.mean()) == pytest.approx(entropy, abs=4 * float(each.std()) / math.sqrt(len(each)) + 2.1 * tolerance)


@pytest.mark.parametrize("name", DATASETS)
def test_samples_are_centred_of_unit_scale_inside_the_window_and_repeatable(name):
    sample = DATASETS[name].sample(20000, torch.Generator().manual_seed(1))
    assert float(sample.mean(0).abs().max()) < 0.04
    assert 0.85 < float(sample.square().mean().sqrt()) < 1.2
    assert float((sample.abs() < DATASETS[name].extent).all(1).float().mean()) > 0.999
    assert torch.equal(sample, DATASETS[name].sample(20000, torch.Generator().manual_seed(1)))
