"""Data in the plane with a known density: moons, checkerboard, eight Gaussians, spiral.

Owns: their samples and their log-density. Does not know: paths, networks, methods.

    moons              two half circles, blurred      eight_gaussians    eight blurs on a circle
    checkerboard       uniform on 8 of 16 squares     spiral             two turns, blurred

A curve blurred by N(0, s^2 I) is a mixture of Gaussians along the curve, so its density is a sum over fine points of the curve.
No model's expected NLL can lie below the entropy that these densities give. Each set has mean 0 and root mean square about 1 a
coordinate.
Shape letters: B points, M points of a curve.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError

CURVE_POINTS = 1024
BLOCK = 4096  # points whose distances to a whole curve are held at once


@final
@dataclass(frozen=True)
class Dataset:
    """A distribution in the plane.

    extent: the square [-extent, extent]^2 holds all of it but for tails, and is what figures show.
    """

    name: str
    extent: float
    draw: Callable[[int, torch.Generator, torch.dtype], Tensor]
    log_density: Callable[[Tensor], Tensor]

    def sample(self, num: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Float[Tensor, "B 2"]:
        """`num` independent points, float32 or float64; random numbers from `generator` alone."""
        return self.draw(num, generator, dtype)

    def log_prob(self, x: Float[Tensor, "B 2"]) -> Float[Tensor, " B"]:
        """log-density in nats; -inf outside a checkerboard's squares."""
        return torch.cat([self.log_density(block) for block in x.split(BLOCK)])


def dataset_named(name: str) -> Dataset:
    """The data set of that name. Raises ConfigError that names the known ones: moons, checkerboard, eight_gaussians, spiral."""
    if name not in _DATASETS:
        raise ConfigError(f"unknown dataset {name!r}: {nearest(name, DATASETS)}")
    return _DATASETS[name]


def _blurred(name: str, extent: float, curve: Callable[[Tensor], Tensor], scale: float) -> Dataset:
    """Points `curve(u)`, u uniform in [0, 1), plus N(0, scale^2 I). `curve` maps [M] to [M, 2] in float64."""

    def draw(num: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        u = torch.rand(num, generator=generator, dtype=torch.float64)
        blur = torch.randn(num, 2, generator=generator, dtype=torch.float64)
        return (curve(u) + scale * blur).to(dtype)

    def log_density(x: Tensor) -> Tensor:
        centres = curve((torch.arange(CURVE_POINTS, dtype=torch.float64) + 0.5) / CURVE_POINTS)
        squares = torch.cdist(x.to(torch.float64), centres).square()
        each = -squares / (2 * scale**2) - math.log(2 * math.pi * scale**2 * CURVE_POINTS)
        return torch.logsumexp(each, dim=1).to(x.dtype)

    return Dataset(name, extent, draw, log_density)


def _moons(u: Tensor) -> Tensor:
    """Half the points on an arc that opens downwards, half on one that opens upwards, one inside the other."""
    upper = u < 0.5
    angle = 2 * math.pi * torch.where(upper, u, u - 0.5)
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle))
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle))
    return torch.stack([x - 0.5, y - 0.25], dim=1) / 0.7


def _eight_centres(u: Tensor) -> Tensor:
    """The nearest eighth of a circle of radius 1.4: every u gives one of eight points."""
    angle = 2 * math.pi * torch.floor(8 * u) / 8
    return 1.4 * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)


def _spiral(u: Tensor) -> Tensor:
    """Two turns with the radius as the angle; the root spreads the points evenly along the arm."""
    angle = 4 * math.pi * torch.sqrt(u)
    arm = (angle / (2 * math.pi))[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    # The arm's mean, int_0^1 2 sqrt(u) (cos, sin)(4 pi sqrt(u)) du: not 0, since the outer half turns differ.
    return arm - arm.new_tensor([1 / (2 * math.pi**2), -1 / math.pi])


def _draw_checkerboard(num: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """x is uniform in [-2, 2); y in one of the two squares of that column that are filled."""
    x, inside = (torch.rand(num, generator=generator, dtype=torch.float64) for _ in range(2))
    column = torch.floor(4 * x)
    row = 2 * torch.randint(0, 2, (num,), generator=generator) + column % 2
    return torch.stack([4 * x - 2, row + inside - 2], dim=1).to(dtype)


def _checkerboard_log_density(x: Tensor) -> Tensor:
    inside = (x >= -2).all(1) & (x < 2).all(1)
    filled = torch.floor(x + 2).sum(1) % 2 == 0
    return torch.where(inside & filled, -math.log(8.0), -math.inf).to(x.dtype)


_DATASETS = {
    dataset.name: dataset
    for dataset in (
        _blurred("moons", 2.7, _moons, 0.1),
        Dataset("checkerboard", 2.6, _draw_checkerboard, _checkerboard_log_density),
        _blurred("eight_gaussians", 2.4, _eight_centres, 0.14),
        _blurred("spiral", 2.9, _spiral, 0.08),
    )
}
DATASETS = tuple(_DATASETS)
