"""`pi0fm eval`: judge a policy in simulation.

Owns: the printed table. Does not know: how the evaluation runs.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import progress
from pi0fm.cluster.evaluation import evaluate_on_cluster
from pi0fm.eval.config import EvalConfig
from pi0fm.eval.evaluate import Evaluation
from pi0fm.eval.report.page import percent
from pi0fm.eval.statistics import Interval

HELP = "judge a policy in simulation"
Options = EvalConfig
ALIASES: dict[str, str] = {"policy.path": "policy", "eval.n_episodes": "episodes", "env.task": "tasks"}


def run(options: EvalConfig) -> dict[str, Any]:
    """Evaluate, print a table, return the figures."""
    evaluation = evaluate_on_cluster(options)
    show(evaluation)
    return evaluation.json()


def show(evaluation: Evaluation) -> None:
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
    progress.say(f"report: {evaluation.report}")


def _texts(interval: Interval | None) -> tuple[str, str]:
    if interval is None:
        return "unknown", ""
    return percent(interval.rate), f"{percent(interval.low)} to {percent(interval.high)}"
