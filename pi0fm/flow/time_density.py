r"""Time densities: at which t in [0, 1] a flow is trained.

Owns: the inverse distribution function of each density, and its logarithm. Does not know: where uniform numbers come from.
A density is an inverse CDF because every random number in pi0fm is a function of (seed, epoch, sample, draw): t is then a
function of one uniform number, whatever the number of workers.

    density of t, by name          t = 0 noise                              t = 1 data
      uniform                      1 ------------------------------------------- 1
      pi0                          1.5 \_____ falls like sqrt(1 - t) ____________ 0
      logit_normal(mu, s)          0 ________/ a hump at sigmoid(mu) \__________ 0
      likelihood                   0 ________ rises like t / (1 - t) __________ / cut at 1 - eps
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final, override

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow.config import DENSITIES, refuse_logit_normal
from pi0fm.flow.path import CondOT, ProbabilityPath
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError


class TimeDensity(ABC):
    """Density of t on [0, 1], where 0 is noise and 1 is data."""

    @abstractmethod
    def quantile(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """t with `P(T <= t) = u`, elementwise and increasing; u in [0, 1)."""

    @abstractmethod
    def log_density(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Logarithm of the density at t, elementwise; -inf outside the support."""


@final
@dataclass(frozen=True)
class Uniform(TimeDensity):
    """Uniform density."""

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return u

    @override
    def log_density(self, t: Tensor) -> Tensor:
        return _within(torch.zeros_like(t), t, 0.0, 1.0)


@final
@dataclass(frozen=True)
class Pi0Density(TimeDensity):
    """pi0's density (arXiv 2410.24164, appendix B): `t' ~ 0.999 Beta(1.5, 1) + 0.001` on the noise clock, `t = 1 - t'`.

    Beta(1.5, 1) has the CDF x^1.5, so `t = 0.999 (1 - (1 - u)^(2/3))`. Stresses noise; t never passes 0.999.
    """

    span: float = 0.999

    @override
    def quantile(self, u: Tensor) -> Tensor:
        # expm1 and log1p keep the small t that 1 - (1 - u)^(2/3) would round away in float32.
        return -self.span * torch.expm1(torch.log1p(-u) * (2 / 3))

    @override
    def log_density(self, t: Tensor) -> Tensor:
        inside = torch.log1p(-t.clamp(0.0, self.span) / self.span) / 2 + math.log(1.5 / self.span)
        return _within(inside, t, 0.0, self.span)


@final
@dataclass(frozen=True)
class LogitNormal(TimeDensity):
    """`t = sigmoid(mu + s z)`, z ~ N(0, 1): stresses the middle; mu > 0 leans to data."""

    mu: float = 0.0
    s: float = 1.0

    def __post_init__(self) -> None:
        refuse_logit_normal(self.mu, self.s)

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mu + self.s * torch.special.ndtri(u))

    @override
    def log_density(self, t: Tensor) -> Tensor:
        logit = torch.logit(t)
        normal = -((logit - self.mu) ** 2) / (2 * self.s**2) - math.log(self.s * math.sqrt(2 * math.pi))
        # At the two ends logit is infinite and the sum below is inf - inf; the density there is 0.
        return _within(torch.nan_to_num(normal - torch.log(t) - torch.log1p(-t), nan=-math.inf), t, 0.0, 1.0)


@final
@dataclass(frozen=True)
class Likelihood(TimeDensity):
    """Density proportional to `1 / lam_t` on [0, 1 - eps]: drawing t from it makes the plain loss the likelihood bound.

    `KL(data | model) <= int (1 / lam_t) E || v - u ||^2 dt` (Song et al. 2021, arXiv 2101.09258, Theorem 1, written for
    velocities). CondOT: t / (1 - t), which has no finite integral up to 1, hence eps.
    """

    eps: float = 1e-3
    path: ProbabilityPath = field(default_factory=CondOT)

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ConfigError(f"the likelihood density is cut at t = 1 - eps with 0 < eps < 1, found eps {self.eps}; try 0.001")

    @override
    def quantile(self, u: Tensor) -> Tensor:
        """Invert the closed-form CDF by a fixed number of bisections, so that no value is read from the device."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        target = u * self._total(u)
        low, high = torch.zeros_like(u), torch.full_like(u, 1 - self.eps)
        for _ in range(54 if u.dtype == torch.float64 else 26):
            middle = (low + high) / 2
            below = self.path.likelihood_integral(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    @override
    def log_density(self, t: Tensor) -> Tensor:
        inside = -torch.log(self.path.lam(t.clamp(0.0, 1 - self.eps))) - torch.log(self._total(t))
        return _within(inside, t, 0.0, 1 - self.eps)

    def _total(self, like: Tensor) -> Tensor:
        return self.path.likelihood_integral(torch.full((), 1 - self.eps, dtype=like.dtype, device=like.device))


def density_named(name: str, path: ProbabilityPath | None = None, eps: float = 1e-3, mu: float = 0.0, s: float = 1.0) -> TimeDensity:
    """Make the time density of that name; `path` (CondOT by default) and `eps` shape `likelihood` only, `mu` and `s` `logit_normal` only.

    Raises ConfigError that names the known ones: uniform, pi0, logit_normal, likelihood.
    """
    if name == "uniform":
        return Uniform()
    if name == "pi0":
        return Pi0Density()
    if name == "logit_normal":
        return LogitNormal(mu, s)
    if name == "likelihood":
        return Likelihood(eps, path or CondOT())
    raise ConfigError(f"unknown time density {name!r}: {nearest(name, DENSITIES)}")


def _within(value: Tensor, t: Tensor, low: float, high: float) -> Tensor:
    return torch.where((t >= low) & (t <= high), value, torch.full_like(value, -math.inf))
