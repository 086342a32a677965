"""A policy of a known field: each chunk is a straight line from the robot's state, whose slope its noise decides.

Owns: the exact velocity of that distribution, with a flow time for each row, and its execution with a delay. Does not know: networks.
Row i of a chunk is `state + slope (i + 1)`; the slope is a mixture of N(mean, spread^2) with equal weights, and each row is rough by ROUGH.
Normalised, (row - state) / SCALE, each component is Gaussian under x_t = t x_1 + (1 - t) x_0 row by row, so E[x_1 | x_t] is known; a row at
t = 1 is known exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

H, SCALE, ROUGH = 16, 8.0, 0.01
Sample = Callable[[float, Tensor, NDArray[np.float64], int], NDArray[np.float64]]


@dataclass(frozen=True)
class Lines:
    """The velocity, normalised: (x [B, H, 1], t [B] or [B, H]) -> dx/dt."""

    slopes: tuple[float, ...]
    spread: float

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact field."""
        flat, times = x[..., 0], t if t.ndim == 2 else t[:, None].expand(-1, H)
        steps = torch.arange(1, H + 1, dtype=torch.float64) / SCALE
        covariance = self.spread**2 * steps[:, None] * steps + (ROUGH / SCALE) ** 2 * torch.eye(H, dtype=torch.float64)
        scaled = times[:, :, None] * covariance
        seen = scaled * times[:, None, :] + torch.diag_embed((1 - times) ** 2)
        likely, ends = [], []
        for slope in self.slopes:
            away = flat - times * slope * steps
            solved = torch.linalg.solve(seen, away)
            likely.append(-0.5 * (away * solved).sum(1))
            ends.append(slope * steps + (scaled.transpose(1, 2) @ solved[..., None])[..., 0])
        weights = torch.softmax(torch.stack(likely), dim=0)[..., None]
        end = (weights * torch.stack(ends)).sum(0)
        return torch.where(times < 1, (end - flat) / (1 - times).clamp(min=1e-9), 0.0)[..., None]


def largest_step(sample: Sample, delay: int, horizon: int = 8, chunks: int = 12) -> float:
    """Between neighbouring actions of a robot that asks every `horizon` steps and is answered `delay` steps later.

    sample: (state, noise [1, H, 1], remainder [n], delay) -> chunk [H]; the remainder is empty before the first chunk.
    """
    noise = [torch.randn(1, H, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(chunks)]
    chunk, done = sample(0.0, noise[0], np.empty(0), 0), [0.0]
    done += chunk[:horizon].tolist()
    for drawn in noise[1:]:
        fresh = sample(done[-1], drawn, chunk[horizon:], delay)
        chunk = np.concatenate([chunk[horizon : horizon + delay], fresh[delay:]])
        done += chunk[:horizon].tolist()
    return float(np.abs(np.diff(done)).max())
