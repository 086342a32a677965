"""Ancestral sampling: DDPM's sampler, for any Gaussian path.

Owns: the posterior of one step, the time grid, the loop. Does not know: networks, robots, the family of SDEs (sde.py).

A step from t to r, nearer to data, draws x_r from q(x_r | x_t, x_1) with E[x_1 | x_t] in the place of x_1 (Ho et al. 2020,
arXiv 2006.11239, equations 6, 7 and 11, which count from data to noise and are written for variance-preserving paths):

    a = alpha_t / alpha_r        v = sigma_t^2 - a^2 sigma_r^2                    x_t = a x_r + sqrt(v) z
    mean = (a sigma_r^2 / sigma_t^2) x_t + (alpha_r v / sigma_t^2) E[x_1 | x_t]   variance = v sigma_r^2 / sigma_t^2

    t_0 ---> t_1 ---> t_2 --- ... ---> t_K = 1        each ---> is one evaluation, at its left end, and one draw
    noise                              data           the last step adds no noise where sigma is 0 at t = 1

DDPM's variance is this one (its beta-tilde). The grid is uniform in t, which for the VP path is DDPM's linear schedule of rates.
No step divides by an alpha that is 0, since alpha_r > 0; the network is never asked at t = 1.
Shape letters: B batch, K steps.
"""

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm.flow.checks import check_finite, check_mask, check_same_shape
from pi0fm.flow.conversion import DATA, check_conversion, convert
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.path import ProbabilityPath
from pi0fm.flow.sde import check_increments, normal_like
from pi0fm.flow.solver import Velocity, uniform_grid
from pi0fm_client.errors import ConfigError


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
    """`num_steps` draws from the posteriors above, from `prior_scale * noise` to data; one evaluation of the network a step.

    network: answers the quantity named by `flow.prediction`; DDPM's answers noise.
    increments: a standard normal number for every step and entry; else they are drawn from `generator`.
    mask: entries that are False stay 0 and change nothing, even where noise or increments are NaN there.
    Raises ConfigError for less than one step or no source of randomness, FlowError for increments, a mask or a state that does
    not fit.
    """
    grid = ancestral_grid(flow, num_steps)
    steps = [posterior(flow.path, t, following) for t, following in itertools.pairwise(grid)]
    if generator is None and increments is None and any(variance > 0 for _, _, variance in steps):
        raise ConfigError("ancestral sampling needs randomness: pass generator=torch.Generator().manual_seed(...) or increments")
    if increments is not None:
        check_increments(increments, num_steps, noise)
    if mask is not None:
        check_mask(mask, noise)
    check_conversion(flow.path, torch.tensor(grid[:-1], dtype=torch.float64), flow.prediction, DATA)
    real = torch.ones_like(noise, dtype=torch.bool) if mask is None else mask
    x = flow.path.prior_scale * noise.to(torch.promote_types(noise.dtype, torch.float32))
    x = torch.where(real, x, torch.zeros_like(x))
    for k, (from_state, from_data, variance) in enumerate(steps):
        t_B = torch.full((x.shape[0],), grid[k], dtype=x.dtype, device=x.device)
        answer = network(x, t_B)
        check_same_shape("the network's answer", answer, x)
        # Unchecked: the grid was looked at above, and the state is looked at once, after the loop.
        x_1 = convert(flow.path, answer.to(x.dtype), x, t_B, flow.prediction, DATA, check=False)
        x = from_state * x + from_data * x_1
        if variance > 0:
            z = increments[k].to(x) if increments is not None else normal_like(x, generator)
            x = x + variance**0.5 * z
        x = torch.where(real, x, torch.zeros_like(x))
    check_finite("the sample (or its noise, or the network's answer)", x)
    return x


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

    The times at which the network is asked, all but the last, keep to `flow.interval()`: where that forbids the last of a uniform
    grid (more than 1 / time_margin steps), the others are spread evenly up to its end.
    """
    if num_steps < 1:
        raise ConfigError(f"ancestral sampling needs at least 1 step, found {num_steps}; DDPM uses 1000")
    start, stop = flow.interval()
    if num_steps == 1:
        return [start, 1.0]
    last = min(stop, 1 - (1 - start) / num_steps)
    return [*uniform_grid(num_steps - 1, start, last), 1.0]
