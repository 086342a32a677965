r"""Guidance of a flow towards the remainder of an earlier chunk: real-time chunking at inference.

Owns: the weight of each held row, the guided velocity. Does not know: robots, control steps, where the remainder comes from.

    rows of the new chunk   0 .. d-1 | d .. H-s-1 | H-s .. H-1      d = inference_delay, s = execution_horizon, d <= H - s
    weight W                    1    |  1 .. 0    |     0

    x1_hat   = x_t + (1 - t) v(x_t, t)                                    the chunk that v points at
    v_guided = v + min(beta, (1 - t) / (t r^2)) J^T (W (Y - x1_hat))      r^2 = (1 - t)^2 / (t^2 + (1 - t)^2),  J = d x1_hat / d x_t

Black, Galliker, Levine 2025 (arXiv 2506.07339); the coefficient is that of Song et al. 2023, pseudo-inverse guidance. It belongs to the
path x_t = t x_1 + (1 - t) x_0 and to a velocity. Without the Jacobian J is the identity: no backward pass, less exact guidance.
Shape letters: B batch, H action horizon, A action dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow.checks import FlowError, check_same_shape
from pi0fm.flow.config import VELOCITY
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.path import CondOT
from pi0fm.flow.solver import Velocity, evaluate

BETA = 5.0


def hold_weights(horizon: int, inference_delay: int, execution_horizon: int, rows: int | None = None) -> Float[Tensor, " H"]:
    """Weights W of a chunk's rows: 1 while the old chunk is still executed, then falling, 0 beyond the remainder.

    rows: length of the remainder; H - execution_horizon by default. For d <= i < H - s with c = (H - s - i) / (H - s - d + 1) the weight
    is c (e^c - 1) / (e - 1). Raises FlowError unless 0 <= inference_delay <= horizon - execution_horizon.
    """
    end = horizon - execution_horizon
    if not 0 <= inference_delay <= end:
        raise FlowError(
            f"a delay must lie in [0, horizon - execution_horizon], here [0, {end}], found {inference_delay}; execute fewer actions"
        )
    weights = torch.zeros(horizon)
    weights[:inference_delay] = 1.0
    c = torch.arange(end - inference_delay, 0, -1) / (end - inference_delay + 1)
    weights[inference_delay:end] = c * torch.expm1(c) / math.expm1(1.0)
    if rows is not None:
        weights[rows:] = 0.0
    return weights


@final
@dataclass(frozen=True)
class GuidedVelocity:
    """`Velocity` guided towards `target` where `weights` are above 0; equal to `velocity` bit for bit where all are 0.

    weights: in [0, 1], one per entry, so that padded dimensions can be excluded. beta: the largest coefficient.
    jacobian: multiply by J^T, one backward pass through the velocity per step; it must then be differentiable, outside inference mode.
    """

    velocity: Velocity
    target: Float[Tensor, "B H A"]
    weights: Float[Tensor, "B H A"]
    beta: float = BETA
    jacobian: bool = True

    def __post_init__(self) -> None:
        check_same_shape("the weights of a guided flow", self.weights, self.target)
        if not self.beta > 0:
            raise FlowError(f"beta must be above 0, found {self.beta}; {BETA:g} is usual")

    def __call__(self, x: Float[Tensor, "B H A"], t: Float[Tensor, " B"]) -> Float[Tensor, "B H A"]:
        """Evaluate the guided velocity, each row of the batch at its own time."""
        return self._guided(x, t[:, None, None], _coefficient(t, self.beta)[:, None, None], lambda x: self.velocity(x, t))

    def at(self, x: Float[Tensor, "B H A"], t: float) -> Float[Tensor, "B H A"]:
        """Evaluate the guided velocity, all rows at one time."""
        coefficient = _coefficient(torch.tensor(t, dtype=torch.float64), self.beta).item()
        return self._guided(x, t, coefficient, lambda x: evaluate(self.velocity, x, t))

    def _guided(self, x: Tensor, t: float | Tensor, coefficient: float | Tensor, velocity: Callable[[Tensor], Tensor]) -> Tensor:
        check_same_shape("the target of a guided flow", self.target, x)
        if not self.jacobian:
            v = velocity(x)
            return v + coefficient * self._pull(x, t, v)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x)
            (pull,) = torch.autograd.grad(x + (1 - t) * v, x, self._pull(x, t, v).detach())
        return v.detach() + coefficient * pull

    def _pull(self, x: Tensor, t: float | Tensor, v: Tensor) -> Tensor:
        return self.weights * (self.target - (x + (1 - t) * v))


def refuse_guidance(flow: FlowMatching) -> None:
    """Raise FlowError for a flow to which the coefficient does not apply."""
    if not isinstance(flow.path, CondOT) or flow.prediction != VELOCITY:
        raise FlowError(
            f"a guided chunk needs the path cond_ot and a network that answers velocities, found {type(flow.path).__name__} and "
            f"{flow.prediction}; ask for whole chunks"
        )


def _coefficient(t: Tensor, beta: float) -> Tensor:
    """min(beta, (t^2 + (1 - t)^2) / (t (1 - t))), beta at both ends."""
    denominator = t * (1 - t)
    return torch.where(denominator > 0, (t * t + (1 - t) ** 2) / denominator.clamp_min(1e-30), beta).clamp_max(beta)
