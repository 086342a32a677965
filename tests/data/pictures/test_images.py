"""Tests of resizing with padding: geometry, no distortion, a black border."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0fm.data.pictures.images import resize_with_padding


def test_the_right_size_is_returned_as_it_is():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert resize_with_padding(images, 8) is images


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"), [(48, 64, (8, 56), (0, 64)), (128, 64, (0, 64), (16, 48)), (32, 32, (0, 64), (0, 64))]
)
def test_geometry(height, width, rows, columns):
    found = resize_with_padding(np.full((1, height, width, 3), 200, dtype=np.uint8), 64)[0]
    inside = np.zeros((64, 64), dtype=bool)
    inside[slice(*rows), slice(*columns)] = True
    assert (found[inside] == 200).all()
    assert not found[~inside].any()


def test_a_picture_that_only_needs_padding_keeps_every_pixel():
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    assert np.array_equal(resize_with_padding(images, 64)[:, 8:56], images)


def test_a_disc_stays_round():
    """Width and height of a disc in a wide picture shrink alike."""
    y, x = np.mgrid[:90, :160]
    disc = (((y - 45) ** 2 + (x - 80) ** 2 <= 40**2) * 255).astype(np.uint8)
    found = resize_with_padding(np.repeat(disc[None, ..., None], 3, axis=3), 64)[0, ..., 0] > 127
    height, width = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    assert abs(len(height) - len(width)) <= 1
    assert len(height) == pytest.approx(80 * 64 / 160, abs=1)
    assert (height[0] + height[-1]) / 2 == pytest.approx(31.5, abs=1)


def test_resampling_is_torchs_antialiased_bilinear_in_float():
    images = np.random.default_rng(0).integers(0, 256, (2, 50, 50, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    expected = F.interpolate(pixels, size=(20, 20), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
    assert np.abs(resize_with_padding(images, 20) - expected).max() <= 1.0


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), size=st.integers(1, 40))
def test_any_size_fits(height, width, size):
    found = resize_with_padding(np.full((1, height, width, 3), 255, dtype=np.uint8), size)
    assert found.shape == (1, size, size, 3)
    assert found.dtype == np.uint8
    ratio = max(width / size, height / size)
    assert found.any(axis=(0, 1, 3)).sum() == max(1, int(width / ratio))
