"""Recording of a data set: the order of seeds, the episodes that are kept.

Owns: the missing episodes, their order, the end of a hopeless task. Does not know: Ray; `submit` is an argument.

    submit ahead, at most `window`          taken in seed order, one task after the other
    seed 1000  1001  1002  1003   ...  -->  1000 ok -> kept   1001 failed -> skipped   1002 ok -> kept
The data set does not depend on the order in which episodes finish.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator

from pi0fm import progress
from pi0fm.demos.config import DemosConfig
from pi0fm.demos.dataset import Recording
from pi0fm.demos.demonstration import record_demonstration
from pi0fm.demos.encoding import EncodedDemonstration, encode
from pi0fm.processes import sigterm_interrupts
from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec, Environment
from pi0fm_client.errors import SimulationError

Submit = Callable[[str, int], Callable[[], EncodedDemonstration | None]]
"""Function (task, seed) -> a call that waits for the encoded episode."""
HOPELESS_FAILURES = 20
_ENVIRONMENTS_KEPT = 2


def record(config: DemosConfig, submit: Submit, window: int) -> dict[str, object]:
    """Record the episodes that are missing; return episodes, frames, seconds, root and the expert's success rate.

    window: episodes submitted ahead of the one that is written next (1 when `submit` simulates in this process).
    Raises OutputError for a folder with other contents, SimulationError when an expert fails 20 times in a row.
    """
    began = time.monotonic()
    total = config.episodes * len(config.task_names)
    with Recording(config.folder, config) as recording:
        with progress.step("demonstrations", total, start=min(total, recording.episodes)) as bar:
            for task in config.task_names:
                for episode in _successes(task, config, recording, submit, window):
                    recording.add(episode)
                    bar.advance(note=f"{task}, {len(episode.action)} steps")
        recording.publish()
        tried = {task: max(recording.seeds(task)[-1] - config.first_seed + 1, 1) for task in config.task_names}
        kept = {task: len(recording.seeds(task)) for task in config.task_names}
        return {
            "episodes": recording.episodes,
            "frames": recording.frames,
            "seconds": round(time.monotonic() - began, 1),
            "root": str(recording.root),
            "expert_success": {task: round(kept[task] / tried[task], 4) for task in config.task_names},
        }


def _successes(task: str, config: DemosConfig, recording: Recording, submit: Submit, window: int) -> Iterator[EncodedDemonstration]:
    """Yield the episodes that `task` lacks, in seed order."""
    seeds = recording.seeds(task)
    wanted = config.episodes - len(seeds)
    next_seed = seeds[-1] + 1 if seeds else config.first_seed
    ahead: deque[Callable[[], EncodedDemonstration | None]] = deque()
    failures = 0
    while wanted > 0:
        while len(ahead) < min(window, wanted):
            ahead.append(submit(task, next_seed))
            next_seed += 1
        episode = ahead.popleft()()
        if episode is not None:
            wanted, failures = wanted - 1, 0
            yield episode
            continue
        failures += 1
        if failures == HOPELESS_FAILURES:
            advice = f"lower noise ({config.noise_level:g}), or raise max_steps ({config.max_steps})"
            raise SimulationError(f"the expert of {task} failed {failures} times in a row; {advice}")


def record_here(config: DemosConfig) -> dict[str, object]:
    """Simulate and record in this process; SIGTERM acts like Ctrl-C."""
    with sigterm_interrupts():
        return record(config, lambda task, seed: functools.partial(simulate, config, task, seed), window=1)


def simulate(config: DemosConfig, task: str, seed: int) -> EncodedDemonstration | None:
    """Record and encode one attempt, in an environment that the process keeps: building one takes longer than some episodes."""
    episode = record_demonstration(_environment(task, config.camera_specs, config.step_limit), seed, config.noise_level)
    return None if episode is None else encode(episode, config.control_rate)


@functools.lru_cache(maxsize=_ENVIRONMENTS_KEPT)
def _environment(task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> Environment:
    return catalog.open_environment(task, cameras, max_steps)
