"""When a run validates, and where the metrics go.

Owns: the schedule of validations, catching up on one that a kill prevented. Does not know: what is measured (validation.py).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import torch

from pi0fm import progress
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.watch.metrics import MetricsWriter, read_last
from pi0fm.train.watch.validation import LOSS, NLL, Validator


@final
class ValidationSchedule:
    """Run validations when they are due; do nothing without validators. paused: called with the seconds that they took.

    steps: of the whole run, whose last is validated too; output_dir: folder of metrics.jsonl; beat: called as a validation progresses.
    """

    def __init__(
        self,
        parallel: Parallel,
        metrics: MetricsWriter | None,
        validators: Sequence[Validator],
        steps: int,
        output_dir: Path,
        paused: Callable[[float], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._parallel, self._metrics, self._validators, self._beat = parallel, metrics, validators, beat
        self._steps, self._output_dir, self._paused = steps, output_dir, paused
        for each in validators if parallel.context.shown else ():
            if each.config.likelihood and each.num_whole < each.num_chunks:
                progress.say(
                    f"{each.named(NLL)}: {each.num_chunks - each.num_whole} of {each.num_chunks} held-out chunks pass their episode's end, "
                    "where training judges nothing; the others have a density, all have a loss"
                )

    def validate_missed(self, first: int, bar: progress.Step | None) -> None:
        """Validate the step that a resumed run starts from, where a kill prevented it."""
        if self._due(first):
            metric, device = self._validators[0].named(LOSS), self._validators[0].device
            written = self._parallel.context.is_first and int((read_last(self._output_dir, metric) or {}).get("step", 0)) == first
            # only the first worker read the file, and all must agree
            if not bool(self._parallel.sum(torch.tensor(float(written), device=device))):
                self.after_step(first, bar)

    def after_step(self, step: int, bar: progress.Step | None) -> None:
        """Validate if it is due, every entry in turn, and write the metrics as one line."""
        if not self._due(step):
            return
        began = time.perf_counter()
        found: dict[str, float] = {}

        def report(text: str) -> None:
            self._beat()
            if bar is not None:
                bar.advance(0, note=text)

        with self._validators[0].gathered():
            for validator in self._validators:
                found |= validator.validate(self._parallel, step, report)
        if self._metrics is not None and found:
            self._metrics.write(step, found)
        seconds = time.perf_counter() - began
        self._paused(seconds)
        if self._parallel.context.shown and found:
            listed = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            progress.say(f"step {step}: {listed} ({seconds:.1f} s)")

    def _due(self, step: int) -> bool:
        return bool(self._validators) and self._validators[0].due(step, self._steps)
