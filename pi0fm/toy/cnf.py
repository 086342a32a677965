"""The first ancestor: a continuous normalising flow trained by maximum likelihood, through the ODE.

Owns: the negative log-likelihood of a batch and its gradient by the adjoint method. Does not know: data sets, optimisers.

Chen et al. 2018 (arXiv 1806.07366); the exact divergence instead of FFJORD's estimate (arXiv 1810.01367), which two dimensions allow:

    data x_1 ---- integrate (x, l) from t = 1 to 0 ----> noise x_0, l = - int_0^1 div v dt       log p_1 = log N(x_0; 0, I) + l
                  d/dt x = v      d/dt l = div v
    gradient  <-- integrate (x, l, a, dL/dtheta) from t = 0 to 1 <--                             torchdiffeq's odeint_adjoint

Every step of training solves two ODEs. Flow matching solves none: that is what the comparison measures.
Shape letters: B batch.
"""

from typing import final, override

from jaxtyping import Float
from torch import Tensor, nn

from pi0fm.flow.likelihood import gaussian_log_prob
from pi0fm.options import nearest
from pi0fm.toy.network import PlaneField
from pi0fm_client.errors import ConfigError

SOLVERS = ("euler", "midpoint", "rk4", "dopri5")
"""torchdiffeq's names; its rk4 is the 3/8 rule, of order 4 too."""


def negative_log_likelihood(
    field: PlaneField,
    x_1: Float[Tensor, "B 2"],
    solver: str = "rk4",
    num_steps: int = 4,
    *,
    tolerance: float = 1e-3,
    adjoint: bool = True,
) -> Float[Tensor, ""]:
    """Mean of -log p_1(x_1) in nats, with a gradient by the weights of `field` and by x_1.

    num_steps: of a fixed-grid solver, forwards and in the adjoint alike. tolerance: dopri5's, relative and absolute.
    adjoint: True solves a second ODE for the gradient, with memory that does not grow with the steps; False differentiates the
        solver's own operations. The two gradients agree to the order of the solver.
    Raises ConfigError for an unknown solver or less than one step.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver of the CNF {solver!r}: {nearest(solver, SOLVERS)}")
    if num_steps < 1:
        raise ConfigError(f"a CNF needs at least 1 step, found {num_steps}; try 4")
    from torchdiffeq import odeint, odeint_adjoint  # it imports scipy, a second that no other method should pay

    integrate = odeint_adjoint if adjoint else odeint
    options = {} if solver == "dopri5" else {"step_size": 1 / num_steps}
    times = x_1.new_tensor([1.0, 0.0])
    state = (x_1, x_1.new_zeros(len(x_1)))
    x_0, integral = integrate(_Joint(field), state, times, rtol=tolerance, atol=tolerance, method=solver, options=options)
    # Runs from data to noise, so the last state holds minus the integral of the formula.
    return -(gaussian_log_prob(x_0[-1], 1.0) + integral[-1]).mean()


@final
class _Joint(nn.Module):
    """(v, div v) of a state beside its log-density. A module, since the adjoint looks for parameters."""

    def __init__(self, field: PlaneField) -> None:
        super().__init__()
        self.field = field

    @override
    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        return self.field.value_and_divergence(x, t.expand(len(x)))
