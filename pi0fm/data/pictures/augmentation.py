"""Random crops, rotations and colour changes of pictures, sample by sample, on their device.

Owns: the recipe, its random numbers by counter, the function on pictures. Does not know: batches, the network, which device.
The recipe is openpi's: a random crop of 95 % resized back, a turn of up to 5 degrees, then brightness 0.3, contrast 0.4 and saturation
0.5. A wrist camera is only recoloured: its picture tells where the hand is, and a moved one would tell it wrongly.

    picture ── crop ── resize ── turn ──┬── brightness ── contrast ── saturation ── clip
               one resampling           '── wrist cameras begin here

The numbers are a function of (seed, epoch, sample, camera), so a sample looks the same on any worker and in any micro batch.
Shape letters: B batch, C cameras.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from pi0fm.data.config import AugmentConfig
from pi0fm.data.order.counter import Slots, uniforms

PURPOSE = 3  # random number stream of augmentation
_NUMBERS = 6  # per camera: two for the crop, one for the turn, three for the colours
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma


@dataclass(frozen=True)
class Augmentation:
    """Changes of each picture of a batch.

    window: [B, C, 3], share of the side that is kept, and the window's centre (x, y) in [-1, 1]; turn: [B, C] radians, counterclockwise;
    colour: [B, C, 3], factors of brightness, contrast and saturation.
    """

    window: Float[Tensor, "B C 3"]
    turn: Float[Tensor, "B C"]
    colour: Float[Tensor, "B C 3"]

    def to(self, device: torch.device) -> "Augmentation":
        """Copy to `device`."""
        return Augmentation(**{item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)})


def draw_augmentation(config: AugmentConfig, seed: int, at: Slots, cameras: tuple[str, ...]) -> Augmentation:
    """Draw the augmentation of each sample: a function of (seed, epoch, number of the sample), and of the camera's place."""
    drawn = 2 * uniforms(seed, at, PURPOSE, _NUMBERS * len(cameras)).reshape(-1, len(cameras), _NUMBERS) - 1
    wrist = np.array([name in config.wrist_cameras if config.wrist_cameras else "wrist" in name for name in cameras])
    moved = np.where(wrist, 0.0, 1.0).astype(np.float32)[:, None]
    margin = np.float32(1 - config.crop) * moved
    window = np.concatenate([np.broadcast_to(1 - margin, (*drawn.shape[:2], 1)), margin * drawn[..., :2]], axis=-1)
    turn = np.float32(np.deg2rad(config.rotation)) * moved[:, 0] * drawn[..., 2]
    colour = 1 + np.array([config.brightness, config.contrast, config.saturation], dtype=np.float32) * drawn[..., 3:]
    return Augmentation(*(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for array in (window, turn, colour)))


def augment(images: UInt8[Tensor, "B C h w 3"], how: Augmentation) -> UInt8[Tensor, "B C h w 3"]:
    """Change each picture by `how`; pixels that a turn brings in from outside are black."""
    batch, cameras, height, width = images.shape[:4]
    pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float()
    flat = {item.name: getattr(how, item.name).flatten(0, 1) for item in fields(how)}
    moved = recolour(crop_and_turn(pixels, flat["window"], flat["turn"]), flat["colour"])
    return moved.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).reshape(batch, cameras, height, width, 3)


def crop_and_turn(pixels: Float[Tensor, "N 3 h w"], window: Float[Tensor, "N 3"], turn: Float[Tensor, "N"]) -> Float[Tensor, "N 3 h w"]:
    """Crop, resize and turn in one bilinear resampling: out(p) = in(share R(turn) p + centre), p in [-1, 1] x [-1, 1].

    A picture that is neither cropped nor turned is returned bit for bit. Turns are rigid in pixels at any aspect ratio.
    """
    height, width = pixels.shape[2:]
    share, cos, sin = window[:, 0], turn.cos(), turn.sin()
    # y points down in a picture: with these signs a positive turn looks counterclockwise
    x = torch.stack([share * cos, -share * sin * (height / width), window[:, 1]], dim=1)
    y = torch.stack([share * sin * (width / height), share * cos, window[:, 2]], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(pixels.shape), align_corners=False)
    resampled = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    still = (share == 1) & (turn == 0)
    return torch.where(still[:, None, None, None], pixels, resampled)


def recolour(pixels: Float[Tensor, "N 3 h w"], factors: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3 h w"]:
    """Change brightness, contrast about the mean grey, saturation about each pixel's grey; values 0..255, clipped after each.

    A factor of 1 changes nothing.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    weights = torch.tensor(_GREY, device=pixels.device)[:, None, None]
    bright = (pixels * brightness).clamp(0, 255)
    mean = (bright * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    contrasted = _blend(bright, mean, contrast)
    return _blend(contrasted, (contrasted * weights).sum(1, keepdim=True), saturation)


def _blend(pixels: Tensor, base: Tensor, factor: Tensor) -> Tensor:
    # as base + factor (pixels - base) a factor of 1 would round
    return torch.where(factor == 1, pixels, (base + factor * (pixels - base)).clamp(0, 255))
