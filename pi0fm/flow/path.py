"""Probability paths: how noise becomes data while t runs from 0 to 1.

Owns: `alpha_t`, `sigma_t`, their derivatives, the interpolation and its velocity; no other file interpolates.
Does not know: networks, time densities, solvers; conversion.py makes scores, noise and data from velocities.

    t = 0  noise x_0 ~ N(0, I)  ------------------------------>  t = 1  data x_1
                       x_t = alpha_t x_1 + sigma_t x_0

Lipman et al. 2022 (arXiv 2210.02747) for the paths; Song et al. 2021 (arXiv 2011.13456) for the two diffusions and for g.
Shape letters: B batch. A time tensor is [B]; a state is [B, ...].
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final, override

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow.checks import check_batch, check_same_shape
from pi0fm.flow.config import PATHS
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError


class ProbabilityPath(ABC):
    """Gaussian path `x_t = alpha_t x_1 + sigma_t x_0`; alpha rises, sigma falls."""

    @property
    @abstractmethod
    def prior_scale(self) -> float:
        """Standard deviation of the state that a sampler starts from at t = 0."""

    @abstractmethod
    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Weight of the data at t in [0, 1], elementwise."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Weight of the noise at t in [0, 1], elementwise."""

    @abstractmethod
    def alpha_prime(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """d alpha / dt, elementwise."""

    @abstractmethod
    def sigma_prime(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """d sigma / dt, elementwise."""

    @abstractmethod
    def lam(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`lam_t = sigma^2 alpha'/alpha - sigma sigma' = g_t^2 / 2`: half the squared diffusion of the SDE with these marginals.

        Infinite where alpha is 0. In closed form for each path, since the general formula is 0 times infinity at some ends.
        """

    @abstractmethod
    def likelihood_integral(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`int_0^t ds / lam_s`, the unnormalised CDF of the maximum-likelihood time density (Song et al. 2021, arXiv 2101.09258)."""

    @final
    def diffusion(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`g_t = sqrt(2 lam_t)`: the diffusion of the SDE whose marginals are p_t (arXiv 2011.13456)."""
        return torch.sqrt(2 * self.lam(t))

    @final
    def sample(self, x_0: Float[Tensor, "B *rest"], x_1: Float[Tensor, "B *rest"], t: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
        """`x_t = alpha_t x_1 + sigma_t x_0`. Values are not checked: this is the training step."""
        check_same_shape("x_0", x_0, x_1)
        check_batch(t, x_1)
        return expand(self.alpha(t), x_1) * x_1 + expand(self.sigma(t), x_0) * x_0

    @final
    def conditional_velocity(
        self, x_0: Float[Tensor, "B *rest"], x_1: Float[Tensor, "B *rest"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B *rest"]:
        """`u_t(x_t | x_1) = alpha' x_1 + sigma' x_0`, the target of flow matching (arXiv 2210.02747, Theorem 3).

        CondOT: x_1 - x_0 at every t. Values are not checked: this is the training step. VP's sigma' is infinite at t = 1.
        """
        check_same_shape("x_0", x_0, x_1)
        check_batch(t, x_1)
        return expand(self.alpha_prime(t), x_1) * x_1 + expand(self.sigma_prime(t), x_0) * x_0


@final
@dataclass(frozen=True)
class CondOT(ProbabilityPath):
    """pi0's path (arXiv 2410.24164): `alpha = t`, `sigma = 1 - t`; the conditional velocity is constant in t."""

    @property
    @override
    def prior_scale(self) -> float:
        return 1.0

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return t

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    @override
    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @override
    def sigma_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    @override
    def lam(self, t: Tensor) -> Tensor:
        return (1 - t) / t

    @override
    def likelihood_integral(self, t: Tensor) -> Tensor:
        return -t - torch.log1p(-t)


@final
@dataclass(frozen=True)
class Cosine(ProbabilityPath):
    """`alpha = sin(pi t / 2)`, `sigma = cos(pi t / 2)`: variance preserving."""

    @property
    @override
    def prior_scale(self) -> float:
        return 1.0

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        # sin of the remaining time, not cos: exactly 0 at t = 1, where cos(pi / 2) is 6e-17 and hides the singularity.
        return torch.sin(math.pi / 2 * (1 - t))

    @override
    def alpha_prime(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma(t)

    @override
    def sigma_prime(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)

    @override
    def lam(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma(t) / self.alpha(t)

    @override
    def likelihood_integral(self, t: Tensor) -> Tensor:
        # By alpha in the first half: near t = 0 sigma rounds to 1, and its logarithm has no digit left.
        early = torch.log1p(-(self.alpha(t.clamp(max=0.5)) ** 2)) / 2
        return -4 / math.pi**2 * torch.where(t < 0.5, early, torch.log(self.sigma(t)))


@final
@dataclass(frozen=True)
class VPDiffusion(ProbabilityPath):
    """DDPM's path: `alpha = exp(-B(1 - t) / 2)`, `B(s) = b_min s + (b_max - b_min) s^2 / 2`, `sigma = sqrt(1 - alpha^2)`.

    alpha at t = 0 is 0.0066 with the default rates, not 0: the start N(0, I) is an approximation of p_0, as in DDPM.
    """

    b_min: float = 0.1
    b_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.b_min < self.b_max < math.inf:
            raise ConfigError(f"the path 'vp' needs 0 < b_min < b_max, found {self.b_min} and {self.b_max}; DDPM's are 0.1 and 20")

    @property
    @override
    def prior_scale(self) -> float:
        return 1.0

    def _rate(self, t: Tensor) -> Tensor:
        """b(s) = dB / ds at s = 1 - t."""
        return self.b_min + (self.b_max - self.b_min) * (1 - t)

    def _integrated_rate(self, t: Tensor) -> Tensor:
        """B(s) at s = 1 - t."""
        return self.b_min * (1 - t) + (self.b_max - self.b_min) * (1 - t) ** 2 / 2

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._integrated_rate(t) / 2)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integrated_rate(t)))

    @override
    def alpha_prime(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self._rate(t) / 2

    @override
    def sigma_prime(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_prime(t) / self.sigma(t)

    @override
    def lam(self, t: Tensor) -> Tensor:
        return self._rate(t) / 2

    @override
    def likelihood_integral(self, t: Tensor) -> Tensor:
        return 2 / (self.b_max - self.b_min) * torch.log(self.b_max / self._rate(t))


@final
@dataclass(frozen=True)
class VE(ProbabilityPath):
    """`alpha = 1`, `sigma = s_min (s_max / s_min)^(1 - t)`; the sampler starts from N(0, s_max^2 I).

    s_max should be about the largest distance between two normalised chunks; s_min is the noise that samples keep.
    """

    s_min: float = 0.01
    s_max: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.s_min < self.s_max < math.inf:
            raise ConfigError(f"the path 've' needs 0 < s_min < s_max, found {self.s_min} and {self.s_max}; try 0.01 and 10")

    @property
    @override
    def prior_scale(self) -> float:
        return self.s_max

    @property
    def _log_ratio(self) -> float:
        return math.log(self.s_max / self.s_min)

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return self.s_min * torch.exp(self._log_ratio * (1 - t))

    @override
    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @override
    def sigma_prime(self, t: Tensor) -> Tensor:
        return -self._log_ratio * self.sigma(t)

    @override
    def lam(self, t: Tensor) -> Tensor:
        return self._log_ratio * self.sigma(t) ** 2

    @override
    def likelihood_integral(self, t: Tensor) -> Tensor:
        return (self.sigma(t) ** -2 - self.s_max**-2) / (2 * self._log_ratio**2)


_PATHS: dict[str, type[ProbabilityPath]] = {"cond_ot": CondOT, "cosine": Cosine, "vp": VPDiffusion, "ve": VE}


def path_named(name: str) -> ProbabilityPath:
    """Make the path with its default constants. Raises ConfigError that names the known ones: cond_ot, cosine, vp, ve."""
    if name not in _PATHS:
        raise ConfigError(f"unknown probability path {name!r}: {nearest(name, PATHS)}")
    return _PATHS[name]()


def expand(t: Float[Tensor, " B"], x: Float[Tensor, "B *rest"]) -> Float[Tensor, "B *ones"]:
    """Reshape [B] to [B, 1, ...] with as many axes as x, so that it multiplies a state."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))
