"""Loss curve of a run, for the report of its evaluation.

Owns: reading `metrics.jsonl`, the picture. Does not know: the trainer that wrote the lines, the page that shows them.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pi0fm import pages
from pi0fm_client.errors import ConfigError

LOGGED, SMOOTH = "#9fd4cd", "#0f766e"
LOG_SCALE_FROM = 12.0


def read_losses(path: Path) -> list[tuple[int, float]]:
    """Read the (step, loss) pairs of a metrics.jsonl in order of steps; for a step logged twice (by a resumed run) the later one.

    Lines without a finite loss are other metrics. Raises ConfigError for a missing file, a line that is not JSON, or a file without a loss.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"no metrics at {path} ({error.strerror}); name a run's metrics.jsonl, or leave --metrics out") from None
    losses: dict[int, float] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError:
            if number == len(lines):
                break  # a running training may be writing it
            raise ConfigError(f"{path} must hold one JSON object per line, line {number} is {line[:40]!r}") from None
        loss = row.get("loss") if isinstance(row, dict) else None
        if isinstance(loss, int | float) and math.isfinite(loss) and isinstance(row.get("step"), int):
            losses[row["step"]] = float(loss)
    if not losses:
        raise ConfigError(f"{path} holds no line with a step and a loss; name the metrics.jsonl that pi0fm train wrote")
    return sorted(losses.items())


def draw(losses: Sequence[tuple[int, float]]) -> bytes:
    """Draw one or more (step, loss) pairs and their running mean, as PNG.

    The mean is over a centred window of about a twentieth of the points, cut off at the ends. A loss that falls twelve-fold or more gets a
    logarithmic axis.
    """
    steps, values = np.array(losses, dtype=np.float64).T
    window = np.ones(2 * (len(values) // 40) + 1)
    smooth = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    figure, (axis,) = pages.panels(width=7.8, height=2.7)
    axis.plot(steps, values, color=LOGGED, linewidth=1.2, label="logged")
    axis.plot(steps, smooth, color=SMOOTH, linewidth=2.2, label="running mean")
    pages.chart(axis, f"{smooth[-1]:.4g} at step {losses[-1][0]}", "step", "loss")
    if values.min() > 0 and values.max() / values.min() >= LOG_SCALE_FROM:
        axis.set_yscale("log")
        pages.plain_log(axis.yaxis)
    pages.legend(axis)
    return pages.png(figure)
