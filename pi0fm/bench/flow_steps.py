"""The error of a sampled action chunk against the evaluations of the network that it cost, for every solver of the ODE.

Owns: the settings that are compared, the reference, the errors, the cheapest setting. Does not know: policies, observations, files.

    noise --rk4, many steps-----> reference     its own error: the same with half the steps
          --solver, n steps-----> chunk         error = chunk - reference over the real entries

Every setting starts from the same noise, and asks the same velocity. Units are those of the velocity's state: normalised ones.
Shape letters: B chunks, H action horizon, A action dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import FIXED_GRID_SOLVERS, Counted, Velocity, num_evaluations

ADAPTIVE = "dopri5"
REFERENCE = "rk4"
GUESSED_EVALUATIONS = 60  # of an adaptive solver, before it has run; for the time left only
ToRobot = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """One way to sample. tolerance: of dopri5, which chooses its own steps and tries 1 / num_flow_steps first; None on a fixed grid."""

    solver: str
    num_flow_steps: int
    tolerance: float | None = None

    @property
    def expected_evaluations(self) -> int:
        """Evaluations of the network; a guess for dopri5."""
        return GUESSED_EVALUATIONS if self.tolerance is not None else num_evaluations(self.solver, self.num_flow_steps)


@dataclass(frozen=True)
class Row:
    """What a setting cost and how far it is from the reference.

    evaluations: of the network, as counted. rms, largest: over all real entries, normalised units.
    robot_rms: of each chunk, over all its entries in robot units.
    """

    setting: Setting
    evaluations: int
    rms: float
    largest: float
    robot_rms: tuple[float, ...]

    @property
    def mean_robot_rms(self) -> float:
        """Mean over the chunks."""
        return sum(self.robot_rms) / len(self.robot_rms)


@dataclass(frozen=True)
class Reference:
    """The chunks that count as exact. rms, largest: how far half the steps end from them, which bounds their own error.

    A 16th of it where the velocity is smooth in t. pi0's is not: its embedding of t has periods down to 0.004, which a policy trained for
    minutes does not smooth out, and until the steps are shorter than that every solver converges like one of order 1.
    """

    actions: Float[Tensor, "B *rest"]
    num_flow_steps: int
    rms: float
    largest: float


def settings(evaluations: Sequence[int], tolerances: Sequence[float], first_steps: int) -> list[Setting]:
    """Each fixed-grid solver at each number of evaluations that it can spend exactly, then dopri5 at each tolerance, coarse to fine."""
    grids = [
        Setting(solver, spent // num_evaluations(solver, 1))
        for solver in FIXED_GRID_SOLVERS
        for spent in sorted(set(evaluations))
        if spent % num_evaluations(solver, 1) == 0
    ]
    return grids + [Setting(ADAPTIVE, first_steps, tolerance) for tolerance in sorted(set(tolerances), reverse=True)]


def find_reference(
    flow: FlowMatching,
    velocity: Velocity,
    noise: Float[Tensor, "B *rest"],
    mask: Bool[Tensor, "B *rest"],
    num_flow_steps: int,
    advance: Callable[[int], None] | None = None,
) -> Reference:
    """RK4 with `num_flow_steps` steps (even), and how far half of them end from it."""
    sampled = []
    for steps in (num_flow_steps // 2, num_flow_steps):
        sampled.append(flow.sample(velocity, noise, steps, REFERENCE, mask))
        if advance is not None:
            advance(num_evaluations(REFERENCE, steps))
    coarse, fine = sampled
    rms, largest = _distance(coarse, fine, mask)
    return Reference(fine, num_flow_steps, rms, largest)


def measure(
    flow: FlowMatching,
    velocity: Velocity,
    noise: Float[Tensor, "B *rest"],
    mask: Bool[Tensor, "B *rest"],
    reference: Reference,
    compared: Sequence[Setting],
    to_robot: ToRobot,
    advance: Callable[[int], None] | None = None,
) -> list[Row]:
    """A row for each setting, in order.

    to_robot: normalised chunks to robot units, any shape that begins with B. advance: is told the expected evaluations that are done.
    Raises FlowError when a chunk is not finite.
    """
    exact = to_robot(reference.actions)
    rows = []
    for setting in compared:
        counted = Counted(velocity)
        solved_by = flow if setting.tolerance is None else replace(flow, tolerance=setting.tolerance)
        actions = solved_by.sample(counted, noise, setting.num_flow_steps, setting.solver, mask)
        rms, largest = _distance(actions, reference.actions, mask)
        robot = (to_robot(actions) - exact).flatten(1).double().square().mean(1).sqrt().tolist()
        rows.append(Row(setting, counted.num_evaluations, rms, largest, tuple(robot)))
        if advance is not None:
            advance(setting.expected_evaluations)
    return rows


def cheapest(rows: Sequence[Row], tolerance: float, own_tolerance: float) -> dict[str, Row]:
    """By solver, cheapest first, the row that reaches `tolerance` (RMS) with the fewest evaluations and is not left by finer ones.

    A solver that never reaches it is absent. Of dopri5 only the row at `own_tolerance` counts: a policy's options set no other.
    """
    found: list[Row] = []
    for solver in dict.fromkeys(row.setting.solver for row in rows):
        own = [row for row in rows if row.setting.solver == solver and row.setting.tolerance in (None, own_tolerance)]
        kept: Row | None = None
        for row in sorted(own, key=lambda row: -row.evaluations):
            if not row.rms <= tolerance:
                break
            kept = row
        if kept is not None:
            found.append(kept)
    return {row.setting.solver: row for row in sorted(found, key=lambda row: (row.evaluations, row.rms))}


def observed_order(rows: Sequence[Row], solver: str, floor: float) -> float | None:
    """Minus the slope of log error against log steps, over the finest rows (at most five) of a fixed grid with ten times `floor` or more.

    None with fewer than three: what lies below is the error of the reference, not the solver's.
    """
    own = [row for row in rows if row.setting.solver == solver and row.rms > 10 * floor][-5:]
    if len(own) < 3 or solver not in FIXED_GRID_SOLVERS:
        return None
    x, y = [math.log(row.setting.num_flow_steps) for row in own], [math.log(row.rms) for row in own]
    middle_x, middle_y = sum(x) / len(own), sum(y) / len(own)
    return -sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


def errors(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """RMS error by solver and evaluations, for JSON."""
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        table.setdefault(row.setting.solver, {})[str(row.evaluations)] = row.rms
    return table


def _distance(a: Tensor, b: Tensor, mask: Tensor) -> tuple[float, float]:
    """(RMS, largest) of the difference over the real entries."""
    difference = (a.double() - b.double())[mask]
    return float(difference.square().mean().sqrt()), float(difference.abs().max())
