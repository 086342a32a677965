"""Three ways to train one network of the plane: flow matching and its two ancestors.

Owns: the network, its divergence, the loss of each method. Does not know: the training loop, figures.

    method         loss of a step                                        ODEs per step        the network predicts
    flow_matching  || v(x_t, t) - u_t(x_t | x_1) ||^2 (arXiv 2210.02747)  none                 `prediction`
    cnf            - log p_1(x_1) (arXiv 1806.07366)                      two                  velocity
    diffusion      || e(x_t, t) - x_0 ||^2 on the VP path (2006.11239)    none                 noise

A trained method is a `FlowMatching` with a network: the same code samples and computes densities for all three.
Shape letters: B batch.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, final, override

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import gaussian_log_prob
from pi0fm.flow.matching import FlowMatching

WIDTH, LAYERS, FREQUENCIES = 64, 3, 3
FIRST_SCALE = 6.0
FLOW_MATCHING, CNF, DIFFUSION = "flow_matching", "cnf", "diffusion"
CNF_SOLVER, CNF_STEPS = "rk4", 3
"""Solver of the CNF's training: the cheapest whose errors the CNF does not learn to exploit. With midpoint and 4 steps a fine grid gives an
NLL 0.3 nats above the training's. torchdiffeq's rk4 is the 3/8 rule."""


@final
class PlaneField(nn.Module):
    """v(x, t) by a multilayer perceptron of t, cos(k pi t), sin(k pi t) and x; initial weights from `generator`."""

    rates: Tensor

    def __init__(self, generator: torch.Generator, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        widths = [3 + 2 * FREQUENCIES, *[width] * layers, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.register_buffer("rates", math.pi * torch.arange(1, FREQUENCIES + 1), persistent=False)
        with torch.no_grad():
            for fan_in, layer in zip(widths[:-1], self._linears, strict=True):
                for parameter in layer.parameters():  # the scale of nn.Linear, without the global generator
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
            # steep units over the whole plane: every method learns fine structure several times sooner
            self._linears[0].weight[:, :2].mul_(FIRST_SCALE)
            self._linears[0].bias.mul_(FIRST_SCALE)
            # v = 0 at the start makes the CNF's first ODEs easy
            self._linears[-1].weight.zero_()
            self._linears[-1].bias.zero_()

    @property
    def _linears(self) -> list[nn.Linear]:
        return cast(list[nn.Linear], list(self.layers))

    def _first(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.rates
        first: Tensor = self._linears[0](torch.cat([x, t[:, None], torch.cos(angles), torch.sin(angles)], dim=1))
        return first

    @override
    def forward(self, x: Float[Tensor, "B 2"], t: Float[Tensor, " B"]) -> Float[Tensor, "B 2"]:
        """Compute v(x, t); x and t in the precision of the weights."""
        h = self._first(x, t)
        for layer in self._linears[1:]:
            h = layer(F.silu(h))
        return h

    def value_and_divergence(self, x: Float[Tensor, "B 2"], t: Float[Tensor, " B"]) -> tuple[Float[Tensor, "B 2"], Float[Tensor, " B"]]:
        """Compute v(x, t) and div v(x, t), exact and differentiable by states and weights.

            value     h        -> silu(h)           -> W silu(h) + b
            tangent   dh/dx_i  -> silu'(h) dh/dx_i  -> W (silu'(h) dh/dx_i)           div v = sum_i dv_i/dx_i

        One pass of three rows per state; its gradient is an ordinary backward pass, without a gradient of a gradient.
        """
        h = self._first(x, t)
        # the tangents of a linear layer are columns of its weight, the same for every state
        tangents = self._linears[0].weight[:, :2].T[:, None, :]
        for layer in self._linears[1:]:
            gate = torch.sigmoid(h)
            value = h * gate
            # one product for the value and both tangents; only the value takes the bias
            rows = torch.cat([value[None], tangents * (gate + value * (1 - gate))]) @ layer.weight.T
            h, tangents = rows[0] + layer.bias, rows[1:]
        return h, tangents[0, :, 0] + tangents[1, :, 1]


@final
class _FieldAndDivergence(nn.Module):
    """(v, div v) for the state (x, log-density). torchdiffeq's adjoint needs a module, whose parameters it reads."""

    def __init__(self, field: PlaneField) -> None:
        super().__init__()
        self.field = field

    @override
    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        return self.field.value_and_divergence(x, t.expand(len(x)))


