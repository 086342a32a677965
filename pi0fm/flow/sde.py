"""Stochastic samplers with the marginals of the flow.

Owns: Euler-Maruyama for every member of the family, and the time grid that suits it. Does not know: networks, robots.

Every member of (Song et al. 2021, arXiv 2011.13456, section 4.3 and appendix D, written for our clock)

    dx = (u + (h^2 / 2) s) dt + h dW        s = grad log p_t, made from u

has the same marginals p_t, whatever h_t >= 0:

    h = 0 ---------------- 0 < h < g ---------------- h = g ---------------- h > g
    probability-flow ODE   less noise than diffusion  reverse diffusion      more noise, shorter steps needed

g_t = sqrt(2 lam_t) is infinite where alpha is 0, and s where sigma is 0, so the grid keeps `time_margin` from such ends: a
sample then carries the noise sigma(1 - time_margin). Between them it is uniform in ln(alpha / sigma): for h = g the drift
pulls by lam dt / sigma^2 = d ln(alpha / sigma) a step, the same everywhere, where a grid uniform in t would blow up near noise.
Shape letters: B batch, K steps.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm.flow.checks import FlowError, check_finite, check_grid, check_mask
from pi0fm.flow.conversion import SCORE, VELOCITY, check_conversion, convert
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.path import ProbabilityPath
from pi0fm.flow.solver import Velocity
from pi0fm_client.errors import ConfigError

NoiseLevel = float | Callable[[float], float]
"""h as a multiple of g (0 the ODE, 1 the reverse diffusion), or as a function of t."""


def sample_sde(
    flow: FlowMatching,
    network: Velocity,
    noise: Float[Tensor, "B *rest"],
    h: NoiseLevel = 1.0,
    num_flow_steps: int = 200,
    *,
    generator: torch.Generator | None = None,
    increments: Float[Tensor, "K B *rest"] | None = None,
    mask: Bool[Tensor, "B *rest"] | None = None,
    times: Sequence[float] | None = None,
) -> Float[Tensor, "B *rest"]:
    """Euler-Maruyama (order 1 in law) from `prior_scale * noise` to data; one evaluation of the network a step.

    h: a number is a multiple of g_t; a function of t in (0, 1) is h_t itself. Not negative.
    increments: a standard normal number for every step and entry; else they are drawn from `generator`. With h = 0 neither is
        needed, and the result is Euler's on the same grid.
    mask: entries that are False stay 0. times: an increasing grid instead of `sde_grid`.
    Raises ConfigError for a negative h or no source of randomness, FlowError for a bad grid, mask or state.
    """
    grid = list(times) if times is not None else sde_grid(flow, num_flow_steps)
    check_grid(grid)
    levels = _levels(flow.path, h, grid)
    if generator is None and increments is None and any(levels):
        raise ConfigError("an SDE with h > 0 needs randomness: pass generator=torch.Generator().manual_seed(...) or increments")
    if increments is not None:
        check_increments(increments, len(grid) - 1, noise)
    if mask is not None:
        check_mask(mask, noise)
    real = torch.ones_like(noise, dtype=torch.bool) if mask is None else mask
    field = flow.velocity_field(network, mask)
    x = flow.path.prior_scale * noise.to(torch.promote_types(noise.dtype, torch.float32))
    x = torch.where(real, x, torch.zeros_like(x))
    for k, (t, following) in enumerate(itertools.pairwise(grid)):
        t_B = torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)
        drift = field(x, t_B)
        if levels[k] > 0:
            # Unchecked: `_levels` has looked at this grid, and the state is looked at once, after the loop.
            score = convert(flow.path, drift, x, t_B, VELOCITY, SCORE, check=False)
            drift = drift + levels[k] ** 2 / 2 * score
        x = x + (following - t) * drift
        if levels[k] > 0:
            z = increments[k].to(x) if increments is not None else normal_like(x, generator)
            x = x + levels[k] * math.sqrt(following - t) * z
        x = torch.where(real, x, torch.zeros_like(x))
    check_finite("the sample (or its noise, or the network's answer)", x)
    return x


def sde_grid(flow: FlowMatching, num_steps: int) -> list[float]:
    """`num_steps + 1` times, uniform in ln(alpha / sigma), from noise to data within `time_margin` of the singular ends."""
    if num_steps < 1:
        raise ConfigError(f"an SDE needs at least 1 step, found {num_steps}; try 200")
    path = flow.path
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    start = flow.time_margin if float(path.alpha(ends)[0]) == 0 else 0.0
    stop = 1 - flow.time_margin if float(path.sigma(ends)[1]) == 0 else 1.0
    low, high = (torch.full((num_steps + 1,), end, dtype=torch.float64) for end in (start, stop))
    target = torch.lerp(_log_ratio(path, low), _log_ratio(path, high), torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))
    for _ in range(60):
        middle = (low + high) / 2
        below = _log_ratio(path, middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return [start, *((low + high) / 2).tolist()[1:-1], stop]


def check_increments(increments: Tensor, num_steps: int, noise: Tensor) -> None:
    """Refuse increments that are not one for every step and entry. Reads shapes only."""
    if increments.shape != (num_steps, *noise.shape):
        raise FlowError(f"increments must be of shape {[num_steps, *noise.shape]}, one for every step, found {list(increments.shape)}")


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the shape, type and place of x, drawn where the generator lives."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def _log_ratio(path: ProbabilityPath, t: Tensor) -> Tensor:
    return torch.log(path.alpha(t)) - torch.log(path.sigma(t))


def _levels(path: ProbabilityPath, h: NoiseLevel, grid: Sequence[float]) -> list[float]:
    """h at the start of every step, computed on the CPU so that the loop waits for nothing."""
    t = torch.tensor(grid[:-1], dtype=torch.float64)
    if callable(h):
        levels = [float(h(time)) for time in grid[:-1]]
    elif h == 0:
        levels = [0.0] * len(t)
    else:
        levels = (h * path.diffusion(t)).tolist()
    if not all(0 <= level < math.inf for level in levels):
        raise ConfigError(
            f"an SDE needs 0 <= h < infinity at every step, found {min(levels):g} to {max(levels):g}; g is infinite where alpha is 0"
        )
    if any(levels):
        if grid[0] > grid[-1]:
            raise ConfigError(f"an SDE with h > 0 runs from noise to data: its grid must increase, found {grid[0]:g} to {grid[-1]:g}")
        check_conversion(path, t, VELOCITY, SCORE)
    return levels
