"""A training that ends when its processor time is spent, or after so many steps; the same rule for whoever trains.

Owns: the plan, the length of the learning-rate schedule for a budget, the loop around one step, the record of it.
Does not know: networks, data, whose step it is.

    build -> [calibration on a copy: seconds a step -> length of the schedule] -> step, step, ... until the seconds are spent
                                 not charged                                          charged
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pi0fm import progress
from pi0fm.processes import cpu_seconds_of_tree
from pi0fm_client.errors import ConfigError

Update = Callable[[int], tuple[float, int]]
"""Step number -> (loss, samples); making the batch is part of it, and is charged."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a run may spend.

    cpu_seconds: of the process tree; infinite where the steps alone end it.
    max_steps: when given, the schedule's length too, as `--steps`; no calibration then.
    calibration_steps: steps on a thrown-away copy that tell how many steps the budget holds.
    """

    cpu_seconds: float
    learning_rate: float = 1e-3
    seed: int = 1000
    max_steps: int | None = None
    calibration_steps: int = 3

    def __post_init__(self) -> None:
        if self.cpu_seconds <= 0:
            raise ConfigError(f"cpu_seconds must be above 0, found {self.cpu_seconds}")
        if self.calibration_steps < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise ConfigError(f"calibration_steps and max_steps must be at least 1, found {self.calibration_steps} and {self.max_steps}")
        if math.isinf(self.cpu_seconds) and self.max_steps is None:
            raise ConfigError("cpu_seconds must be finite where max_steps is not given: nothing else ends the run")


@dataclass(frozen=True)
class TrainingResult:
    """What a run did. `scheduled_steps` is the length of the learning-rate schedule; later steps keep the last rate.

    losses, spent: by step, `spent` being the CPU-seconds used when the step had ended.
    """

    steps: int
    samples: int
    scheduled_steps: int
    cpu_seconds: float
    losses: tuple[float, ...]
    spent: tuple[float, ...]


def spend(name: str, update: Update, plan: TrainingPlan, scheduled_steps: int) -> TrainingResult:
    """Call `update` until `plan.cpu_seconds` are spent or `plan.max_steps` done; at most one step is over the budget."""
    losses: list[float] = []
    spent: list[float] = []
    samples, shown, used = 0, 0, 0.0
    unit, whole = ("CPU-seconds", math.ceil(plan.cpu_seconds)) if plan.max_steps is None else ("steps", plan.max_steps)
    began = cpu_seconds_of_tree()
    with progress.step(f"{name}, {unit}", whole) as bar:
        while used < plan.cpu_seconds and (plan.max_steps is None or len(losses) < plan.max_steps):
            loss, count = update(len(losses))
            used = cpu_seconds_of_tree() - began
            losses.append(loss)
            spent.append(used)
            samples += count
            reached = min(int(used), whole) if plan.max_steps is None else len(losses)
            bar.advance(reached - shown, f"step {len(losses)}, loss {loss:.3f}")
            shown = reached
    return TrainingResult(len(losses), samples, scheduled_steps, used, tuple(losses), tuple(spent))


def steps_in_budget(update: Update, plan: TrainingPlan) -> int:
    """How many steps `plan.cpu_seconds` hold, from a few of `update`, which must work on a copy.

    The first, which pays for allocation, is not counted.
    """
    update(0)
    began = cpu_seconds_of_tree()
    for step in range(1, plan.calibration_steps + 1):
        update(step)
    seconds_a_step = (cpu_seconds_of_tree() - began) / plan.calibration_steps
    return max(1, round(plan.cpu_seconds / seconds_a_step))
