"""Velocity, score, noise and data: four equivalent quantities at (x_t, t).

Owns: the conversions between them, and where they divide by 0. Does not know: networks, solvers, where t comes from.

Noise and data mean E[x_0 | x_t] and E[x_1 | x_t]. All four are linear in these two, and two of them fix the rest:

    x_t = alpha x_1 + sigma x_0      velocity = alpha' x_1 + sigma' x_0      score = grad log p_t = -x_0 / sigma

(Song et al. 2021, arXiv 2011.13456; Lipman et al. 2022, arXiv 2210.02747.) For CondOT `score = (t u - x) / (1 - t)`.

    division by alpha   noise, score -> velocity, data        not at t = 0 for CondOT and cosine
    division by sigma   data -> any, any -> score             not at t = 1 for CondOT, cosine and VP
    infinite sigma'     velocity <-> any                      not at t = 1 for VP

Shape letters: B batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow.checks import FlowError, check_batch, check_finite, check_same_shape, check_times
from pi0fm.flow.config import DATA, NOISE, QUANTITIES, SCORE, VELOCITY
from pi0fm.flow.path import ProbabilityPath, expand
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError


def convert(
    path: ProbabilityPath,
    value: Float[Tensor, "B *rest"],
    x_t: Float[Tensor, "B *rest"],
    t: Float[Tensor, " B"],
    given: str,
    wanted: str,
    *,
    check: bool = True,
) -> Float[Tensor, "B *rest"]:
    """Convert `value`, the quantity `given` at (x_t, t), to the quantity `wanted`; both are words of QUANTITIES.

    check: check the values of t and of both tensors first, which waits for the device. Samplers pass False and check
        their grid of Python floats instead.
    Raises FlowError where the conversion divides by an alpha or sigma that is 0, for t outside [0, 1] and for states
    that are not finite; ConfigError for an unknown quantity.
    """
    for word in (given, wanted):
        if word not in QUANTITIES:
            raise ConfigError(f"unknown quantity {word!r}: {nearest(word, QUANTITIES)}")
    check_same_shape(given, value, x_t)
    check_batch(t, x_t)
    if check:
        check_times(t)
        check_finite("x_t", x_t)
        check_finite(given, value)
        check_conversion(path, t, given, wanted)
    if given == wanted:
        return value
    x_0, x_1 = _noise_and_data(path, value, x_t, t, given)
    if wanted == NOISE:
        return x_0
    if wanted == DATA:
        return x_1
    if wanted == SCORE:
        return -x_0 / expand(path.sigma(t), x_0)
    return expand(path.alpha_prime(t), x_t) * x_1 + expand(path.sigma_prime(t), x_t) * x_0


def check_conversion(path: ProbabilityPath, t: Float[Tensor, "..."], given: str, wanted: str) -> None:
    """Raise FlowError when `convert` would divide by 0, or meet an infinite derivative, at one of the times.

    Reads values: free for a CPU tensor made from a time grid, a wait for the device otherwise.
    """
    if given == wanted:
        return
    alpha, sigma, name = path.alpha(t), path.sigma(t), type(path).__name__
    if given in (NOISE, SCORE) and wanted in (VELOCITY, DATA) and bool((alpha == 0).any()):
        raise FlowError(f"{given} says nothing about {wanted} where alpha is 0: the path {name} needs t > 0 here, found t = 0")
    if (given == DATA or wanted == SCORE) and bool((sigma == 0).any()):
        raise FlowError(f"{wanted} does not follow from {given} where sigma is 0: the path {name} needs t < 1 here, found t = 1")
    if VELOCITY in (given, wanted) and not bool(torch.isfinite(path.sigma_prime(t)).all()):
        raise FlowError(f"the path {name} has no finite velocity where sigma is 0: it needs t < 1 here, found t = 1")


def _noise_and_data(path: ProbabilityPath, value: Tensor, x_t: Tensor, t: Tensor, given: str) -> tuple[Tensor, Tensor]:
    """(E[x_0 | x_t], E[x_1 | x_t]) from the two linear equations; the unused one may be non-finite."""
    alpha, sigma = expand(path.alpha(t), x_t), expand(path.sigma(t), x_t)
    if given == VELOCITY:
        alpha_prime, sigma_prime = expand(path.alpha_prime(t), x_t), expand(path.sigma_prime(t), x_t)
        determinant = sigma * alpha_prime - alpha * sigma_prime
        return (alpha_prime * x_t - alpha * value) / determinant, (sigma * value - sigma_prime * x_t) / determinant
    if given == DATA:
        return (x_t - alpha * value) / sigma, value
    x_0 = -sigma * value if given == SCORE else value
    return x_0, (x_t - sigma * x_0) / alpha
