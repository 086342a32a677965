"""Tests of augmentation against closed forms: identity at strength 0, known rotations and windows, colours, counters."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pi0fm.data.config import AugmentConfig
from pi0fm.data.order.counter import Slots
from pi0fm.data.pictures.augmentation import Augmentation, augment, crop_and_turn, draw_augmentation, recolour
from pi0fm_client.errors import ConfigError

CAMERAS = ("base", "left_wrist")
NONE = AugmentConfig(crop=1.0, rotation=0.0, brightness=0.0, contrast=0.0, saturation=0.0)


def at(*samples: int, epoch: int = 0) -> Slots:
    return Slots(np.full(len(samples), epoch), np.array(samples))


def pictures(batch: int, cameras: int = 2, size: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, cameras, size, size, 3), dtype=np.uint8))


def disc(size: int, x: float, y: float, radius: float) -> torch.Tensor:
    """A smooth disc centred at (x, y) in [-1, 1], float [1, 3, size, size]."""
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    distance = ((grid[:, None] - y) ** 2 + (grid[None] - x) ** 2).sqrt()
    return (255 * torch.sigmoid((radius - distance) * 20)).expand(1, 3, size, size).contiguous()


def turned(pixels: torch.Tensor, angle: float) -> torch.Tensor:
    return crop_and_turn(pixels, torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([angle]))


def test_no_strength_changes_no_bit():
    images = pictures(3)
    assert torch.equal(augment(images, draw_augmentation(NONE, 1, at(0, 1, 2), CAMERAS)), images)


def test_the_default_recipe_changes_every_picture():
    images = pictures(4)
    assert (augment(images, draw_augmentation(AugmentConfig(), 1, at(0, 1, 2, 3), CAMERAS)) != images).flatten(2).any(-1).all()


def test_wrist_cameras_are_recoloured_and_never_moved():
    colourless = dataclasses.replace(AugmentConfig(), brightness=0.0, contrast=0.0, saturation=0.0)
    images = pictures(5)
    found = augment(images, draw_augmentation(colourless, 1, at(*range(5)), CAMERAS))
    assert torch.equal(found[:, 1], images[:, 1])
    assert (found[:, 0] != images[:, 0]).flatten(1).any(1).all()
    named = draw_augmentation(dataclasses.replace(colourless, wrist_cameras=("base",)), 1, at(*range(5)), CAMERAS)
    assert torch.equal(augment(images, named)[:, 0], images[:, 0])


@pytest.mark.parametrize("split", [(1, 3), (2, 2), (3, 1)])
def test_any_split_of_a_batch_gives_the_same_bits(split):
    images, places = pictures(4), at(7, 3, 7, 9)
    whole = augment(images, draw_augmentation(AugmentConfig(), 5, places, CAMERAS))
    cut = split[0]
    parts = [
        augment(images[chosen], draw_augmentation(AugmentConfig(), 5, Slots(places.epoch[chosen], places.index[chosen]), CAMERAS))
        for chosen in (slice(0, cut), slice(cut, 4))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_seed_epoch_sample_and_camera_each_give_other_numbers():
    def drawn(seed=5, epoch=0, sample=3):
        return torch.cat(
            [getattr(draw_augmentation(AugmentConfig(), seed, at(sample, epoch=epoch), ("a", "b")), name).flatten() for name in names]
        )

    names = [item.name for item in dataclasses.fields(Augmentation)]
    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=6), drawn(epoch=1), drawn(sample=4)):
        assert (other != drawn()).float().mean() > 0.8
    both = draw_augmentation(AugmentConfig(), 5, at(3), ("a", "b"))
    assert not torch.isin(both.colour[:, 0], both.colour[:, 1]).any()


def test_numbers_fill_their_range():
    found = draw_augmentation(AugmentConfig(), 0, at(*range(2000)), ("base",))
    assert torch.equal(found.window[..., 0], torch.full((2000, 1), 0.95))
    assert 0.048 < found.window[..., 1:].abs().max() <= 0.05 + 1e-6
    assert math.radians(4.9) < found.turn.abs().max() <= math.radians(5) + 1e-6
    for column, most in enumerate((0.3, 0.4, 0.5)):
        away = found.colour[..., column] - 1
        assert 0.98 * most < away.abs().max() <= most + 1e-6 and abs(float(away.mean())) < 0.05 * most


def test_what_is_round_about_the_centre_does_not_turn():
    ring = disc(64, 0.0, 0.0, 0.5)
    assert (turned(ring, 0.7) - ring).abs().max() < 6
    assert (turned(disc(64, 0.3, 0.0, 0.4), 0.7) - disc(64, 0.3, 0.0, 0.4)).abs().max() > 100


@pytest.mark.parametrize("angle", [math.pi / 2, math.pi, 0.4])
def test_a_turn_takes_a_disc_where_geometry_says(angle):
    """Counterclockwise as seen, with y pointing down: (0.4, 0) goes to (0.4 cos, -0.4 sin)."""
    expected = disc(64, 0.4 * math.cos(angle), -0.4 * math.sin(angle), 0.3)
    assert (turned(disc(64, 0.4, 0.0, 0.3), angle) - expected).abs().max() < 8


def test_four_quarter_turns_are_none():
    image = pictures(1, 1)[0].permute(0, 3, 1, 2).float()
    back = image
    for _ in range(4):
        back = turned(back, math.pi / 2)
    torch.testing.assert_close(back, image, atol=0.05, rtol=0)
    torch.testing.assert_close(turned(image, math.pi / 2), torch.rot90(image, 1, (2, 3)), atol=0.05, rtol=0)


def test_a_turn_is_rigid_in_a_wide_picture():
    """A quarter turn of 8 x 16 about its centre: what stays inside is the middle square, turned."""
    image = pictures(1, 1)[0].permute(0, 3, 1, 2).float()[:, :, 4:12]
    found = turned(image, math.pi / 2)
    torch.testing.assert_close(found[..., 4:12], torch.rot90(image[..., 4:12], 1, (2, 3)), atol=0.05, rtol=0)
    assert not found[..., :3].any()  # from outside: black


def test_a_window_of_half_the_side_is_that_quarter_enlarged():
    """Right of the centre and above it; a linear ramp has a closed form after bilinear resampling."""
    size = 32
    ramp = torch.arange(size, dtype=torch.float32).expand(1, 3, size, size)
    found = crop_and_turn(ramp, torch.tensor([[0.5, 0.5, -0.5]]), torch.zeros(1))
    expected = (torch.arange(size) + 0.5) / 2 + size / 2 - 0.5
    torch.testing.assert_close(found[0, 0, 5, :-1], expected[:-1], atol=1e-3, rtol=0)


def test_colours_by_hand():
    grey = torch.full((1, 3, 4, 4), 100.0)
    torch.testing.assert_close(recolour(grey, torch.tensor([[1.2, 0.6, 1.5]])), torch.full_like(grey, 120.0))
    halves = torch.cat([torch.full((1, 3, 4, 2), 60.0), torch.full((1, 3, 4, 2), 140.0)], dim=-1)
    found = recolour(halves, torch.tensor([[1.0, 1.4, 1.0]]))
    assert found[..., 0].unique().tolist() == pytest.approx([44.0]) and found[..., 3].unique().tolist() == pytest.approx([156.0])
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 200
    plain = recolour(red, torch.tensor([[1.0, 1.0, 0.5]]))[0, :, 0, 0]
    luma = 0.299 * 200
    torch.testing.assert_close(plain, torch.tensor([(200 + luma) / 2, luma / 2, luma / 2]))


def test_values_stay_in_range_and_type():
    extreme = torch.zeros(8, 2, 16, 16, 3, dtype=torch.uint8)
    extreme[:, :, ::2] = 255
    strong = AugmentConfig(crop=0.5, rotation=180, brightness=1, contrast=1, saturation=1)
    found = augment(extreme, draw_augmentation(strong, 0, at(*range(8)), CAMERAS))
    assert found.dtype == torch.uint8 and found.shape == extreme.shape
    factors = torch.tensor([[2.0, 2.0, 2.0]])
    bounded = recolour(pictures(1, 1)[0].permute(0, 3, 1, 2).float(), factors)
    assert bounded.min() >= 0 and bounded.max() <= 255


@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.1}, {"rotation": -1.0}, {"brightness": 1.5}, {"saturation": -0.1}])
def test_strengths_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"augmentation\.{next(iter(wrong))} must lie in"):
        AugmentConfig(**wrong)
