"""Solvers of `dx/dt = v(x, t)` on a grid of times.

Owns: Euler, midpoint, Heun and RK4 on any monotone grid, and dopri5 through torchdiffeq; how many evaluations each needs.
Does not know: what v is; whether a state is an action chunk or a chunk with its log-density.

    one step of size dt, from t to t + dt; each * is one evaluation of v
      euler      *                       order 1
      midpoint   *     *                 order 2
      heun       *           *           order 2
      rk4        *    * *    *           order 4

The grid is a list of Python floats, and a time tensor is filled on the device: no loop here waits for the device.
Shape letters: B batch.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm.flow.checks import check_grid, check_same_shape
from pi0fm.flow.config import SOLVERS, STOCHASTIC_SOLVERS
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError


@runtime_checkable
class Velocity(Protocol):
    """Velocity dx/dt of a flow. Its method `at(x, t: float)`, if any, is called where all rows share a time."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor:
        """(x [B, ...], t [B]) -> [B, ...]."""


def evaluate(velocity: Velocity, x: Float[Tensor, "B *rest"], t: float) -> Float[Tensor, "B *rest"]:
    """Evaluate the velocity of every row at one time t. Raises FlowError for an answer of another shape."""
    at = getattr(velocity, "at", None)
    value: Tensor = velocity(x, _filled(t, x)) if at is None else at(x, t)
    check_same_shape("the velocity", value, x)
    return value


def _euler(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    return x + dt * evaluate(velocity, x, t)


def _midpoint(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    half = x + dt / 2 * evaluate(velocity, x, t)
    return x + dt * evaluate(velocity, half, t + dt / 2)


def _heun(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    first = evaluate(velocity, x, t)
    second = evaluate(velocity, x + dt * first, t + dt)
    return x + dt / 2 * (first + second)


def _rk4(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    middle = t + dt / 2
    k1 = evaluate(velocity, x, t)
    k2 = evaluate(velocity, x + dt / 2 * k1, middle)
    k3 = evaluate(velocity, x + dt / 2 * k2, middle)
    k4 = evaluate(velocity, x + dt * k3, t + dt)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


_STEPS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}
_EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def integrate(
    velocity: Velocity, x: Float[Tensor, "B *rest"], times: Sequence[float], solver: str = "euler", tolerance: float = 1e-5
) -> Float[Tensor, "B *rest"]:
    """Integrate `velocity` from x at `times[0]` to the state at `times[-1]`.

    times: strictly increasing or decreasing Python floats in [0, 1]; a decreasing grid integrates backwards.
    solver: one of SOLVERS. dopri5 (Chen et al. 2018, arXiv 1806.07366) chooses its own steps within `tolerance`, relative and
        absolute; the first step that it tries is that of the grid.
    A state of less than 32 bits is integrated in float32: ten steps in bfloat16 would round small ones away.
    Raises ConfigError for an unknown solver, FlowError for a grid that is not monotone and a velocity of another shape.
    """
    check_solver(solver)
    check_grid(times)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if solver == "dopri5":
        return _dopri5(velocity, x, times, tolerance)
    step = _STEPS[solver]
    for t, following in itertools.pairwise(times):
        x = step(velocity, x, t, following - t)
    return x


def uniform_grid(num_steps: int, start: float = 0.0, stop: float = 1.0) -> list[float]:
    """`num_steps + 1` equally spaced times, ends exact. Raises ConfigError for less than one step."""
    if num_steps < 1:
        raise ConfigError(f"a flow needs at least 1 step, found num_flow_steps {num_steps}; pi0 uses 10")
    return [start + (stop - start) * k / num_steps for k in range(num_steps)] + [stop]


def check_solver(solver: str) -> None:
    """Raise ConfigError that names the known solvers when `solver` is not one of them."""
    if solver in STOCHASTIC_SOLVERS:
        raise ConfigError(f"solver {solver!r} draws random numbers and solves no ODE, which is needed here: known: {', '.join(SOLVERS)}")
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}: {nearest(solver, SOLVERS)}")


def num_evaluations(solver: str, num_steps: int) -> int:
    """Number of evaluations by a fixed-grid solver. Raises ConfigError for dopri5, which chooses it: use `CountedVelocity`."""
    check_solver(solver)
    if solver not in _EVALUATIONS:
        raise ConfigError(f"solver {solver!r} chooses its own steps: wrap the velocity in CountedVelocity and read num_evaluations after")
    return _EVALUATIONS[solver] * num_steps


@final
class CountedVelocity:
    """Velocity that counts its evaluations in `num_evaluations`, for adaptive solvers too."""

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity
        self.num_evaluations = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate the velocity at (x, t)."""
        self.num_evaluations += 1
        return self._velocity(x, t)

    def at(self, x: Tensor, t: float) -> Tensor:
        """Evaluate the velocity of every row at one time t."""
        self.num_evaluations += 1
        return evaluate(self._velocity, x, t)


@final
class VelocitySpread:
    """Velocity that accumulates the deviation of its answers from their mean over a trajectory, 0 for a straight one.

    Costs three small operations per evaluation, and no wait for the device. One object serves one trajectory.
    """

    def __init__(self, velocity: Velocity) -> None:
        self._velocity, self._count = velocity, 0
        self._first = self._sum = self._squares = torch.zeros(())

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate the velocity at (x, t)."""
        return self._accumulated(self._velocity(x, t))

    def at(self, x: Tensor, t: float) -> Tensor:
        """Evaluate the velocity of every row at one time t."""
        return self._accumulated(evaluate(self._velocity, x, t))

    def deviation(self, mask: Bool[Tensor, "B *rest"]) -> Float[Tensor, " B"]:
        """Standard deviation over the evaluations, root mean square over the entries of each row whose mask is True."""
        variance = (self._squares - self._sum.square() / self._count) / self._count
        real = torch.where(mask, variance.clamp(min=0.0), torch.zeros_like(variance)).flatten(1).sum(1)
        return (real / mask.flatten(1).sum(1)).sqrt()

    def _accumulated(self, value: Tensor) -> Tensor:
        found = value.detach()  # a guided flow takes a derivative of what is evaluated here
        if not self._count:  # relative to the first answer, so that large answers lose no digits
            self._first, self._sum, self._squares = found, torch.zeros_like(found), torch.zeros_like(found)
        self._count += 1
        away = found - self._first
        self._sum += away
        self._squares.addcmul_(away, away)
        return value


def _filled(t: float, x: Tensor) -> Tensor:
    """Fill a tensor [B] with the time t on the device, without a copy from the host."""
    return torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)


def _dopri5(velocity: Velocity, x: Tensor, times: Sequence[float], tolerance: float) -> Tensor:
    from torchdiffeq import odeint  # it imports scipy, a second that no other solver should pay

    ends = torch.tensor([times[0], times[-1]], dtype=torch.float64, device=x.device)
    # step_t: without it the last step runs past the end and is interpolated back, and the network would see t > 1.
    options = {"first_step": abs(times[1] - times[0]), "dtype": torch.float64, "step_t": ends[1:]}

    def field(t: Tensor, state: Tensor) -> Tensor:
        value = velocity(state, t.to(state.dtype).expand(state.shape[0]))
        check_same_shape("the velocity", value, state)
        return value

    solution: Tensor = odeint(field, x, ends, rtol=tolerance, atol=tolerance, method="dopri5", options=options)
    return solution[-1]
