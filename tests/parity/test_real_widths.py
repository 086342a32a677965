"""Tests of the released widths on two layers: LeRobot's PI0 and PI05 and ours, float32, with small depth and vocabulary."""

import dataclasses
import gc

import pytest
import torch
from parity_pair import KINDS, difference, make_batch, make_pair

from pi0fm.models.config import PI0

CONFIG = dataclasses.replace(
    PI0,
    vision=dataclasses.replace(PI0.vision, depth=2),
    decoder=dataclasses.replace(PI0.decoder, depth=2),
    vocab_size=384,
)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_of_the_released_widths(kind):
    """Loss, velocity and a sample of ten steps; the second camera is missing, the prompt is padded."""
    pair = make_pair(kind, CONFIG)
    batch = make_batch(pair.config, [[True, False]], [18], seed=2)
    theirs = pair.their_answers(batch, gradients=False)
    ours = pair.our_answers(batch, gradients=False)
    found = {name: difference(getattr(ours, name), getattr(theirs, name)) for name in ("loss", "velocity", "sample")}
    del pair
    gc.collect()  # more than two gigabytes of weights, before the other kind's
    assert torch.isfinite(ours.sample).all()
    assert {name: value for name, value in found.items() if not value < 1e-5} == {}