def negative_log_likelihood(
    field: PlaneField, x_1: Float[Tensor, "B 2"], solver: str = CNF_SOLVER, num_steps: int = CNF_STEPS, *, adjoint: bool = True
) -> Float[Tensor, ""]:
    """Compute the mean of -log p_1(x_1) in nats, differentiable by the weights of `field` and by x_1.

        data x_1 ---- integrate (x, l) from t = 1 to 0 ----> noise x_0, l = - int_0^1 div v dt       log p_1 = log N(x_0; 0, I) + l
                      d/dt x = v      d/dt l = div v
        gradient  <-- integrate (x, l, a, dL/dtheta) from t = 0 to 1 <--                             torchdiffeq's odeint_adjoint

    Chen et al. 2018 (arXiv 1806.07366), with the exact divergence instead of FFJORD's estimate (1810.01367).
    solver: a fixed-grid solver of torchdiffeq, forwards and in the adjoint alike.
    adjoint: True solves a second ODE for the gradient, with memory that does not grow with the steps; False differentiates the
        solver's operations. The two gradients agree to the order of the solver.
    """
    from torchdiffeq import odeint, odeint_adjoint  # its import of scipy takes a second

    integrate = odeint_adjoint if adjoint else odeint
    state, times = (x_1, x_1.new_zeros(len(x_1))), x_1.new_tensor([1.0, 0.0])
    x_0, integral = integrate(_FieldAndDivergence(field), state, times, method=solver, options={"step_size": 1 / num_steps})
    # integrated from data to noise: the last state is minus the integral of the formula
    return -(gaussian_log_prob(x_0[-1], 1.0) + integral[-1]).mean()


@final
@dataclass(frozen=True)
class Method:
    """The training of a network and its flow.

    title: for figures. flow: samples and computes densities with the trained network. loss: (network, data [B, 2], generator) -> scalar.
    """

    name: str
    title: str
    flow: FlowMatching
    loss: Callable[[PlaneField, Tensor, torch.Generator], Tensor]
    global_batch_size: int


def flow_matching(config: FlowConfig) -> Method:
    """Return conditional flow matching with any path, time density, prediction and weighting."""
    return _regression(FLOW_MATCHING, "flow matching", config)


def diffusion(config: FlowConfig) -> Method:
    """Return DDPM: VP path, uniform times, noise prediction, plain square; `config` gives the solver of the sampling only."""
    return _regression(DIFFUSION, "diffusion", FlowConfig(path="vp", time_density="uniform", prediction="noise", solver=config.solver))


def cnf(config: FlowConfig) -> Method:
    """Return maximum likelihood through the ODE; `config` gives the solver of the sampling only."""
    flow = FlowMatching.from_config(FlowConfig(time_density="uniform", solver=config.solver))
    return Method(CNF, "CNF", flow, lambda network, x_1, _: negative_log_likelihood(network, x_1), 128)


def _regression(name: str, title: str, config: FlowConfig) -> Method:
    """Return the method with loss `E || network(x_t, t) - target ||^2`, weighted by the flow, with one t and one noise per point.

    Times come from stratified uniform numbers, one in each of B equal parts of [0, 1): unbiased, with less variance.
    """
    flow = FlowMatching.from_config(config)

    def loss(network: PlaneField, x_1: Float[Tensor, "B 2"], generator: torch.Generator) -> Float[Tensor, ""]:
        uniform = (torch.arange(len(x_1), dtype=x_1.dtype) + torch.rand(len(x_1), generator=generator, dtype=x_1.dtype)) / len(x_1)
        # rounding may give 1, where some densities have no quantile
        t = flow.times(uniform.clamp(max=1 - torch.finfo(x_1.dtype).eps))
        pair = flow.training_pair(x_1, t, torch.randn(x_1.shape, generator=generator, dtype=x_1.dtype))
        return flow.mean_loss(network(pair.x_t, t), pair.target, torch.ones_like(x_1, dtype=torch.bool), t)

    return Method(name, title, flow, loss, 1024)
