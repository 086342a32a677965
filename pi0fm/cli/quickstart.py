"""`pi0fm quickstart`: the five commands one after the other, as a cluster would run them with another configuration.

Owns: the order, the last screen, the combined figures. Does not know: how any of the five works.

    demos -> train -> eval --------------------> report
                 `-> serve (a separate process) --> eval over the socket
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pi0fm import files, machine, options, progress
from pi0fm.cli import bench
from pi0fm.cluster.runtime import ray_session
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.demos.config import DatasetName, DemosConfig
from pi0fm.eval.config import EvalConfig
from pi0fm.eval.report.page import JOURNAL
from pi0fm.options import option, refuse_below
from pi0fm.processes import PeakMemory
from pi0fm.train.watch.metrics import read_last
from pi0fm_client.errors import OutputError, ServingError

if TYPE_CHECKING:
    from pi0fm.eval.evaluate import Evaluation

HELP = "record, train, evaluate, serve and evaluate over the network, with one command"
ALIASES: dict[str, str] = {}
SERVE = """
import sys
from pi0fm.cli.main import main
from pi0fm.processes import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
sys.exit(main())
"""


@dataclass(frozen=True)
class QuickstartConfig:
    """Options of `pi0fm quickstart`."""

    output_dir: Path = option(Path("outputs/quickstart"), "folder of everything: data set, run, bundle, reports")
    resume: bool = option(False, "continue an interrupted quickstart in output_dir")
    config: Path | None = option(None, "the training configuration; configs/quickstart.yaml when not given")
    tasks: tuple[str, ...] = option(("button-press-topdown-v3", "drawer-open-v3", "handle-press-v3"), "tasks of the policy")
    demonstrations: int = option(50, "demonstrations of each task")
    episodes: int = option(20, "evaluation episodes of each task, on seeds that no demonstration used")
    served_episodes: int = option(4, "episodes of each task over the socket")
    steps: int | None = option(None, "training steps; the configuration's when not given")
    seed: int = option(0, "seed of the training")
    num_workers: int | None = option(None, "processes that simulate; every core when not given")
    ablate: bool = option(False, "also evaluate with the picture frozen and with the prompts swapped")

    def __post_init__(self) -> None:
        refuse_below(self, demonstrations=1, episodes=1, served_episodes=1, steps=1, seed=0, num_workers=0)


Options = QuickstartConfig


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Run the five commands and return the combined figures."""
    from pi0fm.cluster.recording import record_demonstrations
    from pi0fm.eval.report.filmstrip import write_filmstrip

    root = config.output_dir.absolute()
    files.make_folder(root)
    if any(root.iterdir()) and not config.resume:
        raise OutputError(f"{root} is not empty; add --resume true to go on with it, or choose another --output_dir")
    with PeakMemory() as memory, ray_session():
        _heading(1, f"{config.demonstrations} demonstrations of each task, by scripted experts")
        dataset = DatasetName("local/quickstart", str(root / "dataset"))
        demos = DemosConfig(tasks=config.tasks, episodes=config.demonstrations, dataset=dataset)
        demos = demos if config.num_workers is None else replace(demos, num_workers=config.num_workers)
        record_demonstrations(demos)

        _heading(2, "training on Ray")
        trained = _train(config, root)

        _heading(3, f"evaluation in simulation, {config.episodes} new start positions a task")
        judge = EvalConfig(
            policy=str(trained),
            tasks=config.tasks,
            episodes=config.episodes,
            output_dir=str(_fresh(root / "eval")),
            num_workers=config.num_workers,
            metrics=str(trained.parent / "metrics.jsonl"),
        )
        reached = _evaluate(judge)
        changes = {}
        for change in ("frozen_image", "swapped_prompt") if config.ablate else ():
            progress.say(f"\nablation: {change.replace('_', ' ')}")
            changes[change] = _evaluate(replace(judge, observation_change=change, output_dir=str(_fresh(root / f"eval-{change}"))))

        _heading(4, "serving the policy")
        with _server(trained) as url:
            progress.say(f"ready at {url}")
            _heading(5, f"evaluation over the socket, {config.served_episodes} start positions a task")
            over_socket = replace(judge, policy=url, episodes=config.served_episodes, output_dir=str(_fresh(root / "eval-served")))
            served = _evaluate(over_socket)
    picture = write_filmstrip(reached.output_dir, root / "filmstrip.png")
    result = {
        "mean_success": _rounded(reached),
        "success": reached.json()["success"],
        "seconds": round(time.time() - psutil.Process().create_time(), 1),
        "peak_memory_bytes": memory.peak,
        "bundle": str(trained),
        "report": str(reached.report),
        "served_mean_success": _rounded(served),
        "dataset": str(root / "dataset"),
        "filmstrip": str(picture),
        **{name: _rounded(change) for name, change in changes.items()},
    }
    _last_screen(config, result, {"in process": reached, "over the socket": served, **changes})
    return result


