"""`pi0fm eval POLICY`: evaluate a policy in simulation, with `--realtime.*` in real time, with `--follow.run` during its training, or with
`--dataset.root` on recorded episodes.

Owns: the choice among the four, the printed tables. Does not know: how each runs.
"""

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pi0fm import progress
from pi0fm.cli import lerobot
from pi0fm.eval.config import EvalConfig, FollowConfig
from pi0fm.eval.recorded_config import OpenLoopConfig
from pi0fm.eval.report.page import percent
from pi0fm.eval.rollouts.delays import RealtimeConfig, evaluate_in_real_time
from pi0fm.eval.statistics import Interval
from pi0fm_client.errors import ConfigError

if TYPE_CHECKING:
    from pi0fm.eval.evaluate import Evaluation

HELP = (
    "evaluate a policy in simulation; on recorded episodes with --dataset.root DIR, in real time with --realtime.delays_ms MS, or while it "
    "trains with --follow.run RUN"
)
OPEN_LOOP = "compare a policy's action chunks with those of recorded episodes"
FOLLOWED = "evaluate each bundle of a training run while it trains; the best is kept, and the run may be stopped early"
REAL_TIME = "evaluate a policy in a simulator that does not wait for it: success, jumps and reaction time against delay"
Options = EvalConfig
ALIASES = lerobot.EVAL
POSITIONAL = "policy"


def form(words: Sequence[str]) -> Any:
    """Choose the evaluation by its options: on recorded episodes, in real time, following a run, else in simulation."""
    forms = {"--dataset.": ON_EPISODES, "--realtime.": IN_REAL_TIME, "--follow.": FOLLOWING}
    found = [each for start, each in forms.items() if any(word.startswith(start) for word in words)]
    if len(found) > 1:
        raise ConfigError("--dataset.*, --realtime.* and --follow.* are different evaluations: leave all but one out")
    return found[0] if found else sys.modules[__name__]


def run(options: EvalConfig) -> dict[str, Any]:
    """Evaluate, print a table, return the figures."""
    from pi0fm.cluster.evaluation import evaluate_on_cluster

    evaluation = evaluate_on_cluster(options)
    show(evaluation)
    return evaluation.json()


def run_following(options: FollowConfig) -> dict[str, Any]:
    """Evaluate each bundle of the run, return the figures."""
    from pi0fm.cluster.following import follow  # torch: seconds, which --help need not wait for

    return follow(options)


def run_open_loop(options: OpenLoopConfig) -> dict[str, Any]:
    """Compare, print a table, return the figures."""
    from pi0fm.eval.open_loop import evaluate_open_loop  # torch, as above

    figures, found = evaluate_open_loop(options)
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("dimension")
    for heading in ("error", "standing still", "mean chunk"):
        table.add_column(heading, justify="right")
    for name, *errors in zip(found.names, *(found.by_dimension(which) for which in ("error", "still", "mean")), strict=True):
        table.add_row(name, *(f"{error:.4g}" for error in errors))
    Console(stderr=True, highlight=False, markup=False).print(table)
    low_high = " ({:.2f} to {:.2f})".format(*found.over_still.interval) if found.over_still.interval else ""
    progress.say(
        f"of the error of standing still: {found.over_still.value:.2f}{low_high}; of the mean chunk's: {found.over_mean.value:.2f}"
    )
    progress.say(f"report: {figures['report']}")
    return figures


def run_in_real_time(options: RealtimeConfig) -> dict[str, Any]:
    """Evaluate in real time, print a table, return the figures."""
    figures, cells = evaluate_in_real_time(options)
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("mode")
    for heading in ("delay", "success", "95 % interval", "reaction", "jump", "at a standstill"):
        table.add_column(heading, justify="right")
    for cell in cells:
        rate, interval = _texts(cell.success)
        delay = f"{cell.delay_ms:.0f} ms measured" if cell.asked_ms is None else f"{cell.asked_ms:.0f} ms"
        table.add_row(cell.mode, delay, rate, interval, f"{cell.reaction_ms:.0f} ms", f"{cell.jump:.3f}", percent(cell.held))
    Console(stderr=True, highlight=False, markup=False, width=max(110, Console(stderr=True).width)).print(table)
    progress.say(f"report: {figures['report']}")
    return figures


def show(evaluation: "Evaluation") -> None:
    """Print the table of tasks, and warnings of crashes, to standard error."""
    summary = evaluation.summary
    table = Table(box=None, padding=(0, 2), header_style="")
    for heading, side in (("task", "left"), ("success", "right"), ("95 % interval", "right"), ("episodes", "right"), ("crashes", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for task in summary.tasks:
        rate, interval = _texts(task.interval)
        table.add_row(task.task, rate, interval, str(task.trials), f"[bold red]{task.crashes}[/]" if task.crashes else "0")
    rate, interval = _texts(summary.mean)
    trials = sum(task.trials for task in summary.tasks)
    table.add_row("[bold]mean over tasks[/]", f"[bold]{rate}[/]", interval, str(trials), str(summary.crashes))
    console = Console(stderr=True, highlight=False)
    console.print(table)
    for line in summary.warnings():
        console.print(f"[bold red]CRASHES[/] {line}")
    for task in summary.tasks:
        for scores in task.scores:
            means = f"mean log-likelihood {scores.log_prob:.2f} nats, noise norm {scores.noise_norm:.3f}"
            console.print(f"{task.task}, {scores.outcome}, {scores.episodes} episodes: {means}")
        for outcome, (alarmed, episodes) in task.alarmed.items():
            console.print(f"{task.task}, {outcome}: the policy raised an alarm in {alarmed} of {episodes} episodes")
    progress.say(f"report: {evaluation.report}")


def _texts(interval: Interval | None) -> tuple[str, str]:
    if interval is None:
        return "unknown", ""
    return percent(interval.rate), f"{percent(interval.low)} to {percent(interval.high)}"


ON_EPISODES = SimpleNamespace(
    HELP=OPEN_LOOP, Options=OpenLoopConfig, ALIASES={"policy.path": "policy"}, POSITIONAL=POSITIONAL, run=run_open_loop
)
FOLLOWING = SimpleNamespace(
    HELP=FOLLOWED,
    Options=FollowConfig,
    ALIASES={"eval.n_episodes": "episodes", "env.task": "tasks"},
    POSITIONAL=POSITIONAL,
    run=run_following,
)
IN_REAL_TIME = SimpleNamespace(
    HELP=REAL_TIME,
    Options=RealtimeConfig,
    ALIASES=lerobot.EVAL,
    POSITIONAL=POSITIONAL,
    run=run_in_real_time,
)
