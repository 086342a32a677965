"""One data set for two trainers: the same decoded frames in memory, the same samples in the same order.

Owns: reading the episodes of one task, the batch of a stretch of the stream as LeRobot's loader would hand it out.
Does not know: who trains on it.

    data set -> frames decoded once, copied into memory
                                                 |
    position in the stream -> frame numbers -----+--> Collator      -> pi0fm's Batch
                                                 '--> lerobot_batch -> LeRobot's dict
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE

from pi0fm.bench.lerobot_pi0 import RobotFeatures, image_key
from pi0fm.data.columns.lerobot_source import LeRobotSource, open_source
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.loading.loader import Collator, action_chunks
from pi0fm.data.order.counter import slots
from pi0fm.data.pictures.frame_cache import FrameCache, open_cache
from pi0fm.policy.bundle import PolicyConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import policy_config
from pi0fm_client.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class SharedData:
    """The demonstrations that both sides learn from; `policy` says how pi0fm's side reads them."""

    source: LeRobotSource
    cache: FrameCache
    stats: NormStats
    policy: PolicyConfig

    @property
    def robot(self) -> RobotFeatures:
        """Cameras and widths, in LeRobot's terms."""
        state_dim, action_dim = self.source.embodiment.dims()
        return RobotFeatures(tuple(self.source.embodiment.cameras), state_dim, action_dim)

    def collator(self, seed: int, flow_draws: int = 1) -> Collator:
        """pi0fm's batches, in the order of `seed`."""
        model = self.policy.model
        return Collator(self.source, self.cache, self.policy.chain(self.stats), model.action_horizon, model.action_dim, seed, flow_draws)

    def lerobot_stats(self) -> dict[str, dict[str, Any]]:
        """Mean and standard deviation as LeRobot's processors take them; the numbers that pi0fm normalises with, before its floor."""
        columns = {OBS_STATE: self.stats.state, ACTION: self.stats.action}
        return {key: {"mean": torch.from_numpy(column.mean), "std": torch.from_numpy(column.std)} for key, column in columns.items()}


def open_shared(run: TrainConfig, prompt: str) -> SharedData:
    """The episodes of the data set whose sentence is `prompt`, decoded and in memory.

    Raises DatasetError when there is none, ConfigError for an embodiment that LeRobot's PI0 cannot follow.
    """
    if run.embodiment.delta_actions:
        raise ConfigError(
            f"LeRobot's PI0 trains on actions as they are, found embodiment.delta_actions {run.embodiment.delta_actions}; leave it out"
        )
    source = open_source(run.dataset, run.embodiment)
    taught = np.unique(source.episode[source.frames][source.task[source.frames] == _task_index(source, prompt)])
    if not len(taught):
        raise DatasetError(f"{source.root} holds no chosen episode of {prompt!r}; record the task, or choose other dataset.episodes")
    source = open_source(replace(run.dataset, episodes=tuple(taught.tolist())), run.embodiment)
    policy = policy_config(run, source)
    decoded = open_cache(source, run.dataset, policy.model.vision.image_size)
    # A memory map would charge whoever reads a page first with its page fault.
    cache = FrameCache(tuple(np.array(camera) for camera in decoded.cameras))
    return SharedData(source, cache, source.norm_stats(policy.model.action_horizon), policy)


def lerobot_batch(collator: Collator, first: int, count: int) -> dict[str, Any]:
    """The samples that `collator(first, count)` holds, as LeRobot's DataLoader makes a batch: robot units, not normalised.

    `observation.images.NAME` uint8 [B, 3, size, size], `observation.state` [B, S], `action` [B, H, A], `action_is_pad` bool [B, H], `task`.
    """
    source = collator.source
    frames = source.frames[slots(collator.seed, len(source.frames), first, count).index]
    actions, inside = action_chunks(source.action, source.end, frames, collator.action_horizon)
    pictures = torch.from_numpy(collator.cache.gather(frames)).permute(0, 1, 4, 2, 3)
    batch: dict[str, Any] = {image_key(name): pictures[:, number] for number, name in enumerate(source.embodiment.cameras)}
    batch |= {OBS_STATE: torch.from_numpy(source.state[frames]), ACTION: torch.from_numpy(actions)}
    return batch | {"action_is_pad": torch.from_numpy(~inside), "task": [source.tasks[task] for task in source.task[frames]]}


def _task_index(source: LeRobotSource, prompt: str) -> int:
    if prompt not in source.tasks:
        raise DatasetError(f"{source.root} holds no episode of {prompt!r}, found: {'; '.join(source.tasks):.300}; record the task")
    return source.tasks.index(prompt)
