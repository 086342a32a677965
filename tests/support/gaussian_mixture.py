"""Gaussian mixtures, whose flow is known in closed form, and signs that estimate a divergence.

Owns: the marginal density, velocity and score of a mixture along any path. Does not know: networks, solvers.
Every solver, sampler and density of pi0fm.flow is measured against it.

For data N(m, s^2 I): `Var_t = sigma^2 + alpha^2 s^2`, p_t = N(alpha m, Var_t I), and

    u_t(x) = alpha' m + ((sigma sigma' + alpha alpha' s^2) / Var_t) (x - alpha m)
    score  = -(x - alpha m) / Var_t

A mixture is the posterior-weighted sum over its components (arXiv 2210.02747, equation 8).
Shape letters: B batch, M components.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow.path import ProbabilityPath
from pi0fm_client.errors import ConfigError


@final
@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Components N(means[k], scale^2 I) with the given weights, which sum to 1."""

    means: Float[Tensor, "M *rest"]
    weights: Float[Tensor, " M"]
    scale: float

    def __post_init__(self) -> None:
        total = float(self.weights.sum())
        if self.means.shape[:1] != self.weights.shape or not math.isclose(total, 1, abs_tol=1e-6) or self.scale <= 0:
            raise ConfigError(
                f"a mixture needs one weight a mean, weights that sum to 1 and scale > 0; found sum {total:g}, scale {self.scale}"
            )

    def sample(self, num: int, generator: torch.Generator) -> Float[Tensor, "B *rest"]:
        """`num` independent points."""
        which = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        chosen = self.means[which]
        return chosen + self.scale * torch.randn(chosen.shape, generator=generator, dtype=chosen.dtype)

    def log_prob(self, path: ProbabilityPath, x: Float[Tensor, "B *rest"], t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """log p_t(x), nats."""
        return torch.logsumexp(self._joint(path, x, t), dim=1)

    def score(self, path: ProbabilityPath, x: Float[Tensor, "B *rest"], t: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
        """grad log p_t(x)."""
        variance = self._variance(path, t)[:, None, None]
        return self._posterior_mean(path, x, t, -self._offsets(path, x, t) / variance)

    def velocity(self, path: ProbabilityPath, x: Float[Tensor, "B *rest"], t: Float[Tensor, " B"]) -> Float[Tensor, "B *rest"]:
        """u_t(x), the minimiser of the flow-matching loss on this data."""
        sigma, sigma_prime = path.sigma(t), path.sigma_prime(t)
        alpha, alpha_prime = path.alpha(t), path.alpha_prime(t)
        # Where sigma' is infinite (VP at t = 1), sigma sigma' has the limit that lam gives.
        product = torch.where(torch.isfinite(sigma_prime), sigma * sigma_prime, sigma**2 * alpha_prime / alpha - path.lam(t))
        rate = (product + alpha * alpha_prime * self.scale**2) / self._variance(path, t)
        drift = alpha_prime[:, None, None] * self.means.flatten(1)
        return self._posterior_mean(path, x, t, drift + rate[:, None, None] * self._offsets(path, x, t))

    def _variance(self, path: ProbabilityPath, t: Tensor) -> Tensor:
        return path.sigma(t) ** 2 + path.alpha(t) ** 2 * self.scale**2

    def _offsets(self, path: ProbabilityPath, x: Tensor, t: Tensor) -> Tensor:
        """x - alpha m_k, [B, M, D]."""
        return x.flatten(1)[:, None] - path.alpha(t)[:, None, None] * self.means.flatten(1)

    def _joint(self, path: ProbabilityPath, x: Tensor, t: Tensor) -> Tensor:
        """log (weight_k N(x; alpha m_k, Var_t I)), [B, M]."""
        offsets, variance = self._offsets(path, x, t), self._variance(path, t)[:, None]
        width = offsets.shape[-1]
        return torch.log(self.weights) - offsets.square().sum(-1) / (2 * variance) - width / 2 * torch.log(2 * math.pi * variance)

    def _posterior_mean(self, path: ProbabilityPath, x: Tensor, t: Tensor, each: Tensor) -> Tensor:
        posterior = torch.softmax(self._joint(path, x, t), dim=1)
        return (posterior[..., None] * each).sum(1).reshape(x.shape)


def rademacher_probes(num: int, like: Float[Tensor, "B *rest"], seed: int) -> Float[Tensor, "n B *rest"]:
    """`num` probes of +1 and -1 for every state of `like`."""
    bits = torch.randint(0, 2, (num, *like.shape), generator=torch.Generator().manual_seed(seed))
    return (2 * bits - 1).to(torch.promote_types(like.dtype, torch.float32))
