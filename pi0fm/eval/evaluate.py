"""Evaluation, from its configuration to its report.

Owns: the order policy -> episodes -> report. Does not know: how an episode is run (rollout), the page (report/page), Ray.

    evaluate ── plan ──> execute(episodes, setup) ──results, one by one──> journal: row, video ──> summary ──> report.html
                         '- in_this_process, or actors of pi0fm.cluster
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pi0fm import files, machine, progress
from pi0fm.eval.config import EvalConfig, checked_cameras, plan, refuse_seen_seeds, resolve_execution_horizon
from pi0fm.eval.policy import open_policy, read_metadata
from pi0fm.eval.report import curve
from pi0fm.eval.report import page as report
from pi0fm.eval.rollouts.episode import Episode, EpisodeResult, RolloutSettings
from pi0fm.eval.rollouts.journal import Journal
from pi0fm.eval.rollouts.rollout import BatchedRollout, OpenEnvironment, run_all
from pi0fm.eval.statistics import mean_over_tasks
from pi0fm.eval.summary import Summary, summarize
from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec
from pi0fm.sim.suite import Suite
from pi0fm_client.types import Policy

NOISY = "euler_maruyama"  # flow.solver.EULER_MARUYAMA: that module imports torch, which a driver of remote policies does not need


@dataclass(frozen=True)
class WorkerSetup:
    """Policy, environments and settings of one process that runs episodes; both openers can be pickled."""

    open_policy: Callable[[], Policy]
    open_environment: OpenEnvironment
    settings: RolloutSettings
    environments_per_worker: int = 10
    gpus_per_worker: float = 0.0

    def rollout(self, num_environments: int) -> BatchedRollout:
        """Open the policy, for `num_environments` episodes at a time."""
        return BatchedRollout(self.open_environment, self.open_policy(), self.settings, num_environments)


Executor = Callable[[Sequence[Episode], WorkerSetup], Iterator[EpisodeResult]]
"""Function that runs episodes and yields their results in any order; the results do not depend on the executor."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of an evaluation and the path of its report."""

    summary: Summary
    rows: tuple[dict[str, Any], ...]
    seconds: float
    report: Path
    output_dir: Path
    suites: Sequence[Suite]

    def json(self) -> dict[str, Any]:
        """Return the last line of the command."""
        place = {"seconds": round(self.seconds, 1), "report": str(self.report), "output_dir": str(self.output_dir)}
        return self.summary.json() | {"by_suite": {suite.name: self._of(suite) for suite in self.suites}} | place

    def _of(self, suite: Suite) -> dict[str, Any]:
        """Return the figures of one suite, with the mean of each published group whose tasks were all evaluated."""
        figures = self.summary.for_tasks([catalog.report_name(f"{suite.name}/{task}") for task in suite.tasks]).json()
        counts = {row.task: (row.successes, row.trials) for row in self.summary.tasks}
        named = {
            group: [counts.get(catalog.report_name(f"{suite.name}/{task}"), (0, 0)) for task in tasks]
            for group, tasks in suite.groups.items()
        }
        groups = {group: round(mean_over_tasks(each).rate, 6) for group, each in named.items() if all(trials for _, trials in each)}
        own = {name: figures[name] for name in ("mean_success", "mean_interval", "episodes", "crashes")}
        return own | ({"groups": groups} if groups else {})


def evaluate(config: EvalConfig, execute: Executor) -> Evaluation:
    """Evaluate a policy and write the report; continue an interrupted evaluation of the same settings in `output_dir`.

    Raises OutputError for a folder that holds another evaluation or cannot be written, BundleError or ServingError for the policy,
    ConfigError for demonstrated seeds, an unknown task or camera, and tasks that do not fit the policy, SimulationError for a machine
    that cannot render.
    """
    began = time.monotonic()
    output_dir = Path(config.output_dir)
    report.refuse_other_evaluation(output_dir)
    suites = catalog.suites_of(config.tasks)
    losses = curve.read_losses(Path(config.metrics)) if config.metrics else []
    metadata = read_metadata(config)
    refuse_seen_seeds(config, metadata)
    cameras = checked_cameras(config, metadata)
    settings = settings_for(config, metadata)
    open_environment = partial(catalog.open_environment, cameras=cameras, max_steps=config.max_steps)
    setup = WorkerSetup(partial(_open_policy, config), open_environment, settings, config.environments_per_worker, config.gpus_per_worker)
    facts = _settings_facts(config, settings, cameras, metadata)
    with Journal(output_dir, _identity(config, facts, metadata)) as journal:
        results = run_episodes(plan(config), setup, execute, journal)
        summary, rows = summarize(results, config.tasks), [result.row() for result in results]
        seconds = time.monotonic() - began
        context = report.ReportContext(
            title=config.policy,
            command=machine.command_line(),
            seconds=seconds,
            observation_change=config.observation_change,
            facts={
                "policy": {name: str(value) for name, value in metadata.items() if isinstance(value, str | int | float)}
                | {name: str(value) for name, value in dict(metadata.get("training") or {}).items()},
                "settings": facts,
                "sentences": {task: catalog.prompt_of(task) for task in config.tasks},
                "machine": machine.describe_machine(),
                "versions": machine.describe_versions(*sorted({package for suite in suites for package in suite.packages})),
            },
            losses=losses,
        )
        with files.write_faults(output_dir):
            path = report.write(output_dir, summary, rows, context)
            journal.remove()
    return Evaluation(summary, tuple(rows), seconds, path, output_dir, suites)


