"""Running the episodes of an evaluation on Ray actors.

Owns: the actors, and the restart of one that dies. Does not know: which worker gets which episode (eval/rollouts/ledger), how an episode is
run.

    driver   ledger ---episodes that fit---> actor 0: policy, environments, one advance ---results---> eval.evaluate
                    ---episodes that fit---> actor 1: policy, environments, one advance ---results--->
One call is one advance, so at most `environments_per_worker` episodes and their videos are in flight at an actor.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, final

from pi0fm.cluster.runtime import ONE_THREAD, first_ready, ray_session, require_resources
from pi0fm.eval.config import EvalConfig
from pi0fm.eval.evaluate import Evaluation, WorkerSetup, evaluate, in_this_process
from pi0fm.eval.rollouts.episode import Episode, EpisodeResult, one_line
from pi0fm.eval.rollouts.ledger import Ledger
from pi0fm.eval.rollouts.rollout import BatchedRollout
from pi0fm.processes import end_with_parent, sigterm_interrupts
from pi0fm_client.errors import ConfigError


def evaluate_on_cluster(config: EvalConfig) -> Evaluation:
    """Evaluate on `config.num_workers` actors, or in this process when that is 0; SIGTERM acts like Ctrl-C during the call."""
    with sigterm_interrupts():
        return evaluate(config, in_this_process if config.num_workers == 0 else partial(on_actors, num_workers=config.num_workers))


def on_actors(episodes: Sequence[Episode], setup: WorkerSetup, num_workers: int | None) -> Iterator[EpisodeResult]:
    """Run episodes on actors: the Executor of a cluster. num_workers None takes every core that Ray has."""
    with ray_session(), sigterm_interrupts():  # inside: Ray installs a handler when it starts
        yield from _stream(episodes, setup, num_workers)


def _stream(episodes: Sequence[Episode], setup: WorkerSetup, num_workers: int | None) -> Iterator[EpisodeResult]:
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    workers = min(num_workers or max(1, int(ray.cluster_resources().get("CPU", 1))), len(episodes))
    require_resources({"CPU": 1, "GPU": setup.gpus_per_worker} if setup.gpus_per_worker else {"CPU": 1}, workers)
    # A worker takes at most its share, so that the first one leaves episodes for the others.
    capacity = min(setup.environments_per_worker, -(-len(episodes) // workers))
    actor = ray.remote(_EvaluationActor).options(num_cpus=1, num_gpus=setup.gpus_per_worker, runtime_env=dict(ONE_THREAD))
    ledger = Ledger(episodes)
    actors = {worker: actor.remote(setup, capacity) for worker in range(workers)}
    calls: dict[Any, int] = {}
    try:
        while True:
            for worker in sorted(set(actors) - set(calls.values())):
                assigned = ledger.assign(worker, capacity)
                if ledger.assigned(worker):
                    calls[actors[worker].advance.remote(assigned)] = worker
            if not calls:
                return
            ready = first_ready(list(calls))
            worker = calls.pop(ready)
            try:
                results = ray.get(ready)
                ledger.complete(worker, results)
            except RayTaskError as error:
                # Ray wraps the worker's error, with a traceback in its text; the user reads the fault itself.
                raise error.cause from None
            except (RayActorError, OutOfMemoryError) as error:
                if getattr(error, "actor_init_failed", False):
                    # No episode is the cause, and every other actor would fail in the same way.
                    raise ConfigError(
                        f"an evaluation worker cannot start ({_last_line(error)}); install the same pi0fm on every node"
                    ) from None
                results = ledger.worker_died(worker, one_line(error))
                ray.kill(actors[worker])
                actors[worker] = actor.remote(setup, capacity)
            yield from results
    finally:
        for handle in actors.values():
            ray.kill(handle)


@final
class _EvaluationActor:
    """Evaluation worker; the first call opens the policy, so that its faults are raised as themselves, not as the death of an actor."""

    def __init__(self, setup: WorkerSetup, num_environments: int) -> None:
        end_with_parent(os.getppid())  # the raylet, whose sudden death Ray's workers outlive
        self._setup, self._num_environments = setup, num_environments
        self._rollout: BatchedRollout | None = None

    def advance(self, episodes: Sequence[Episode]) -> list[EpisodeResult]:
        if self._rollout is None:
            self._rollout = self._setup.rollout(self._num_environments)
        return self._rollout.advance(episodes)


def _last_line(error: Exception) -> str:
    """Return the line of Ray's long text that names the fault."""
    return str(error).strip().splitlines()[-1].strip()
