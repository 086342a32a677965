"""Loss, speed and data waiting time of a run, as one line of metrics every few steps.

Owns: the contents of a line of metrics. Does not know: the files (metrics.py), the step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pi0fm import progress
from pi0fm.data.loading.batch import Batch
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.watch.metrics import MetricsWriter
from pi0fm.train.watch.stragglers import ForwardTimer, Stragglers

REPORTED_WAITING_SHARE = 0.2  # share of the time
PROGRESS_FORMATS: Mapping[str, Callable[[float], str]] = {
    "samples_per_second": "{:.1f} samples/s".format,
    "share_of_peak": "{:.0%} of the peak".format,
    "memory_gib": "{:.1f} GiB".format,
}


@dataclass(frozen=True)
class LogConfig:
    """Options of the log. every: steps between lines; steps: of the whole run, whose last step has a line too.

    full_speed: samples a second with all cards at their peak rate, None where it is unknown.
    """

    every: int
    steps: int
    global_batch_size: int
    full_speed: float | None = None


@final
class TrainLog:
    """Log of a run. Losses stay on the device until a line is due: reading each one would stall it.

    metrics: None on all workers except the first; own: this worker's ForwardTimer; nodes: of all workers; first_step: where the run starts;
    loss: of the last line, NaN before the first.
    """

    def __init__(
        self,
        config: LogConfig,
        parallel: Parallel,
        metrics: MetricsWriter | None,
        own: ForwardTimer,
        nodes: Sequence[str],
        first_step: int,
        loss: float = math.nan,
    ) -> None:
        self._config, self._parallel, self._metrics, self._first_step, self.loss = config, parallel, metrics, first_step, loss
        self._own, self._stragglers = own, Stragglers(nodes, progress.say)
        self._losses: list[Tensor] = []
        self._since, self._waited = time.perf_counter(), 0.0
        self.note = format_progress({"loss": loss})  # of the last line; empty before the first

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches, counting the time spent waiting for each."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def paused(self, seconds: float) -> None:
        """Exclude seconds without training from the rate."""
        self._since += seconds

    def after_step(self, step: int, part: Tensor, norm: Tensor, rate: float) -> None:
        """Record step number `step`, counted from 1. part: this worker's part of its loss; norm: of its gradient."""
        self._losses.append(part)
        if step % self._config.every and step != self._config.steps:
            return
        workers = self._parallel.context.world_size
        own = torch.zeros(workers)
        own[self._parallel.context.rank] = self._own.take() + self._waited
        gathered = self._parallel.sum(torch.cat([torch.stack(self._losses), own.to(part)]))
        total, own = gathered.split([len(self._losses), workers])
        finite = total[total.isfinite()]
        if len(finite):  # skipped steps are not counted
            self.loss = float(finite.mean())
        now = time.perf_counter()
        if self._metrics is not None:
            values = {"loss": self.loss, "grad_norm": float(norm), "learning_rate": rate}
            if workers > 1:
                values["slowest_of_median"] = self._stragglers.after_line(step, own.tolist(), now - self._since)
            self._write(self._metrics, step, values, now - self._since)
        self._losses, self._since, self._waited = [], now, 0.0

    def _write(self, metrics: MetricsWriter, step: int, values: dict[str, float], elapsed: float) -> None:
        steps = len(self._losses)
        speed = {
            "samples_per_second": steps * self._config.global_batch_size / elapsed,
            "waiting_for_data": self._waited / elapsed,
            "seconds_left": (self._config.steps - step) * elapsed / steps,
            "memory_gib": self._parallel.used() / 2**30,
        }
        if self._config.full_speed is not None:
            speed["share_of_peak"] = speed["samples_per_second"] / self._config.full_speed
        self.note = format_progress(values | speed)
        metrics.write(step, {name: value for name, value in values.items() if math.isfinite(value)} | speed)
        if self._waited > REPORTED_WAITING_SHARE * elapsed and step > self._first_step + self._config.every:
            progress.say(f"step {step}: {100 * self._waited / elapsed:.0f} % of the time went on waiting for data")


def format_progress(line: Mapping[str, float]) -> str:
    """Format metrics for the progress line: `loss 0.1234, 53.1 samples/s, 38 % of the peak, 47.0 GiB`."""
    found = [f"loss {line['loss']:.4f}"] if math.isfinite(line.get("loss", math.nan)) else []
    for name, text in PROGRESS_FORMATS.items():
        found += [text(line[name])] if name in line else []
    return ", ".join(found)