def run_episodes(episodes: Sequence[Episode], setup: WorkerSetup, execute: Executor, journal: Journal | None = None) -> list[EpisodeResult]:
    """Run the `episodes` that are not in `journal`, with a progress line; return the results of all, in order."""
    found = journal.finished(episodes) if journal else {}
    successes, crashes = (sum(result.outcome == outcome for result in found.values()) for outcome in ("success", "crash"))
    left = [episode for episode in episodes if (episode.task, episode.seed) not in found]
    with progress.step("evaluating", len(episodes), start=len(found)) as bar:
        for result in execute(left, setup) if left else ():
            found[result.task, result.seed] = journal.add(result) if journal else replace(result, video=None)
            successes += result.outcome == "success"
            crashes += result.outcome == "crash"
            bar.advance(note=f"success {successes}/{len(found) - crashes}" + (f", {crashes} CRASHED" if crashes else ""))
    return [found[episode.task, episode.seed] for episode in episodes]


def in_this_process(episodes: Sequence[Episode], setup: WorkerSetup) -> Iterator[EpisodeResult]:
    """Run episodes in this process; an Executor."""
    rollout = setup.rollout(min(setup.environments_per_worker, len(episodes)))
    try:
        yield from run_all(episodes, rollout)
    finally:
        rollout.close()


def settings_for(config: EvalConfig, metadata: Mapping[str, Any]) -> RolloutSettings:
    """Return the settings of the episodes; the policy's for options that are not given."""
    return RolloutSettings(resolve_execution_horizon(config, metadata), config.seed, config.observation_change, tuple(config.tasks))


def _open_policy(config: EvalConfig) -> Policy:
    policy = open_policy(config, config.environments_per_worker)
    if not config.scores:
        return policy
    from pi0fm.policy.local import LocalPolicy, Scoring
    from pi0fm.policy.sampling.scores import ScoreOptions

    assert isinstance(policy, LocalPolicy)
    return Scoring(policy, ScoreOptions(config.score_probes))


def _identity(config: EvalConfig, facts: Mapping[str, str], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Collect everything that an episode's result depends on, except its task and seed."""
    told = json.dumps(dict(metadata), default=str, sort_keys=True)  # includes a bundle's identity
    own = {"policy": hashlib.sha256(told.encode()).hexdigest()}
    own |= {name: str(getattr(config, name)) for name in ("robot", "compile", "device", "precision", "threads")}
    ring = ",".join(config.tasks) if config.observation_change == "swapped_prompt" else ""
    return own | {name: value for name, value in facts.items() if name != "seeds"} | {"swapped among": ring}


def _settings_facts(
    config: EvalConfig, settings: RolloutSettings, cameras: Sequence[CameraSpec], metadata: Mapping[str, Any]
) -> dict[str, str]:
    solver = config.solver or str(metadata.get("solver", "the policy's own"))
    level = metadata.get("noise_level", 1.0) if config.noise_level is None else config.noise_level
    limits = {config.max_steps or suite.tasks[name].max_steps for suite, name in map(catalog.find, config.tasks)}
    return {
        "seeds": f"{config.first_seed} to {config.first_seed + config.episodes - 1}",
        "max steps": ", ".join(map(str, sorted(limits))),
        "execution horizon": str(settings.execution_horizon),
        "cameras": ", ".join(map(str, cameras)),
        "flow steps": str(config.num_flow_steps or metadata.get("num_flow_steps", "the policy's own")),
        "solver": f"{solver}, noise level {level}" if solver == NOISY else solver,
        "scores": _scores_fact(config),
        "noise seed": str(config.seed),
        "observation change": config.observation_change,
    }


def _scores_fact(config: EvalConfig) -> str:
    if not config.scores:
        return "none"
    return f"log-likelihood by Hutchinson's estimate, probes: {config.score_probes}" if config.score_probes else "exact log-likelihood"
