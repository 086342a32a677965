"""`pi0fm bench learning`: success of pi0fm and of LeRobot's own PI0 after the same processor time.

Owns: the order demonstrations -> trainings and evaluations -> table and learning.json. Does not know: how either side trains.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import files, machine, options, progress
from pi0fm.bench.learning_config import LearningConfig, refuse_passed_over
from pi0fm.cluster.recording import record_demonstrations
from pi0fm.cluster.training import TrainingRun
from pi0fm.demos.config import DatasetName, DemosConfig
from pi0fm.eval.config import EvalConfig, camera_specs, plan, refuse_seen_seeds
from pi0fm.eval.evaluate import WorkerSetup, in_this_process, run_episodes, settings_for
from pi0fm.eval.report.page import percent
from pi0fm.eval.summary import Summary, summarize
from pi0fm.policy.bundle import PolicyConfig
from pi0fm.sim import catalog
from pi0fm_client.errors import OutputError
from pi0fm_client.types import Policy

HELP = "one task, the same data and processor time: pi0fm against LeRobot's own PI0"
Options = LearningConfig
ALIASES = {"tasks": "task", "repo_id": "dataset.repo_id", "root": "dataset.root"}
RESULT = "learning.json"
TITLES = {"pi0fm": "pi0fm", "lerobot": "LeRobot PI0"}


def run(config: LearningConfig) -> dict[str, Any]:
    """Record what is lacking, train and judge both sides, print the table; the result is what learning.json holds, but for the curves."""
    written = config.output_dir / RESULT
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise OutputError(f"output_dir must be a folder, found a file at {config.output_dir}; type --output_dir ANOTHER")
    if written.exists():
        raise OutputError(
            f"a comparison is never overwritten, and {written} is there; type --output_dir ANOTHER, and --dataset.root to reuse data"
        )
    base = options.decode(TrainingRun, options.read_files([str(config.config or options.shipped()["quickstart"])]))
    refuse_passed_over(base)
    config = _with_demonstrations(config)
    progress.say("loading LeRobot")
    from pi0fm.bench import learning, shared_data  # LeRobot's import alone takes many seconds

    trained = learning.comparable(base, config)
    data = shared_data.open_shared(trained, catalog.prompt_of(config.task))
    judge = _judge(config, trained.execution_horizon, data.policy)
    sizes = learning.parameters(data)
    progress.say(f"parameters: {sizes['pi0fm']:,} here; {sizes['lerobot']:,} there, of which {sizes['lerobot_used']:,} take part")
    outcomes = learning.compare(config, trained, data, judge)
    result = {
        "task": config.task,
        **learning.figures(outcomes),
        "parameters": sizes,
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }
    background = {"command": machine.command_line(), "training": options.encode(trained), "notes": learning.__doc__}
    files.write_json(written, result | {"curves": learning.curves(outcomes)} | background)
    _show(config, result)
    return result


def _with_demonstrations(config: LearningConfig) -> LearningConfig:
    """`config` with a data set; recorded beside the result when none was named, going on with what is there."""
    if not config.recorded:
        return config
    root = config.output_dir / "dataset"
    # in this process: what Ray leaves behind would run beside the trainings
    name = DatasetName("local/bench-learning", str(root))
    record_demonstrations(DemosConfig(config.task, config.demonstrations, dataset=name, num_workers=0))
    return replace(config, dataset=replace(config.dataset, root=root))


def _judge(config: LearningConfig, execution_horizon: int, policy: PolicyConfig) -> Callable[[Policy], Summary]:
    """The evaluation that both sides go through. Raises ConfigError for start positions that were demonstrated."""
    asked = EvalConfig(
        policy="both sides",
        tasks=(config.task,),
        episodes=config.episodes,
        first_seed=config.first_seed,
        max_steps=config.max_steps,
        execution_horizon=execution_horizon,
        videos_per_task=0,
    )
    metadata = policy.metadata()
    refuse_seen_seeds(asked, metadata)
    cameras = camera_specs(asked, metadata, catalog.find(config.task)[0])
    open_environment = partial(catalog.open_environment, cameras=cameras, max_steps=config.max_steps)

    def judge(judged: Policy) -> Summary:
        setup = WorkerSetup(lambda: judged, open_environment, settings_for(asked, metadata), asked.environments_per_worker)
        results = run_episodes(plan(asked), setup, in_this_process)
        for result in results:
            if result.error is not None:
                progress.say(f"CRASHED seed {result.seed}: {result.error}")
        return summarize(results, (config.task,))

    return judge


def _show(config: LearningConfig, result: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="")
    table.add_column("seed")
    for side in config.sides:
        for heading in (f"{TITLES[side]} success", "CPU-seconds", "steps"):
            table.add_column(heading, justify="right")
    for seed in range(config.seeds):
        table.add_row(str(seed), *(cell for side in config.sides for cell in _cells(result[side], seed)))
    console = Console(stderr=True, highlight=False, width=max(100, Console(stderr=True).width))
    console.print()
    console.print(table)
    progress.say(f"{config.task}, {config.episodes} start positions; loss curves and conditions: {config.output_dir / RESULT}")


def _cells(side: dict[str, list[Any]], seed: int) -> tuple[str, str, str]:
    success = side["success"][seed]
    return "unknown" if success is None else percent(success), f"{side['cpu_seconds'][seed]:.1f}", str(side["steps"][seed])
