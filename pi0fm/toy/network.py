"""A vector field in the plane: the one network that every method trains.

Owns: its layers, and its divergence. Does not know: what its answer means (a velocity, a noise), who trains it.

    x [B, 2] ---------------.
    t [B] -> t, cos, sin ----+-> linear -> SiLU -> linear -> SiLU -> ... -> linear -> v [B, 2]

`value_and_divergence` carries the derivatives of every layer by x and by y (two tangents) beside its value:

    value     h        -> silu(h)           -> W silu(h) + b
    tangent   dh/dx_i  -> silu'(h) dh/dx_i  -> W (silu'(h) dh/dx_i)           div v = sum_i dv_i/dx_i

One pass of three rows a state, whose own gradient is an ordinary backward pass: training through a divergence needs no gradient of a
gradient.
Shape letters: B states, W width.
"""

import itertools
import math
from typing import cast, final, override

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LAYERS, FREQUENCIES = 64, 3, 3
FIRST_SCALE = 6.0


@final
class PlaneField(nn.Module):
    """v(x, t) by a multilayer perceptron of `layers` hidden layers; initial weights from `generator` alone."""

    rates: Tensor

    def __init__(self, generator: torch.Generator, width: int = WIDTH, layers: int = LAYERS, frequencies: int = FREQUENCIES) -> None:
        super().__init__()
        widths = [3 + 2 * frequencies, *[width] * layers, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.register_buffer("rates", math.pi * torch.arange(1, frequencies + 1), persistent=False)
        for fan_in, layer in zip(widths[:-1], self._linears, strict=True):
            for parameter in layer.parameters():
                # nn.Linear's own scale, drawn without the global generator.
                nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        with torch.no_grad():
            # Steep units all over the plane: fine structure is learned several times sooner, by every method.
            self._linears[0].weight[:, :2].mul_(FIRST_SCALE)
            self._linears[0].bias.mul_(FIRST_SCALE)
            # v = 0 at the start: an ODE that is solved while training begins as an easy one.
            self._linears[-1].weight.zero_()
            self._linears[-1].bias.zero_()

    @override
    def forward(self, x: Float[Tensor, "B 2"], t: Float[Tensor, " B"]) -> Float[Tensor, "B 2"]:
        """v(x, t); x and t in the precision of the weights."""
        h = self._first(x, t)
        for layer in self._linears[1:]:
            h = layer(F.silu(h))
        return h

    def value_and_divergence(self, x: Float[Tensor, "B 2"], t: Float[Tensor, " B"]) -> tuple[Float[Tensor, "B 2"], Float[Tensor, " B"]]:
        """(v(x, t), div v(x, t)), exact; differentiable by states and weights."""
        h = self._first(x, t)
        first, *inner, last = self._linears
        # The first layer is linear: its tangents are columns of its weight, the same for every state.
        tangents = first.weight[:, :2].T[:, None, :]
        for layer in inner:
            gate = torch.sigmoid(h)
            value = h * gate
            tangents = tangents * (gate + value * (1 - gate))
            # One product for the value and both tangents; only the value takes the bias.
            rows = torch.cat([value[None], tangents]) @ layer.weight.T
            h, tangents = rows[0] + layer.bias, rows[1:]
        gate = torch.sigmoid(h)
        value = h * gate
        divergence = ((gate + value * (1 - gate)) * (tangents * last.weight[:, None, :]).sum(0)).sum(1)
        return last(value), divergence

    @property
    def _linears(self) -> list[nn.Linear]:
        return cast(list[nn.Linear], list(self.layers))

    def _first(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.rates
        first: Tensor = self._linears[0](torch.cat([x, t[:, None], torch.cos(angles), torch.sin(angles)], dim=1))
        return first
