"""A run's loss curve, laid out for an inline SVG.

Owns: reading `metrics.jsonl`, thinning, ticks, coordinates. Does not know: the trainer that wrote the lines, the page that shows them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pi0fm_client.errors import ConfigError

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30
MOST_POINTS = 360
LOG_SCALE_FROM = 12.0


@dataclass(frozen=True)
class Tick:
    """A grid line at `position` (SVG units) and its label."""

    position: float
    label: str


@dataclass(frozen=True)
class Curve:
    """Coordinates of `M x y L x y ...` paths: the loss as logged (thinned), and its running mean."""

    logged: str
    smooth: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    last_step: int
    last_loss: float
    logarithmic: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def read_losses(path: Path) -> list[tuple[int, float]]:
    """The (step, loss) pairs of a metrics.jsonl, in order of the steps; of a step logged twice (a resumed run) the later one.

    Lines without a finite loss are other metrics. Raises ConfigError for a missing file, a line that is not JSON, or no loss at all.
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
                break  # a run that is still going may be in the middle of its last line
            raise ConfigError(f"{path} must hold one JSON object a line, line {number} is {line[:40]!r}") from None
        loss = row.get("loss") if isinstance(row, dict) else None
        if isinstance(loss, int | float) and math.isfinite(loss) and isinstance(row.get("step"), int):
            losses[row["step"]] = float(loss)
    if not losses:
        raise ConfigError(f"{path} holds no line with a step and a loss; name the metrics.jsonl that pi0fm train wrote")
    return sorted(losses.items())


def layout(losses: Sequence[tuple[int, float]]) -> Curve:
    """Place at least one (step, loss) pair on the canvas; a loss that falls twelve-fold or more gets a logarithmic axis."""
    thinned = _thin(losses)
    smooth = _running_mean(thinned)
    values = [loss for _, loss in thinned]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low >= LOG_SCALE_FROM
    scale = math.log10 if logarithmic else float
    y_marks = _log_marks(low, high) if logarithmic else _marks(low, high, 4)
    bottom, top = (scale(low / 1.1), scale(high * 1.1)) if logarithmic else (min(low, y_marks[0]), max(high, y_marks[-1]))
    first, last = losses[0][0], losses[-1][0]

    def x(step: float) -> float:
        return round(LEFT + (step - first) / max(1, last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(loss: float) -> float:
        part = (scale(loss) - bottom) / (top - bottom) if top > bottom else 0.5
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: Sequence[tuple[int, float]]) -> str:
        return "M" + " L".join(f"{x(step)} {y(loss)}" for step, loss in points)

    return Curve(
        logged=path(thinned),
        smooth=path(smooth),
        x_ticks=tuple(Tick(x(mark), f"{mark:g}") for mark in _marks(first, last, 5) if first <= mark <= last),
        y_ticks=tuple(Tick(y(mark), f"{mark:g}") for mark in y_marks),
        last_step=last,
        last_loss=smooth[-1][1],
        logarithmic=logarithmic,
    )


def _thin(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of equal groups, so that a page holds at most MOST_POINTS points of a long run."""
    group = -(-len(losses) // MOST_POINTS)
    groups = [losses[start : start + group] for start in range(0, len(losses), group)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in groups]


def _running_mean(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean of a centred window of about a twentieth of the points; at the ends the part of it that exists."""
    half = len(points) // 40
    result = []
    for index, (step, _) in enumerate(points):
        window = points[max(0, index - half) : index + half + 1]
        result.append((step, sum(loss for _, loss in window) / len(window)))
    return result


def _marks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high], about `count` steps apart."""
    rough = (high - low) / count or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 12) for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]; the powers alone where that would be a crowd."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [mark for power in powers for factor in factors if low <= (mark := factor * 10.0**power) <= high]
