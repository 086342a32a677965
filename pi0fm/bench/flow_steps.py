"""Error of a sampled action chunk against the number of network evaluations, for every ODE solver.

Owns: the settings that are compared, the reference, the errors, the cheapest setting, the observations, the figure.
Does not know: how a solver works.

    noise --rk4, many steps-----> reference     its error: the distance to rk4 with half the steps
          --solver, n steps-----> chunk         error = chunk - reference over the real entries, normalised units

All settings share noise and velocity. Where the velocity is smooth in t, halving the reference's steps multiplies its error by 16.
pi0's velocity is not: its embedding of t has periods down to 0.004, which a policy trained for minutes does not smooth out; with longer
steps every solver converges with order 1.

    observations of a data set   |--x-----x-----x-----x--|             in the middle of equal segments of its frames
    of the simulator             seed n + 1:  x . . x . . x . . x      the start, then along an episode of the policy,
                                 seed n + 2:  x . . x . . x . . x      execution_horizon apart; n is the last seed that was demonstrated
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0fm import files, progress
from pi0fm.bench.config import StepsOptions
from pi0fm.bench.harness.measure import BenchReport
from pi0fm.data.chain import Chain, Sample
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.data.order.counter import draw
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.eval.rollouts.episode import noise_seed
from pi0fm.flow.config import FIXED_GRID_SOLVERS
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import CountedVelocity, Velocity, num_evaluations
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.saved import bundle
from pi0fm.sim import catalog
from pi0fm.sim.environment import parse_cameras
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Observation, Policy

RESULT, FIGURE = "steps.json", "steps.png"
ADAPTIVE, REFERENCE = "dopri5", "rk4"
PER_EPISODE = 4  # observations of an episode
# Okabe and Ito's colours, which colour-blind readers can distinguish; each solver also has a marker.
STYLES = {"euler": "o#0072B2", "midpoint": "s#E69F00", "heun": "^#009E73", "rk4": "D#CC79A7", "dopri5": "v#444444"}


@dataclass(frozen=True)
class SolverError:
    """Cost of one solver setting, and its error against the reference.

    solver_tolerance: of dopri5, whose first step is 1 / num_flow_steps and whose others are adaptive; else None. evaluations: of the
    network, counted. rms, largest: over all real entries, normalised units. robot_rms_per_chunk: over all entries of each chunk, in
    robot units.
    """

    solver: str
    num_flow_steps: int
    solver_tolerance: float | None
    evaluations: int
    rms: float
    largest: float
    robot_rms_per_chunk: tuple[float, ...]

    def json(self) -> dict[str, Any]:
        """All fields, and the options that select the setting in serving and evaluation."""
        return asdict(self) | {"options": f"--solver {self.solver} --num_flow_steps {self.num_flow_steps}"}


def measure(options: StepsOptions) -> BenchReport:
    """Load the bundle, collect observations, solve, draw; the figures hold `error` by solver and evaluations, and `cheapest`."""
    progress.say(f"loading {options.bundle}")
    # float32: in bfloat16 the network's rounding would be most of the error
    policy = bundle.load(options.bundle, device=options.device, precision="float32", threads=options.threads)
    observations, where = observe(options, policy)
    rows, floor = solve(options, policy, observations)
    found = cheapest(rows, options.tolerance, policy.flow.tolerance)
    chosen, picture = next(iter(found.values()), None), options.output_dir / FIGURE
    subject = f"{len(observations)} chunks from {where}; reference: rk4, {options.reference_steps} steps"
    draw_figure(rows, floor, options.tolerance, chosen, subject, picture)
    if chosen is None:
        progress.say(f"no setting reaches {options.tolerance:g}: type a larger --tolerance, or more --evaluations; see {picture}")
    solvers = list(dict.fromkeys(row.solver for row in rows))
    orders = {solver: observed_order(rows, solver, floor) for solver in solvers}
    figures = {
        "error": {solver: {str(row.evaluations): row.rms for row in rows if row.solver == solver} for solver in solvers},
        "cheapest": {"tolerance": options.tolerance, **({"solver": None} if chosen is None else chosen.json())},
        "reference": {"solver": REFERENCE, "num_flow_steps": options.reference_steps, "rms_to_half": floor},
        "order": {solver: round(order, 2) for solver, order in orders.items() if order is not None},
        "observations": len(observations),
        "table": str(options.output_dir / RESULT),
        "figure": str(picture),
    }
    background = {"bundle": str(options.bundle), "where": where, "seed": options.seed, "rows": [row.json() for row in rows]}
    names = ("options", "evaluations", "rms", "largest")
    best = {
        solver: {name: row.json()[name] for name in names} | {"robot_rms": float(np.mean(row.robot_rms_per_chunk))}
        for solver, row in found.items()
    }
    return BenchReport(figures, {**figures, "cheapest": {f"within {options.tolerance:g}": best}}, background)


def observe(options: StepsOptions, policy: LocalPolicy) -> tuple[list[Observation], str]:
    """Observations, and a description of their source."""
    if options.dataset.root is not None or options.dataset.repo_id:
        name = options.dataset.repo_id or Path(str(options.dataset.root)).name
        return from_dataset(policy.chain, options.dataset, options.observations), f"the data set {name}"
    tasks = simulated_tasks(policy.metadata)
    with progress.step("simulate", options.observations) as bar:
        found = from_simulator(policy, options.observations, options.seed, bar.advance)
    return found, f"the simulator ({', '.join(tasks)})" if len(tasks) < 4 else f"the simulator ({len(tasks)} tasks)"


def from_dataset(chain: Chain, dataset: DatasetConfig, count: int) -> list[Observation]:
    """`count` observations spread over the frames of a data set; all frames where there are fewer.

    Raises ConfigError for a data set of another robot than the policy's, DatasetError for one that cannot be read.
    """
    source = open_source(dataset, chain.embodiment)
    number = min(count, len(source.frames))
    frames = source.frames[((np.arange(number) + 0.5) / number * len(source.frames)).astype(np.int64)]
    pictures = open_cache(source, dataset, chain.image_size).gather(frames)
    return [source.observation(frame, images) for frame, images in zip(frames.tolist(), pictures, strict=True)]


def simulated_tasks(metadata: Mapping[str, Any]) -> dict[str, int]:
    """First seed after the demonstrations, for each demonstrated task of a simulator.

    Raises ConfigError where the bundle names no such task or no camera.
    """
    tasks = {task: int(high) + 1 for task, (_, high) in metadata["demonstration_seeds"].items() if catalog.is_task(task)}
    if not tasks or not metadata["camera_sources"]:
        raise ConfigError(
            "observations are needed, and this bundle names no task and camera of a simulator to make them with; "
            "type --dataset.root DIRECTORY, or --dataset.repo_id NAME"
        )
    return tasks


def from_simulator(policy: Policy, count: int, seed: int, advance: Callable[[int], None]) -> list[Observation]:
    """`count` observations spread over the policy's tasks: undemonstrated start positions, and the policy's episode from each.

    Raises ConfigError as `simulated_tasks` does, SimulationError when the machine cannot render.
    """
    tasks, metadata = simulated_tasks(policy.metadata), policy.metadata
    cameras = parse_cameras(f"{name}={source}" for name, source in metadata["camera_sources"].items())
    found: list[Observation] = []
    for number, (task, first_seed) in enumerate(list(tasks.items())[:count]):
        with closing(catalog.open_environment(task, cameras)) as environment:
            start, visit = first_seed, 0
            environment.reset(start)
            for _ in range(count // len(tasks) + (number < count % len(tasks))):
                found.append(observation := environment.observe())
                advance(1)
                (chunk,) = policy.infer_batch([observation], [noise_seed(seed, task, start, visit)])
                done = any(environment.step(action).done for action in chunk.actions[: metadata["execution_horizon"]])
                visit += 1
                if done or visit == PER_EPISODE:
                    start, visit = start + 1, 0
                    environment.reset(start)
    return found


def solve(options: StepsOptions, policy: LocalPolicy, observations: list[Observation]) -> tuple[list[SolverError], float]:
    """A row for each setting, and the distance of the reference to one with half its steps; the prefix is encoded once."""
    model, flow = policy.model, policy.flow
    shape = (model.config.action_horizon, model.config.action_dim)
    compared = settings(options.evaluations, (*options.dopri5_tolerances, flow.tolerance), flow.num_flow_steps)
    inputs = policy.chain.observe(observations).to(policy.device)
    noise = np.stack([draw(options.seed, 0, index, 0, shape)[0] for index in range(len(observations))])
    state = inputs.state.cpu().numpy()

    def to_robot(actions: Tensor) -> Tensor:
        robot = policy.chain.inverse(Sample(state, actions.float().cpu().numpy())).actions
        assert robot is not None
        return torch.from_numpy(robot)

    with torch.inference_mode(), progress.step("solve", 1 + len(compared)) as bar:
        given = (flow, model.cached_velocity(inputs), torch.from_numpy(noise).to(policy.device), policy.mask(len(observations)))
        reference, floor = find_reference(*given, options.reference_steps)
        bar.advance()
        return errors(*given, reference, compared, to_robot, bar.advance), floor


def settings(evaluations: Sequence[int], tolerances: Sequence[float], first_steps: int) -> list[tuple[str, int, float | None]]:
    """(solver, num_flow_steps, solver_tolerance) of every setting.

    Each fixed-grid solver at each number of evaluations that is a multiple of its evaluations per step, then dopri5 at each tolerance,
    coarse to fine.
    """
    grids: list[tuple[str, int, float | None]] = [
        (solver, spent // num_evaluations(solver, 1), None)
        for solver in FIXED_GRID_SOLVERS
        for spent in sorted(set(evaluations))
        if spent % num_evaluations(solver, 1) == 0
    ]
    return grids + [(ADAPTIVE, first_steps, tolerance) for tolerance in sorted(set(tolerances), reverse=True)]


def find_reference(flow: FlowMatching, velocity: Velocity, noise: Tensor, mask: Tensor, num_flow_steps: int) -> tuple[Tensor, float]:
    """RK4 with `num_flow_steps` steps (even), and its RMS distance to RK4 with half of them."""
    coarse, fine = (flow.sample(velocity, noise, steps, REFERENCE, mask) for steps in (num_flow_steps // 2, num_flow_steps))
    return fine, _distance(coarse, fine, mask)[0]


def errors(
    flow: FlowMatching,
    velocity: Velocity,
    noise: Tensor,
    mask: Tensor,
    reference: Tensor,
    compared: Sequence[tuple[str, int, float | None]],
    to_robot: Callable[[Tensor], Tensor],
    advance: Callable[[], None] = lambda: None,
) -> list[SolverError]:
    """A row for each of `settings`, in order; all tensors [chunks, ...].

    to_robot: normalised chunks to robot units. advance: called after each row. Raises FlowError when a chunk is not finite.
    """
    exact, rows = to_robot(reference), []
    for solver, steps, tolerance in compared:
        counted = CountedVelocity(velocity)
        solved_by = flow if tolerance is None else replace(flow, tolerance=tolerance)
        actions = solved_by.sample(counted, noise, steps, solver, mask)
        robot = (to_robot(actions) - exact).flatten(1).double().square().mean(1).sqrt().tolist()
        rows.append(SolverError(solver, steps, tolerance, counted.num_evaluations, *_distance(actions, reference, mask), tuple(robot)))
        advance()
    return rows


def cheapest(rows: Sequence[SolverError], tolerance: float, own_tolerance: float) -> dict[str, SolverError]:
    """By solver, cheapest first, the coarsest row that is within `tolerance` (RMS) together with all finer rows.

    A solver that never reaches it is absent. Of dopri5 only the row at `own_tolerance` counts: a policy's options set no other.
    """
    found: dict[str, SolverError] = {}
    left: set[str] = set()
    for row in sorted(rows, key=lambda row: -row.evaluations):
        if row.solver not in left and row.solver_tolerance in (None, own_tolerance):
            if row.rms <= tolerance:
                found[row.solver] = row
            else:
                left.add(row.solver)
    return dict(sorted(found.items(), key=lambda item: (item[1].evaluations, item[1].rms)))


def observed_order(rows: Sequence[SolverError], solver: str, floor: float) -> float | None:
    """Minus the slope of log error against log steps, over the finest rows (at most 5) of a fixed grid whose error is above 10 `floor`.

    None with fewer than 3 rows; smaller errors are those of the reference, not of the solver.
    """
    own = [row for row in rows if row.solver == solver and row.rms > 10 * floor][-5:]
    if len(own) < 3 or solver not in FIXED_GRID_SOLVERS:
        return None
    return -float(np.polyfit(np.log([row.num_flow_steps for row in own]), np.log([row.rms for row in own]), 1)[0])


def _distance(a: Tensor, b: Tensor, mask: Tensor) -> tuple[float, float]:
    """(RMS, largest) of the difference over the real entries."""
    difference = (a.double() - b.double())[mask]
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def draw_figure(rows: Sequence[SolverError], floor: float, tolerance: float, chosen: SolverError | None, subject: str, path: Path) -> None:
    """Write the PNG: error against evaluations, a line for each solver. subject: the line below the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), dpi=160, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="RMS error, normalised units")
    for solver in dict.fromkeys(row.solver for row in rows):
        points = sorted((row.evaluations, row.rms) for row in rows if row.solver == solver and row.rms > 0)
        order, style = observed_order(rows, solver, floor), STYLES[solver]
        label = solver if order is None else f"{solver}, order {order:.1f}"
        axes.plot(*zip(*points, strict=True), marker=style[0], color=style[1:], markersize=5, label=label)
    axes.axhline(tolerance, color="#222222", linewidth=1.0, linestyle="--", label=f"tolerance {tolerance:g}")
    bottom = min(*(row.rms for row in rows if row.rms > 0), floor or tolerance, tolerance) / 2.5
    axes.set_ylim(bottom, 2 * max(*(row.rms for row in rows), tolerance))
    axes.axhspan(bottom, max(floor, bottom), color="#eeeeee", zorder=0, label="error of the reference")
    if chosen is not None:
        label = f"cheapest within {tolerance:g}: {chosen.solver}, steps: {chosen.num_flow_steps}, evaluations: {chosen.evaluations}"
        axes.plot([chosen.evaluations], [chosen.rms], "o", color="#222222", markersize=13, markerfacecolor="none", label=label)
    marks = sorted({1, 2, 5, 10, 20, 50, 100, 200, 500, 1000} & set(range(max(row.evaluations for row in rows) + 1)))
    axes.set_xticks(marks, [str(mark) for mark in marks], minor=False)
    axes.minorticks_off()
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.legend(fontsize=9, loc="lower left")
    axes.set_title(f"Error of a sampled action chunk\n{subject}", loc="left", fontsize=10)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    files.write_bytes(path, content.getvalue())
