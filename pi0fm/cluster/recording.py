"""Recording demonstrations on Ray: many processes simulate and encode, the calling one writes.

Owns: the simulating actors and the assignment of episodes to them. Does not know: seeds, order, data sets.

    driver ── submit(task, seed), in turn ──┬─> actor 1: [running][waiting]
       ^                                    └─> actor 2: [running][waiting]
       └── episodes of some 100 kB through the object store, in seed order    ──┘
"""

import functools
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pi0fm.cluster.runtime import ONE_THREAD, first_ready, ray_session, require_resources
from pi0fm.demos.config import DemosConfig
from pi0fm.demos.encoding import EncodedDemonstration
from pi0fm.demos.record import Submit, record, record_here, simulate
from pi0fm.processes import end_with_parent, sigterm_interrupts

EPISODES_AHEAD = 2  # per actor: one runs and one waits; more would only fill the object store


def record_demonstrations(config: DemosConfig) -> dict[str, object]:
    """Record with `config.num_workers` Ray actors of one core each, or in this process when that is 0.

    SIGTERM acts like Ctrl-C during the call. Raises ConfigError when Ray has fewer cores than that, and the errors of `record`.
    """
    if config.num_workers == 0:
        return record_here(config)
    # inside Ray's session: Ray installs a handler when it starts
    with ray_session(config.ray_address), sigterm_interrupts(), simulators(config) as submit:
        return record(config, submit, window=EPISODES_AHEAD * config.num_workers)


class SimulatorActor:
    """Actor that simulates episodes and keeps its environments from one to the next."""

    def __init__(self) -> None:
        end_with_parent(os.getppid())  # the raylet, whose sudden death Ray's workers outlive

    def episode(self, config: DemosConfig, task: str, seed: int) -> EncodedDemonstration | None:
        """Run one attempt of the expert."""
        return simulate(config, task, seed)


@contextmanager
def simulators(config: DemosConfig) -> Iterator[Submit]:
    """Run the actors during the block; the episode of one that dies is simulated again elsewhere, with the same result."""
    import ray

    require_resources({"CPU": 1}, config.num_workers)
    kind = ray.remote(SimulatorActor).options(num_cpus=1, runtime_env=dict(ONE_THREAD), max_restarts=-1, max_task_retries=3)
    actors = [kind.remote() for _ in range(config.num_workers)]
    turn = itertools.cycle(actors)

    def submit(task: str, seed: int) -> functools.partial[EncodedDemonstration | None]:
        return functools.partial(_wait, next(turn).episode.remote(config, task, seed))

    try:
        yield submit
    finally:
        for actor in actors:
            ray.kill(actor)


def _wait(reference: object) -> EncodedDemonstration | None:
    """Wait for the episode; raises the simulator's fault without Ray's wrapping, so that the user reads its line."""
    import ray

    first_ready([reference])
    try:
        episode: EncodedDemonstration | None = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
    return episode
