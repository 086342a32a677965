"""Where the time of an optimiser step goes, seen from outside `train_step`.

Owns: the marks around what the step is given: its batches, its accelerator, its optimiser. Does not know: what the step does with them.

    next(batches)    forward, loss    accelerator.backward    clip, optimizer.step    the average
    | data           | forward        | backward              | optimizer             | average      |

On CUDA a mark is an event in the stream, so nobody waits; on a CPU it is the clock.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, final

import torch

from pi0fm.data.loading.batch import Batch
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.train.parallel.accelerate import Accelerator
from pi0fm.train.step import train_step

PARTS = ("data", "forward", "backward", "optimizer", "average")


@final
class StepClock:
    """The marks of several steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, ended: str) -> None:
        """A part of a step has ended; an empty name begins a step."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((ended, event))
        else:
            self._marks.append((ended, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """The sum over the steps since the last call, by part; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (ended, after) in zip(self._marks, self._marks[1:], strict=False):
            if ended:
                found[ended] += before.elapsed_time(after) / 1e3 if self._device.type == "cuda" else after - before
        self._marks.clear()
        return found


def clocked_step(
    clock: StepClock,
    average: Callable[[], None],
    model: Pi0,
    flow: FlowMatching,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    batches: Iterator[Batch],
    valid_elements: int,
    clip_norm: float,
) -> torch.Tensor:
    """`train_step` and the average behind it, with marks; the loss, on the device."""
    clock.mark("")
    marked: Any = _Accelerator(accelerator, clock)
    loss, _ = train_step(model, flow, optimizer, marked, _marked(batches, clock), valid_elements, clip_norm)
    clock.mark("optimizer")
    average()
    clock.mark("average")
    return loss


def _marked(batches: Iterator[Batch], clock: StepClock) -> Iterator[Batch]:
    for batch in batches:
        clock.mark("data")
        yield batch


class _Accelerator:
    """accelerate's, with a mark on either side of the backward pass."""

    def __init__(self, inner: Accelerator, clock: StepClock) -> None:
        self._inner, self._clock = inner, clock

    def backward(self, loss: torch.Tensor) -> None:
        self._clock.mark("forward")
        self._inner.backward(loss)
        self._clock.mark("backward")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