def _train(config: QuickstartConfig, root: Path) -> Path:
    """Train and return the bundle. A run that is complete is not run again."""
    from pi0fm.cluster.training import run_training  # torch: seconds, which --help need not wait for

    folder = root / "train"
    tree = options.read_files([str(config.config or options.shipped()["quickstart"])])
    over: dict[str, Any] = {"output_dir": str(folder), "dataset": {"root": str(root / "dataset")}, "seed": config.seed}
    if config.steps is not None:
        over["steps"] = config.steps
    run = options.decode(TrainingRun, options.merge(tree, over))
    run = replace(run, num_workers=min(run.workers[1], machine.cores()))
    if int((read_last(folder) or {}).get("step", 0)) >= run.steps and (folder / "bundle").exists():
        progress.say(f"the run in {folder} is complete")
        return folder / "bundle"
    return run_training(replace(run, resume="auto")).bundle


def _evaluate(config: EvalConfig) -> "Evaluation":
    from pi0fm.cli.judging import eval as eval_command
    from pi0fm.cluster.evaluation import evaluate_on_cluster

    evaluation = evaluate_on_cluster(config)
    eval_command.show(evaluation)
    return evaluation


@contextlib.contextmanager
def _server(bundle: Path) -> Iterator[str]:
    """Start `pi0fm serve` on a free port; yield its URL once it is warm. The server ends with this process."""
    command = [sys.executable, "-c", SERVE, str(os.getpid()), "serve", "--bundle", str(bundle), "--port", "0"]
    with (bundle.parent / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # one line when warm, or the end of a process that could not start
        if not line:
            raise ServingError(f"the server did not start; {bundle.parent / 'serve.log'} says why")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def _fresh(folder: Path) -> Path:
    """Return `folder` if it is new or holds an unfinished evaluation, else the next such name: a finished one is never overwritten."""
    number, candidate = 2, folder
    while candidate.exists() and not (candidate / JOURNAL).exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def _rounded(evaluation: "Evaluation") -> float | None:
    mean = evaluation.json()["mean_success"]
    return None if mean is None else round(float(mean), 4)


def _heading(number: int, text: str) -> None:
    progress.say(f"\n[{number}/5] {text}")


def _last_screen(config: QuickstartConfig, result: Mapping[str, Any], sides: "Mapping[str, Evaluation]") -> None:
    bench.show({"successes": {task: {name: _cell(side, task) for name, side in sides.items()} for task in config.tasks}})
    progress.say(f"{result['seconds'] / 60:.1f} minutes, peak {result['peak_memory_bytes'] / 2**30:.1f} GiB")
    places = {"policy": result["bundle"], "report": result["report"], "picture": result["filmstrip"], "data set": result["dataset"]}
    for name, place in {**places, "serve it": f"pi0fm serve --bundle {result['bundle']}"}.items():
        progress.say(f"{name:>9}  {place}")


def _cell(evaluation: "Evaluation", task: str) -> str:
    row = next(row for row in evaluation.summary.tasks if row.task == task)
    return f"{row.successes}/{row.trials}" + (f" ({row.crashes} crashed)" if row.crashes else "")
