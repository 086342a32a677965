"""An evaluation over cores and nodes: Ray actors that pull episodes, or the calling process.

Owns: which process runs which episode, the restart of an actor, the order policy -> episodes -> report.
Does not know: how an episode is run (eval/rollout), what the page looks like (eval/report/page).

    driver   ledger ---episodes that fit---> actor 0: policy, environments, one round ---results---> ledger, videos/, progress
                    ---episodes that fit---> actor 1: policy, environments, one round ---results--->
One call is one round, so at most `environments_per_worker` episodes and their videos are in flight at an actor.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

from pi0fm import machine, progress
from pi0fm.cluster.ledger import Ledger
from pi0fm.cluster.runtime import ONE_THREAD, ray_session, require_resources
from pi0fm.eval.config import DEFAULT_EXECUTION_HORIZON, EvalConfig, camera_specs, plan, refuse_seen_seeds
from pi0fm.eval.episode import Episode, EpisodeResult, RolloutSettings, one_line
from pi0fm.eval.report import curve
from pi0fm.eval.report import page as report
from pi0fm.eval.rollout import Lockstep, OpenEnvironment, run_all
from pi0fm.eval.summary import Summary, summarize
from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec
from pi0fm.sim.suite import Suite
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Policy

NOISY = "euler_maruyama"  # flow.solver.EULER_MARUYAMA: that module imports torch, which a driver of remote policies does without


@dataclass(frozen=True)
class Setup:
    """What a worker needs. Both openers travel to other processes: functions of a module, or partials of them."""

    open_policy: Callable[[], Policy]
    open_environment: OpenEnvironment
    settings: RolloutSettings
    environments_per_worker: int = 10
    gpus_per_worker: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation reached and where it lies."""

    summary: Summary
    rows: tuple[dict[str, Any], ...]
    seconds: float
    report: Path
    output_dir: Path

    def json(self) -> dict[str, Any]:
        """The last line of the command."""
        return self.summary.json() | {"seconds": round(self.seconds, 1), "report": str(self.report), "output_dir": str(self.output_dir)}


def evaluate(config: EvalConfig) -> Evaluation:
    """Judge a policy and write the report.

    Raises OutputError for a folder with another evaluation, BundleError or ServingError for the policy, ConfigError for seeds that were
    demonstrated, an unknown task or camera, and tasks that do not fit the policy, SimulationError for a machine that cannot render.
    """
    began = time.monotonic()
    output_dir = Path(config.output_dir)
    report.refuse_other_evaluation(output_dir)
    suite = catalog.shared_suite(config.tasks)
    losses = curve.read_losses(Path(config.metrics)) if config.metrics else []
    open_policy = partial(_open_policy, config)
    metadata = _read_metadata(config)
    refuse_seen_seeds(config, metadata)
    cameras = camera_specs(config, metadata, suite)
    for task in config.tasks:
        suite.check(catalog.find(task)[1], cameras, config.max_steps)
    open_environment = partial(catalog.open_environment, cameras=cameras, max_steps=config.max_steps)
    setup = Setup(open_policy, open_environment, settings_for(config, metadata), config.environments_per_worker, config.gpus_per_worker)
    rows, summary = run(plan(config), config.tasks, setup, config.num_workers, output_dir)
    seconds = time.monotonic() - began
    background = report.Background(
        title=config.policy,
        command=machine.command_line(),
        seconds=seconds,
        observation_change=config.observation_change,
        facts={
            "policy": {name: str(value) for name, value in metadata.items() if isinstance(value, str | int | float)}
            | {name: str(value) for name, value in dict(metadata.get("training") or {}).items()},
            "settings": _settings_facts(config, setup.settings, cameras, metadata, suite),
            "machine": machine.describe_machine(),
            "versions": machine.describe_versions(*suite.packages),
        },
        losses=losses,
    )
    path = report.write(output_dir, summary, rows, background)
    return Evaluation(summary, tuple(rows), seconds, path, output_dir)


def run(
    episodes: Sequence[Episode], tasks: Sequence[str], setup: Setup, num_workers: int | None, output_dir: Path
) -> tuple[list[dict[str, Any]], Summary]:
    """Run `episodes` with a progress line, write each video as it comes; the rows and the summary in the order of `episodes`."""
    found: dict[tuple[str, int], tuple[EpisodeResult, str | None]] = {}
    successes = crashes = 0
    with progress.step("evaluating", len(episodes)) as bar:
        for result in stream(episodes, setup, num_workers):
            found[result.task, result.seed] = (replace(result, video=None), report.keep_video(output_dir, result))
            successes += result.outcome == "success"
            crashes += result.outcome == "crash"
            bar.advance(note=f"success {successes}/{len(found) - crashes}" + (f", {crashes} CRASHED" if crashes else ""))
    ordered = [found[episode.task, episode.seed] for episode in episodes]
    return [result.row(path) for result, path in ordered], summarize([result for result, _ in ordered], tasks)


