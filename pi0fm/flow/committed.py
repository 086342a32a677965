r"""Chunks whose first rows are committed: real-time chunking that the network was trained for.

Owns: which rows are held, the training pair with held rows, the velocity that holds them. Does not know: robots, control steps.

    rows of a chunk   0 .. d-1          d .. H-1        d = inference_delay
    x_t               x_1, clean        on the path
    flow time         1                 t               differs by row
    loss              none              as always

So the network learns p(rows from d on | observation, rows before d), and sampling from it needs neither a derivative nor another path:
before each evaluation the held rows are set to their clean values, with time 1. Training-time real-time chunking (arXiv 2512.05964).
Shape letters: B batch, H action horizon, A action dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pi0fm.flow.checks import check_same_shape


def held_rows(delays: Int64[Tensor, " B"], horizon: int) -> Bool[Tensor, "B H"]:
    """True for the rows before each chunk's delay."""
    return torch.arange(horizon, device=delays.device) < delays[:, None]


def row_times(held: Bool[Tensor, "B H"], t: Float[Tensor, " B"]) -> Float[Tensor, "B H"]:
    """Flow time of each row: 1 where it is held, else its chunk's."""
    return torch.where(held, torch.ones_like(t)[:, None], t[:, None])


def hold(
    held: Bool[Tensor, "B H"], actions: Float[Tensor, "B H A"], x_t: Float[Tensor, "B H A"], mask: Bool[Tensor, "B H A"]
) -> tuple[Float[Tensor, "B H A"], Bool[Tensor, "B H A"]]:
    """(x_t with the held rows clean, mask of the loss without them) of a training step."""
    return torch.where(held[..., None], actions, x_t), mask & ~held[..., None]


@final
@dataclass(frozen=True)
class CommittedVelocity:
    """`Velocity` of the free rows, given the held rows of `actions`; 0 for the held rows, for any x there.

    network: (x [B, H, A], t [B, H]) -> answer. Its method `at_rows(x, t: float, held)`, if any, is called where the free rows share a
    time.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    actions: Float[Tensor, "B H A"]
    held: Bool[Tensor, "B H"]

    def __call__(self, x: Float[Tensor, "B H A"], t: Float[Tensor, " B"]) -> Float[Tensor, "B H A"]:
        """Evaluate the free rows, each chunk at its own time."""
        return self._free(self.network(self.placed(x), row_times(self.held, t)))

    def at(self, x: Float[Tensor, "B H A"], t: float) -> Float[Tensor, "B H A"]:
        """Evaluate the free rows, all chunks at one time."""
        at_rows = getattr(self.network, "at_rows", None)
        if at_rows is None:
            return self(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
        return self._free(at_rows(self.placed(x), t, self.held))

    def placed(self, x: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Put the held rows of `actions` into x: the network's input, and after the last step the chunk."""
        check_same_shape("the actions of a committed chunk", self.actions, x)
        return torch.where(self.held[..., None], self.actions.to(x.dtype), x)

    def _free(self, answer: Tensor) -> Tensor:
        # the network's answer in held rows is untrained
        return torch.where(self.held[..., None], torch.zeros_like(answer), answer)
