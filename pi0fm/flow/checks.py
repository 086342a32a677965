"""Checks of what the mathematics of a flow requires, with errors of one line.

Owns: `FlowError` and the checks of times, states and masks. Does not know: paths, solvers, robots.

Two kinds of check, kept apart on purpose:
- of shape and type (`check_batch`, `check_mask`): they read metadata only, so they stand in the training step;
- of values (`check_times`, `check_finite`): on an accelerator they wait for the device. They stand in the conversions, in the
  likelihood and once at the end of a sampling, never in the training step and never inside a solver's loop. Time grids
  (`check_grid`) are lists of Python floats, so their values are free to check.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm_client.errors import Pi0fmError


class FlowError(Pi0fmError, ValueError):
    """A time, state or mask that a flow cannot use.

    Not a ConfigError, since the value of a tensor is wrong, not an option. Also a ValueError, which callers of a numerical
    library catch.
    """


def check_batch(t: Tensor, x: Tensor) -> None:
    """Refuse times that are not one for each state. Reads shapes only."""
    if t.ndim != 1 or x.ndim < 1 or t.shape[0] != x.shape[0]:
        raise FlowError(f"times must be one for each state: expected t of shape [{x.shape[0] if x.ndim else 'B'}], found {list(t.shape)}")


def check_same_shape(name: str, found: Tensor, expected: Tensor) -> None:
    """Refuse a tensor that would broadcast silently. Reads shapes only."""
    if found.shape != expected.shape:
        raise FlowError(f"{name} must have the state's shape {list(expected.shape)}, found {list(found.shape)}")


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Refuse a mask of another shape or type than bool. Reads metadata only."""
    if mask.dtype != torch.bool or mask.shape != x.shape:
        found = f"{mask.dtype} {list(mask.shape)}"
        raise FlowError(f"a mask must be torch.bool of shape {list(x.shape)}, True where an entry is real; found {found}")


def check_times(t: Float[Tensor, "..."]) -> None:
    """Refuse times outside [0, 1]. Reads values: waits for the device."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise FlowError(f"time t must lie in [0, 1] (0 noise, 1 data), found values from {float(t.min()):g} to {float(t.max()):g}")


def check_finite(name: str, x: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> None:
    """Refuse NaN and infinity where `mask` is True (everywhere without a mask). Reads values: waits for the device."""
    bad = ~torch.isfinite(x)
    if mask is not None:
        check_mask(mask, x)
        bad = bad & mask
    if bool(bad.any()):
        raise FlowError(f"{name} must be finite, found {int(bad.sum())} entries that are NaN or infinite out of {x.numel()}")


def check_grid(times: Sequence[float]) -> None:
    """Refuse a time grid that is not strictly monotone in [0, 1], or has fewer than two points. Values are Python floats."""
    if len(times) < 2:
        raise FlowError(f"a time grid needs at least two times, found {len(times)}; type for example [0.0, 0.5, 1.0]")
    if not all(math.isfinite(t) and 0 <= t <= 1 for t in times):
        raise FlowError(f"a time grid must lie in [0, 1] (0 noise, 1 data), found values from {min(times):g} to {max(times):g}")
    pairs = list(itertools.pairwise(times))
    if not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise FlowError(f"a time grid must strictly increase, or strictly decrease; found {[round(t, 4) for t in times[:8]]}")
