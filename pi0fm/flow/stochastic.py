"""Samplers that draw random numbers: Euler-Maruyama for a family of SDEs, and DDPM's ancestral sampler for any Gaussian path.

Owns: both rules of a step, their time grids, the loop they share. Does not know: networks, robots.

Every member of the family (Song et al. 2021, arXiv 2011.13456, section 4.3 and appendix D, written for our clock)

    dx = (u + (h^2 / 2) s) dt + h dW        s = grad log p_t, made from u

has the same marginals p_t, whatever h_t >= 0:

    h = 0 ---------------- 0 < h < g ---------------- h = g ---------------- h > g
    probability-flow ODE   less noise than diffusion  reverse diffusion      more noise, shorter steps needed

g_t = sqrt(2 lam_t) is infinite where alpha is 0, and s where sigma is 0, so the grid keeps `time_margin` from such ends: a
sample then carries the noise sigma(1 - time_margin). Between them it is uniform in ln(alpha / sigma): for h = g the drift
pulls by lam dt / sigma^2 = d ln(alpha / sigma) per step, equal for all steps; a grid uniform in t would diverge near noise.

An ancestral step from t to r, nearer to data, draws x_r from q(x_r | x_t, x_1) with E[x_1 | x_t] for x_1 (Ho et al. 2020,
arXiv 2006.11239, equations 6, 7 and 11, which count from data to noise and are written for variance-preserving paths):

    a = alpha_t / alpha_r        v = sigma_t^2 - a^2 sigma_r^2                    x_t = a x_r + sqrt(v) z
    mean = (a sigma_r^2 / sigma_t^2) x_t + (alpha_r v / sigma_t^2) E[x_1 | x_t]   variance = v sigma_r^2 / sigma_t^2

    t_0 ---> t_1 ---> t_2 --- ... ---> t_K = 1        each ---> is one evaluation, at its left end, and one draw
    noise                              data           the last step adds no noise where sigma is 0 at t = 1

DDPM's variance is this one (its beta-tilde). The grid is uniform in t, which for the VP path is DDPM's linear schedule of rates.
No step divides by an alpha that is 0, since alpha_r > 0; the network is never evaluated at t = 1.
Shape letters: B batch, K steps.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm.flow.checks import FlowError, check_finite, check_grid, check_mask, check_same_shape
from pi0fm.flow.config import DATA, SCORE, VELOCITY
from pi0fm.flow.conversion import check_conversion, convert
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.path import ProbabilityPath
from pi0fm.flow.solver import Velocity, uniform_grid
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
    """Sample by Euler-Maruyama (order 1 in law) from `prior_scale * noise` to data; one evaluation of the network per step.

    h: a number is a multiple of g_t; a function of t in (0, 1) is h_t itself. Not negative.
    increments: a standard normal number for every step and entry; else they are drawn from `generator`. With h = 0 neither is
        needed, and the result is Euler's on the same grid.
    mask: entries that are False stay 0. times: an increasing grid instead of `sde_grid`.
    Raises ConfigError for a negative h or no source of randomness, FlowError for a bad grid, mask or state.
    """
    grid = list(times) if times is not None else sde_grid(flow, num_flow_steps)
    check_grid(grid)
    levels, field = _levels(flow.path, h, grid), flow.velocity_field(network, mask)

    def mean(k: int, x: Tensor, t_B: Tensor) -> Tensor:
        drift = field(x, t_B)
        if levels[k] > 0:
            # Unchecked: `_levels` has checked this grid, and the state is checked once, after the loop.
            drift = drift + levels[k] ** 2 / 2 * convert(flow.path, drift, x, t_B, VELOCITY, SCORE, check=False)
        return x + (grid[k + 1] - grid[k]) * drift

    deviations = [
        level * math.sqrt(following - t) if level else 0.0 for level, (t, following) in zip(levels, itertools.pairwise(grid), strict=True)
    ]
    return _walk(flow, noise, grid, mean, deviations, generator, increments, mask)


def sample_ancestral(
    flow: FlowMatching,
    network: Velocity,
    noise: Float[Tensor, "B *rest"],
    num_steps: int = 1000,
    *,
    generator: torch.Generator | None = None,
    increments: Float[Tensor, "K B *rest"] | None = None,
    mask: Bool[Tensor, "B *rest"] | None = None,
) -> Float[Tensor, "B *rest"]:
    """Draw `num_steps` times from the posteriors above, from `prior_scale * noise` to data; one evaluation of the network per step.

    network: answers the quantity named by `flow.prediction`; DDPM's answers noise. increments, generator, mask: as in `sample_sde`;
    entries that the mask leaves out change nothing, even where noise or increments are NaN there.
    Raises ConfigError for less than one step or no source of randomness, FlowError for increments, a mask or a state that does
    not fit.
    """
    grid = ancestral_grid(flow, num_steps)
    steps = [posterior(flow.path, t, following) for t, following in itertools.pairwise(grid)]
    check_conversion(flow.path, torch.tensor(grid[:-1], dtype=torch.float64), flow.prediction, DATA)

    def mean(k: int, x: Tensor, t_B: Tensor) -> Tensor:
        answer = network(x, t_B)
        check_same_shape("the network's answer", answer, x)
        # Unchecked: the grid was checked above, and the state is checked once, after the loop.
        x_1 = convert(flow.path, answer.to(x.dtype), x, t_B, flow.prediction, DATA, check=False)
        from_state, from_data, _ = steps[k]
        return from_state * x + from_data * x_1

    return _walk(flow, noise, grid, mean, [variance**0.5 for _, _, variance in steps], generator, increments, mask)


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


def posterior(path: ProbabilityPath, t: float, r: float) -> tuple[float, float, float]:
    """(weight of x_t, weight of x_1, variance) of q(x_r | x_t, x_1), for 0 <= t < r <= 1.

    In float64: v is a difference of nearly equal numbers when steps are many. Raises ConfigError for times in another order.
    """
    if not 0 <= t < r <= 1:
        raise ConfigError(f"an ancestral step runs from noise to data, 0 <= t < r <= 1; found t {t:g} and r {r:g}")
    times = torch.tensor([t, r], dtype=torch.float64)
    alpha_t, alpha_r = path.alpha(times).tolist()
    variance_t, variance_r = path.sigma(times).square().tolist()
    ratio = alpha_t / alpha_r
    # max: sigma only falls, so a v below 0 is rounding.
    added = max(variance_t - ratio**2 * variance_r, 0.0)
    return ratio * variance_r / variance_t, alpha_r * added / variance_t, added * variance_r / variance_t


def ancestral_grid(flow: FlowMatching, num_steps: int) -> list[float]:
    """`num_steps + 1` times from noise to t = 1, uniform in t, as DDPM's.

    The times at which the network is evaluated, all but the last, keep to `flow.interval()`: where that forbids the last of a uniform
    grid (more than 1 / time_margin steps), the others are spread evenly up to its end.
    """
    if num_steps < 1:
        raise ConfigError(f"ancestral sampling needs at least 1 step, found {num_steps}; DDPM uses 1000")
    start, stop = flow.interval()
    if num_steps == 1:
        return [start, 1.0]
    last = min(stop, 1 - (1 - start) / num_steps)
    return [*uniform_grid(num_steps - 1, start, last), 1.0]


def _walk(
    flow: FlowMatching,
    noise: Tensor,
    grid: Sequence[float],
    mean: Callable[[int, Tensor, Tensor], Tensor],
    deviations: Sequence[float],
    generator: torch.Generator | None,
    increments: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Iterate x <- mean(k, x, t) + deviations[k] z over the steps k of the grid, from the prior on."""
    num_steps = len(grid) - 1
    if generator is None and increments is None and any(deviations):
        raise ConfigError("a sampler with noise needs randomness: pass generator=torch.Generator().manual_seed(...) or increments")
    if increments is not None and increments.shape != (num_steps, *noise.shape):
        raise FlowError(f"increments must be of shape {[num_steps, *noise.shape]}, one for every step, found {list(increments.shape)}")
    if mask is not None:
        check_mask(mask, noise)
    real = torch.ones_like(noise, dtype=torch.bool) if mask is None else mask
    x = flow.path.prior_scale * noise.to(torch.promote_types(noise.dtype, torch.float32))
    x = torch.where(real, x, torch.zeros_like(x))
    for k, deviation in enumerate(deviations):
        x = mean(k, x, torch.full((x.shape[0],), grid[k], dtype=x.dtype, device=x.device))
        if deviation > 0:
            z = increments[k].to(x) if increments is not None else _normal_like(x, generator)
            x = x + deviation * z
        x = torch.where(real, x, torch.zeros_like(x))
    check_finite("the sample (or its noise, or the network's answer)", x)
    return x


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal numbers of x's shape and type on the generator's device, and move them to x's."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def _log_ratio(path: ProbabilityPath, t: Tensor) -> Tensor:
    return torch.log(path.alpha(t)) - torch.log(path.sigma(t))


def _levels(path: ProbabilityPath, h: NoiseLevel, grid: Sequence[float]) -> list[float]:
    """h at the start of every step, computed on the CPU so that the loop does not wait for the device."""
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
