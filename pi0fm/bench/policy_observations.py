"""Observations that a policy can be measured on: from a data set, or from the simulator that it was demonstrated in.

Owns: which frames, and which start positions. Does not know: what is measured.

    data set     |--x-----x-----x-----x--|             in the middle of equal stretches of its frames
    simulator    seed n + 1:  x . . x . . x . . x      the start, and then along the policy's own steps,
                 seed n + 2:  x . . x . . x . . x      execution_horizon apart; n is the last seed that was demonstrated
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pi0fm.data.chain import Chain
from pi0fm.data.columns.lerobot_source import DatasetConfig, open_source
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.eval.episode import noise_seed
from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec, parse_cameras
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Observation, Policy

PER_EPISODE = 4


def from_dataset(chain: Chain, dataset: DatasetConfig, count: int) -> list[Observation]:
    """`count` observations spread over the frames of a data set; all frames where there are fewer.

    Raises ConfigError for a data set that is not of the policy's robot, DatasetError for one that cannot be read.
    """
    source = open_source(dataset, chain.embodiment)
    pictures = open_cache(source, dataset, chain.image_size)
    number = min(count, len(source.frames))
    frames = source.frames[((np.arange(number) + 0.5) / number * len(source.frames)).astype(np.int64)]
    names = tuple(source.embodiment.cameras)
    return [
        Observation(dict(zip(names, images, strict=True)), source.state[frame], source.tasks[int(source.task[frame])])
        for frame, images in zip(frames.tolist(), pictures.gather(frames), strict=True)
    ]


def simulated_tasks(metadata: Mapping[str, Any]) -> dict[str, int]:
    """By task of the policy's demonstrations that a simulator has, the first seed behind them.

    Raises ConfigError that names the option which helps, where the bundle does not say how it is simulated.
    """
    tasks = {task: int(high) + 1 for task, (_, high) in metadata["demonstration_seeds"].items() if catalog.known(task)}
    if not tasks or not metadata["camera_sources"]:
        raise ConfigError(
            "observations are needed, and this bundle names no task and camera of a simulator to make them with; "
            "type --dataset.root DIRECTORY, or --dataset.repo_id NAME"
        )
    return tasks


def from_simulator(policy: Policy, count: int, seed: int, advance: Callable[[int], None]) -> list[Observation]:
    """`count` observations of start positions that no demonstration used and of the policy's way from there, spread over its tasks.

    Raises ConfigError as `simulated_tasks` does, SimulationError when the machine cannot render.
    """
    tasks = simulated_tasks(policy.metadata)
    cameras = parse_cameras(f"{name}={source}" for name, source in policy.metadata["camera_sources"].items())
    found: list[Observation] = []
    for number, (task, first_seed) in enumerate(tasks.items()):
        share = count // len(tasks) + (number < count % len(tasks))
        if share:
            found += _along(policy, task, cameras, first_seed, share, seed, advance)
    return found


def _along(
    policy: Policy, task: str, cameras: tuple[CameraSpec, ...], first_seed: int, count: int, seed: int, advance: Callable[[int], None]
) -> list[Observation]:
    environment = catalog.open_environment(task, cameras)
    found: list[Observation] = []
    try:
        for start in range(first_seed, first_seed + count):  # each episode gives one observation or more
            environment.reset(start)
            done = False
            for visit in range(PER_EPISODE):
                if done or len(found) == count:
                    break
                found.append(environment.observe())
                advance(1)
                (chunk,) = policy.infer_batch([found[-1]], [noise_seed(seed, task, start, visit)])
                for action in chunk.actions[: policy.metadata["execution_horizon"]]:
                    done = done or environment.step(action).done
            if len(found) == count:
                return found
    finally:
        environment.close()
    return found
