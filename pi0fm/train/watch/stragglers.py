"""Report a worker that is slower than the others, with its node: all workers wait for it at every step.

Owns: each worker's own time, which includes no waiting for others, and its limit. Does not know: the step, why a node is slow.

    worker 0   | data | forward | backward, gradients averaged ........ |      own time: data and forward; from the first gradient sent,
    worker 1   | data  | forward ....... | backward, gradients averaged |      a worker's time includes waiting for the others

The forward pass of a sharded state gathers weights, so there only data is a worker's own time.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, final

import torch
from torch import nn

TIMES_THE_MEDIAN = 1.5  # own time of a slow worker over the median of the others
SHARE_OF_A_STEP = 0.1  # least excess over the median, as a share of the step
SECONDS_COMPARED = 10.0  # compared together: single steps vary too much
TIMES_IN_A_ROW, TIMES_BETWEEN = 2, 60  # slow intervals before the first line, and between two lines


@final
class ForwardTimer:
    """Time of the forward passes of `network` since the last call of `take`; on CUDA by events, without a host sync.

    whole: its forward pass does not communicate; forward passes that do are not timed.
    """

    def __init__(self, network: nn.Module, device: torch.device, *, whole: bool) -> None:
        self._cuda, self._marks = device.type == "cuda", list[tuple[Any, Any]]()
        self._begun: Any = None
        if whole:
            network.register_forward_pre_hook(self._begin)
            network.register_forward_hook(self._finish)

    def take(self) -> float:
        """Return the seconds, waiting for the last pass; best called where the host waits for the device anyway."""
        marks, self._marks = self._marks, []
        if not self._cuda:
            return float(sum(end - begin for begin, end in marks))
        for _, end in marks[-1:]:
            end.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in marks)) / 1e3

    def _begin(self, network: nn.Module, *_: object) -> None:
        self._begun = self._now() if network.training else None

    def _finish(self, *_: object) -> None:
        if self._begun is not None:  # the copy of the network that validates has these hooks too
            self._marks.append((self._begun, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@final
class Stragglers:
    """Compare the forward and data times of all workers, SECONDS_COMPARED of steps at a time. nodes: by rank; say: prints a status line."""

    def __init__(self, nodes: Sequence[str], say: Callable[[str], object]) -> None:
        self._nodes, self._say = nodes, say
        self._own, self._elapsed = [0.0] * len(nodes), 0.0
        self._slow, self._times = -1, 0

    def after_line(self, step: int, own: Sequence[float], elapsed: float) -> float:
        """Return the slowest worker's own time over the median of the others. own: seconds by rank, out of `elapsed` for the steps."""
        self._own, self._elapsed = [sum(pair) for pair in zip(self._own, own, strict=True)], self._elapsed + elapsed
        if self._elapsed >= SECONDS_COMPARED:
            self._report_slow(step)
            self._own, self._elapsed = [0.0] * len(self._nodes), 0.0
        slow, usual = _slowest(own)
        return own[slow] / usual if usual > 0 else 1.0

    def _report_slow(self, step: int) -> None:
        slow, usual = _slowest(self._own)
        excess = self._own[slow] - usual
        if self._own[slow] < TIMES_THE_MEDIAN * usual or excess < SHARE_OF_A_STEP * self._elapsed:
            self._slow = -1
            return
        self._times = self._times + 1 if slow == self._slow else 1
        self._slow = slow
        if self._times % TIMES_BETWEEN == TIMES_IN_A_ROW:
            times, share = self._own[slow] / usual, 100 * excess / self._elapsed
            self._say(
                f"step {step}: worker {slow} on {self._nodes[slow]} is slow: data and forward passes take it {times:.1f} times the median "
                f"of the others, who wait for it {share:.0f} % of the time; look at that node"
            )


def _slowest(own: Sequence[float]) -> tuple[int, float]:
    """Return the slowest worker's rank, and the median of the others."""
    slow = max(range(len(own)), key=lambda rank: own[rank])
    return slow, median([seconds for rank, seconds in enumerate(own) if rank != slow])