def stream(episodes: Sequence[Episode], setup: Setup, num_workers: int | None) -> Iterator[EpisodeResult]:
    """Results as they come. num_workers 0 runs here; None takes every core that Ray has. What is found does not depend on it."""
    if num_workers == 0:
        lockstep = Lockstep(setup.open_environment, setup.open_policy(), setup.settings, min(setup.environments_per_worker, len(episodes)))
        try:
            yield from run_all(episodes, lockstep)
        finally:
            lockstep.close()
        return
    with ray_session():
        yield from _stream_on_ray(episodes, setup, num_workers)


def settings_for(config: EvalConfig, metadata: Mapping[str, Any]) -> RolloutSettings:
    """The options that each worker needs, with what the policy says where they are not given."""
    longest = metadata.get("action_horizon", DEFAULT_EXECUTION_HORIZON)
    horizon = config.execution_horizon or metadata.get("execution_horizon") or min(DEFAULT_EXECUTION_HORIZON, longest)
    return RolloutSettings(horizon, config.seed, config.observation_change, tuple(config.tasks))


@final
class _Worker:
    """One actor: its own policy, opened in the first round so that a fault of it arrives as itself and not as the death of an actor."""

    def __init__(self, setup: Setup, slots: int) -> None:
        self._setup, self._slots = setup, slots
        self._lockstep: Lockstep | None = None

    def round(self, episodes: Sequence[Episode]) -> list[EpisodeResult]:
        if self._lockstep is None:
            self._lockstep = Lockstep(self._setup.open_environment, self._setup.open_policy(), self._setup.settings, self._slots)
        return self._lockstep.round(episodes)


def _stream_on_ray(episodes: Sequence[Episode], setup: Setup, num_workers: int | None) -> Iterator[EpisodeResult]:
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    workers = min(num_workers or max(1, int(ray.cluster_resources().get("CPU", 1))), len(episodes))
    require_resources({"CPU": 1, "GPU": setup.gpus_per_worker} if setup.gpus_per_worker else {"CPU": 1}, workers)
    # A worker never takes more than its share, or the first one would leave nothing for the others.
    slots = min(setup.environments_per_worker, -(-len(episodes) // workers))
    actor = ray.remote(_Worker).options(num_cpus=1, num_gpus=setup.gpus_per_worker, runtime_env=dict(ONE_THREAD))
    ledger = Ledger(episodes)
    actors = {worker: actor.remote(setup, slots) for worker in range(workers)}
    calls: dict[Any, int] = {}
    try:
        while True:
            for worker in sorted(set(actors) - set(calls.values())):
                taken = ledger.take(worker, slots)
                if ledger.holds(worker):
                    calls[actors[worker].round.remote(taken)] = worker
            if not calls:
                return
            ready, _ = ray.wait(list(calls), num_returns=1)
            worker = calls.pop(ready[0])
            try:
                results = ray.get(ready[0])
                ledger.ended(worker, results)
            except RayTaskError as error:
                # Ray wraps what was raised there, with a traceback in its text; the user reads the fault itself.
                raise error.cause from None
            except (RayActorError, OutOfMemoryError) as error:
                if getattr(error, "actor_init_failed", False):
                    # No episode is to blame, and every further actor would fail alike.
                    raise ConfigError(
                        f"an evaluation worker cannot start ({_last_line(error)}); install pi0fm alike on every node"
                    ) from None
                results = ledger.lost(worker, one_line(error))
                ray.kill(actors[worker])
                actors[worker] = actor.remote(setup, slots)
            yield from results
    finally:
        for handle in actors.values():
            ray.kill(handle)


def _open_policy(config: EvalConfig) -> Policy:
    """One thread also in the calling process: sums in another order would make results depend on the number of workers."""
    if config.remote:
        from pi0fm_client.client import RemotePolicy

        return RemotePolicy(config.policy, connections=config.environments_per_worker)
    from pi0fm.policy import bundle
    from pi0fm.policy.local import Scoring
    from pi0fm.policy.scores import ScoreOptions

    policy = bundle.load(
        config.policy,
        robot=config.robot,
        num_flow_steps=config.num_flow_steps,
        solver=config.solver,
        noise_level=config.noise_level,
        threads=1,
        compile=config.compile,
    )
    return Scoring(policy, ScoreOptions(config.score_probes)) if config.scores else policy


def _read_metadata(config: EvalConfig) -> dict[str, Any]:
    """What the policy says of itself, without its weights: those are for the workers."""
    if config.remote:
        from pi0fm_client.client import RemotePolicy

        remote = RemotePolicy(config.policy, connections=1)
        try:
            return dict(remote.metadata)
        finally:
            remote.close()
    from pi0fm.policy import bundle

    return bundle.metadata(Path(config.policy), config.robot)


def _last_line(error: Exception) -> str:
    """The line of Ray's long text that names the fault."""
    return str(error).strip().splitlines()[-1].strip()


def _settings_facts(
    config: EvalConfig, settings: RolloutSettings, cameras: Sequence[CameraSpec], metadata: Mapping[str, Any], suite: Suite
) -> dict[str, str]:
    solver = config.solver or str(metadata.get("solver", "the policy's own"))
    level = metadata.get("noise_level", 1.0) if config.noise_level is None else config.noise_level
    limits = {config.max_steps or suite.tasks[catalog.find(task)[1]].max_steps for task in config.tasks}
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
