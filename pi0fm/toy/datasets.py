"""Data in the plane with a known density: moons, checkerboard, eight Gaussians, spiral.

Owns: samples and log-density of each. Does not know: paths, networks, methods.

A curve blurred by N(0, s^2 I) is a mixture of Gaussians along the curve: its density is a sum over fine points of the curve. The entropy
of these densities is a lower bound of every model's expected NLL. Each set has mean 0 and root mean square about 1 per coordinate.
Shape letters: B points, M points of a curve.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

CURVE_POINTS = 1024
BLOCK = 4096  # points whose distances to a curve are in memory at once


@final
@dataclass(frozen=True)
class Dataset:
    """A distribution in the plane.

    extent: the square [-extent, extent]^2 holds all of it except tails; figures show this window.
    draw: (number, generator) -> float64 points. log_density: of float64 points.
    """

    name: str
    extent: float
    draw: Callable[[int, torch.Generator], Tensor]
    log_density: Callable[[Tensor], Tensor]

    def sample(self, num: int, generator: torch.Generator) -> Float[Tensor, "B 2"]:
        """Draw `num` independent float32 points."""
        return self.draw(num, generator).float()

    def log_prob(self, x: Float[Tensor, "B 2"]) -> Float[Tensor, " B"]:
        """Return the log-density in nats, in the precision of x; -inf outside a checkerboard's squares."""
        return torch.cat([self.log_density(block.double()).to(x.dtype) for block in x.split(BLOCK)])


def _blurred(name: str, extent: float, scale: float, curve: Callable[[Tensor], Tensor], points: int = CURVE_POINTS) -> Dataset:
    """Return the set of points `curve(u)`, u uniform in [0, 1), plus N(0, scale^2 I). `curve` maps [M] to [M, 2] in float64.

    points: number of points of the curve over which the density sums.
    """

    def draw(num: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(num, generator=generator, dtype=torch.float64)
        return curve(u) + scale * torch.randn(num, 2, generator=generator, dtype=torch.float64)

    def log_density(x: Tensor) -> Tensor:
        centres = curve((torch.arange(points, dtype=torch.float64) + 0.5) / points)
        each = -torch.cdist(x, centres).square() / (2 * scale**2) - math.log(2 * math.pi * scale**2 * points)
        return torch.logsumexp(each, dim=1)

    return Dataset(name, extent, draw, log_density)


def _moons(u: Tensor) -> Tensor:
    """Return points of an arc that opens downwards (u < 1/2) and of one that opens upwards, interleaved."""
    upper = u < 0.5
    angle = 2 * math.pi * torch.where(upper, u, u - 0.5)
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle))
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle))
    return torch.stack([x - 0.5, y - 0.25], dim=1) / 0.7


def _eight_centres(u: Tensor) -> Tensor:
    """Return the nearest of eight points of a circle of radius 1.4."""
    angle = 2 * math.pi * torch.floor(8 * u) / 8
    return 1.4 * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)


def _spiral(u: Tensor) -> Tensor:
    """Return points of two turns with the radius as the angle; the root spreads them evenly along the arm."""
    angle = 4 * math.pi * torch.sqrt(u)
    arm = (angle / (2 * math.pi))[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    # The arm's mean, int_0^1 2 sqrt(u) (cos, sin)(4 pi sqrt(u)) du: not 0, since the outer half turns differ.
    return arm - arm.new_tensor([1 / (2 * math.pi**2), -1 / math.pi])


def _draw_checkerboard(num: int, generator: torch.Generator) -> Tensor:
    """Draw x uniform in [-2, 2), and y in one of the two filled squares of that column."""
    x, inside = (torch.rand(num, generator=generator, dtype=torch.float64) for _ in range(2))
    row = 2 * torch.randint(0, 2, (num,), generator=generator) + torch.floor(4 * x) % 2
    return torch.stack([4 * x - 2, row + inside - 2], dim=1)


def _checkerboard_log_density(x: Tensor) -> Tensor:
    filled = (torch.floor(x + 2).sum(1) % 2 == 0) & (x >= -2).all(1) & (x < 2).all(1)
    return torch.where(filled, -math.log(8.0), -math.inf)


DATASETS = {
    dataset.name: dataset
    for dataset in (
        _blurred("moons", 2.7, 0.1, _moons),
        Dataset("checkerboard", 2.6, _draw_checkerboard, _checkerboard_log_density),
        _blurred("eight_gaussians", 2.4, 0.14, _eight_centres, points=8),
        _blurred("spiral", 2.9, 0.08, _spiral),
    )
}
