"""`pi0fm flow steps BUNDLE`: what each solver's steps cost in accuracy, and the cheapest at a given tolerance.

Owns: the options, the order load -> observations -> reference -> table -> figure, what is printed. Does not know: how errors are found.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pi0fm import files, progress
from pi0fm.data.columns.lerobot_source import DatasetConfig
from pi0fm.options import option, required
from pi0fm_client.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from pi0fm.bench.flow_steps import Reference, Row
    from pi0fm.policy.local import LocalPolicy
    from pi0fm_client.types import Observation

HELP = "the error of a chunk against the evaluations of the network, for every solver"
ALIASES = {"repo_id": "dataset.repo_id", "root": "dataset.root", "policy.path": "bundle"}
POSITIONAL = "bundle"
RESULT, FIGURE = "steps.json", "steps.png"


@dataclass(frozen=True)
class FlowStepsConfig:
    """Options of `pi0fm flow steps`. Raises ConfigError for a value out of range."""

    bundle: Path = required("folder of the policy, as pi0fm train wrote it")
    dataset: DatasetConfig = option(DatasetConfig, "")
    output_dir: Path = option(Path("outputs/flow-steps"), "folder of steps.json and steps.png")
    tolerance: float = option(0.05, "RMS error of a chunk that is accepted, in normalised units")
    observations: int = option(8, "from the data set, where one is named, else from the simulator at seeds that were not demonstrated")
    evaluations: tuple[int, ...] = option((1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 64, 100), "budgets of the fixed-grid solvers")
    dopri5_tolerances: tuple[float, ...] = option((1e-1, 1e-2, 1e-3, 1e-4), "tolerances of dopri5, beside the bundle's own")
    reference_steps: int = option(256, "RK4 steps of what counts as exact, an even number")
    seed: int = option(0, "of the noise that every chunk starts from")
    device: str | None = option(None, "cpu, cuda or cuda:N; the best one that works when not given")
    threads: int | None = option(None, "CPU threads; torch's choice when not given")

    def __post_init__(self) -> None:
        for name in ("tolerance", "dopri5_tolerances"):
            value = getattr(self, name)
            if not all(0 < each < math.inf for each in (value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"{name} must be above 0, found {value}; type --{name} 0.01")
        if self.observations < 1 or self.seed < 0:
            raise ConfigError(f"observations must be >= 1 and seed >= 0, found {self.observations} and {self.seed}")
        if not self.evaluations or min(self.evaluations) < 1:
            raise ConfigError(f"evaluations must be numbers >= 1, found {self.evaluations}; type --evaluations 4,8,16")
        if self.reference_steps % 2 or self.reference_steps < max(self.evaluations):
            raise ConfigError(
                f"reference_steps must be even and at least the largest of evaluations, {max(self.evaluations)}, so that the reference "
                f"is finer than all that is held to it; found {self.reference_steps}"
            )


Options = FlowStepsConfig


def run(config: FlowStepsConfig) -> dict[str, Any]:
    """Measure, print the tables, write steps.json and steps.png; the result holds `error` by solver and evaluations, and `cheapest`."""
    written = config.output_dir / RESULT
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise OutputError(f"output_dir must be a folder, found a file at {config.output_dir}; type --output_dir ANOTHER")
    if written.exists():
        raise OutputError(f"a table is never overwritten, and {written} is there; type --output_dir ANOTHER")
    progress.say(f"loading {config.bundle}")
    # Imported here: torch takes seconds, and a folder in use should be told at once.
    from pi0fm import machine
    from pi0fm.bench import flow_steps
    from pi0fm.bench.flow_steps_figure import draw
    from pi0fm.policy import bundle

    # float32: in bfloat16 the rounding of the network would be most of what is measured
    policy = bundle.load(config.bundle, device=config.device, precision="float32", threads=config.threads)
    observations, where = _observations(config, policy)
    reference, rows = _solve(config, policy, observations)
    found = flow_steps.cheapest(rows, config.tolerance, policy.flow.tolerance)
    chosen = next(iter(found.values()), None)
    subject = f"{len(observations)} chunks from {where}; reference: rk4, {reference.num_flow_steps} steps"
    draw(rows, reference, config.tolerance, chosen, subject, config.output_dir / FIGURE)
    orders = {row.setting.solver: flow_steps.observed_order(rows, row.setting.solver, reference.rms) for row in rows}
    result = {
        "error": flow_steps.errors(rows),
        "cheapest": _chosen(chosen, config.tolerance),
        "reference": {"solver": flow_steps.REFERENCE, "num_flow_steps": reference.num_flow_steps, "rms_to_half": reference.rms},
        "order": {solver: round(order, 2) for solver, order in orders.items() if order is not None},
        "observations": len(observations),
        "table": str(written),
        "figure": str(config.output_dir / FIGURE),
    }
    background = {
        "bundle": str(config.bundle),
        "where": where,
        "seed": config.seed,
        "rows": [_plain(row) for row in rows],
        "command": machine.command_line(),
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }
    files.write_json(written, result | background)
    _show(config, rows, found, reference)
    return result


def _observations(config: FlowStepsConfig, policy: "LocalPolicy") -> tuple[list["Observation"], str]:
    """Observations, and where they are from in a few words."""
    from pi0fm.bench.policy_observations import from_dataset, from_simulator, simulated_tasks

    if config.dataset.root is not None or config.dataset.repo_id:
        name = config.dataset.repo_id or Path(str(config.dataset.root)).name
        return from_dataset(policy.chain, config.dataset, config.observations), f"the data set {name}"
    tasks = simulated_tasks(policy.metadata)
    with progress.step("simulate", config.observations) as bar:
        found = from_simulator(policy, config.observations, config.seed, bar.advance)
    return found, f"the simulator ({', '.join(tasks)})" if len(tasks) < 4 else f"the simulator ({len(tasks)} tasks)"


def _solve(config: FlowStepsConfig, policy: "LocalPolicy", observations: list["Observation"]) -> tuple["Reference", list["Row"]]:
    """The reference and a row for each setting; the prefix is encoded once, and every setting starts from the same noise."""
    import numpy as np
    import torch

    from pi0fm.bench import flow_steps
    from pi0fm.data.chain import Sample
    from pi0fm.data.order.counter import draw

    model, flow = policy.model, policy.flow
    shape = (model.config.action_horizon, model.config.action_dim)
    compared = flow_steps.settings(config.evaluations, (*config.dopri5_tolerances, flow.tolerance), flow.num_flow_steps)
    inputs = policy.chain.observe(observations).to(policy.device)
    noise = torch.from_numpy(np.stack([draw(config.seed, 0, index, 0, shape)[0] for index in range(len(observations))])).to(policy.device)
    mask = policy.mask(len(observations))
    state = inputs.state.cpu().numpy()

    def to_robot(actions: torch.Tensor) -> torch.Tensor:
        robot = policy.chain.inverse(Sample(state, actions.float().cpu().numpy())).actions
        assert robot is not None
        return torch.from_numpy(robot)

    finest = flow_steps.Setting(flow_steps.REFERENCE, config.reference_steps).expected_evaluations
    total = finest + finest // 2 + sum(setting.expected_evaluations for setting in compared)
    with torch.inference_mode(), progress.step("solve", total) as bar:
        velocity = model.field(inputs)
        reference = flow_steps.find_reference(flow, velocity, noise, mask, config.reference_steps, bar.advance)
        return reference, flow_steps.measure(flow, velocity, noise, mask, reference, compared, to_robot, bar.advance)


def _typed(row: "Row") -> str:
    """What a user types to have this setting in serving and evaluation."""
    return f"--solver {row.setting.solver} --num_flow_steps {row.setting.num_flow_steps}"


def _chosen(row: "Row | None", tolerance: float) -> dict[str, Any]:
    """The cheapest setting for JSON; without a solver where none reaches the tolerance."""
    if row is None:
        return {"tolerance": tolerance, "solver": None}
    return {"tolerance": tolerance, **_plain(row), "options": _typed(row)}


def _plain(row: "Row") -> dict[str, Any]:
    return {
        "solver": row.setting.solver,
        "num_flow_steps": row.setting.num_flow_steps,
        "solver_tolerance": row.setting.tolerance,
        "evaluations": row.evaluations,
        "rms": row.rms,
        "largest": row.largest,
        "robot_rms_per_chunk": list(row.robot_rms),
    }


def _show(config: FlowStepsConfig, rows: list["Row"], found: dict[str, "Row"], reference: "Reference") -> None:
    """The errors by evaluations and solver, and the cheapest setting of each solver, on standard error."""
    solvers = list(dict.fromkeys(row.setting.solver for row in rows))
    by_place = {(row.evaluations, row.setting.solver): row.rms for row in rows}
    table = Table(box=None, padding=(0, 2), header_style="", title="RMS error of a chunk, normalised units", title_justify="left")
    table.add_column("evaluations", justify="right")
    for solver in solvers:
        table.add_column(solver, justify="right")
    for evaluations in sorted({row.evaluations for row in rows}):
        cells = [by_place.get((evaluations, solver)) for solver in solvers]
        table.add_row(str(evaluations), *("" if cell is None else _cell(cell, config.tolerance) for cell in cells))
    console = Console(stderr=True, highlight=False, width=max(110, Console(stderr=True).width))
    console.print(table)
    console.print(f"reference: rk4, {reference.num_flow_steps} steps in float32; half its steps end {reference.rms:.1e} from it (RMS)\n")
    best = Table(box=None, padding=(0, 2), header_style="", title=f"cheapest within {config.tolerance:g}", title_justify="left")
    for heading in ("solver", "evaluations", "RMS", "largest", "robot units", "type"):
        best.add_column(heading, justify="left" if heading in ("solver", "type") else "right", no_wrap=True)
    for solver, row in found.items():
        best.add_row(solver, str(row.evaluations), f"{row.rms:.2e}", f"{row.largest:.2e}", f"{row.mean_robot_rms:.2e}", _typed(row))
    if found:
        console.print(best)
        progress.say(f"\ncheapest: {_typed(next(iter(found.values())))}; figure: {config.output_dir / FIGURE}")
    else:
        progress.say(
            f"no setting reaches {config.tolerance:g}: type a larger --tolerance, or more --evaluations; see {config.output_dir / FIGURE}"
        )


def _cell(error: float, tolerance: float) -> str:
    return f"[bold green]{error:.2e}[/]" if error <= tolerance else f"{error:.2e}"
