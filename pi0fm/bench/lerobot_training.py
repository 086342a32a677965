"""LeRobot's training loop for one CPU process, stopped when its processor time is spent.

Owns: the order of operations of LeRobot's `lerobot_train`, the batches of a LeRobotDataset.
Does not know: how time is counted (bench/budget), how the policy is judged, what pi0fm's side does.

Like LeRobot: global seed, then the policy; its optimiser and scheduler presets (AdamW, clipping at 1, warm-up that scales with the
number of steps, cosine to a tenth); float32, no compilation; steps past an episode's end count in the loss, since LeRobot's PI0 does not
read `action_is_pad`. On one process in float32 its accelerate calls reduce to backward, clip, step.
Unlike LeRobot: no logs, no checkpoints, and the peak learning rate is the caller's, since LeRobot's 2.5e-5 is meant for three billion
pretrained parameters.

Fairness. `LeRobotDataset` spends about 80 % of a laptop's processor time on queries in Python. A comparison of learning would measure that.
So the source of batches is an argument: `next_batch(step)` hands out frames that both sides hold decoded in memory; `dataset_source`
is what a LeRobot user has, to measure the whole. The budget pays for batches, processors and updates; not for building and calibration.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.datasets import EpisodeAwareSampler, LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.utils.constants import OBS_IMAGES
from lerobot.utils.random_utils import seeded_context
from lerobot.utils.utils import cycle
from torch import Tensor

from pi0fm.bench.budget import TrainingPlan, TrainingResult, spend, steps_in_budget
from pi0fm.bench.lerobot_pi0 import Processors, RobotFeatures, ShrunkPI0, ShrunkSize, policy_config, processors

# A batch as LeRobot's DataLoader makes it: observation.images.NAME uint8 or float32 in [0, 1] [B, 3, height, width],
# observation.state [B, S], action [B, H, A], task (list of B sentences); robot units, not normalised.
Batch = dict[str, Any]
BatchSource = Callable[[int], Batch]


@dataclass(frozen=True)
class TrainedPolicy:
    """LeRobot's policy with the processors that belong to it."""

    policy: ShrunkPI0
    processors: Processors
    robot: RobotFeatures
    result: TrainingResult


def train_lerobot(
    size: ShrunkSize, robot: RobotFeatures, stats: Mapping[str, Mapping[str, Any]], next_batch: BatchSource, plan: TrainingPlan
) -> TrainedPolicy:
    """Train LeRobot's PI0 from scratch until `plan.cpu_seconds` are spent or `plan.max_steps` done; at most one step is over the budget.

    stats: mean and std of `observation.state` and `action` (LeRobotDataset.meta.stats). The caller's random state is left as it was.
    """
    with seeded_context(plan.seed):
        config = policy_config(size, robot, plan.learning_rate)
        policy = ShrunkPI0(config, size)
        steps_around = processors(config, stats)
        with seeded_context(plan.seed):  # what calibration draws must not change the run
            scheduled = plan.max_steps or _calibrated(policy, steps_around, next_batch, plan)
        updater = _Updater(policy, steps_around, next_batch, scheduled)
        result = spend("LeRobot PI0", updater.update, plan, scheduled)
    return TrainedPolicy(policy.eval(), steps_around, robot, result)


class _Updater:
    """LeRobot's `update_policy` on one process: forward, backward, clip, optimiser, scheduler, in this order."""

    def __init__(self, policy: ShrunkPI0, steps_around: Processors, next_batch: BatchSource, scheduled_steps: int) -> None:
        preset = policy.config.get_optimizer_preset()
        self._policy, self._steps_around, self._next_batch = policy, steps_around, next_batch
        self._clip = preset.grad_clip_norm
        self._optimizer = preset.build(policy.get_optim_params())
        self._scheduler = policy.config.get_scheduler_preset().build(self._optimizer, scheduled_steps)

    def update(self, step: int) -> tuple[float, int]:
        """One step on the batch of `step`; returns the loss and the number of samples."""
        raw = self._next_batch(step)
        self._policy.train()
        loss, _ = self._policy.forward(_prepared(raw, self._steps_around))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._policy.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        return float(loss.item()), len(raw["task"])


def _prepared(raw: Batch, steps_around: Processors) -> Batch:
    """Pictures from bytes to [0, 1], then LeRobot's own steps: newline, tokens, normalisation."""
    batch = dict(raw)
    for key, value in raw.items():
        if key.startswith(OBS_IMAGES) and isinstance(value, Tensor) and value.dtype == torch.uint8:
            batch[key] = value.to(torch.float32) / 255.0
    return dict(steps_around[0](batch))


def _calibrated(policy: ShrunkPI0, steps_around: Processors, next_batch: BatchSource, plan: TrainingPlan) -> int:
    """The length of the schedule, from steps of a copy."""
    updater = _Updater(copy.deepcopy(policy), steps_around, next_batch, plan.calibration_steps + 1)
    return steps_in_budget(updater.update, plan)


def open_dataset(repo_id: str, root: Path | None, config: PI0Config) -> LeRobotDataset:
    """The data set with one chunk of actions a frame, opened as `lerobot_train` opens it."""
    deltas = resolve_delta_timestamps(config, LeRobotDatasetMetadata(repo_id, root=root))
    return LeRobotDataset(repo_id, root=root, delta_timestamps=deltas, return_uint8=True)


def dataset_source(dataset: LeRobotDataset, batch_size: int, seed: int, num_workers: int = 4) -> BatchSource:
    """Batches by LeRobot's own sampler and DataLoader settings, without end. The step is not read: the order is the sampler's.

    The last batch of an epoch may be smaller, as in LeRobot. Workers are spawned: LeRobot's decoders do not survive a fork.
    """
    sampler = EpisodeAwareSampler(
        dataset.meta.episodes["dataset_from_index"],
        dataset.meta.episodes["dataset_to_index"],
        episode_indices_to_use=dataset.episodes,
        shuffle=True,
        seed=seed,
        absolute_to_relative_idx=dataset.absolute_to_relative_idx,
    )
    workers: dict[str, Any] = {}
    if num_workers > 0:
        workers = {"prefetch_factor": 4, "persistent_workers": True, "multiprocessing_context": "spawn"}
    batches = cycle(torch.utils.data.DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, **workers))
    return lambda _step: next(batches)
