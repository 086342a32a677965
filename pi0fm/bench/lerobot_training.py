"""LeRobot's training loop for one CPU process, stopped when its processor time is spent.

Owns: the order of operations of LeRobot's `lerobot_train`, the length of the schedule for a budget, the batches of a LeRobotDataset.
Does not know: how the policy is judged, what pi0fm's side does.

Like LeRobot: global seed, then the policy; its optimiser and scheduler presets (AdamW, clipping at 1, warm-up that scales with the
number of steps, cosine to a tenth); float32, no compilation; steps past an episode's end count in the loss, since LeRobot's PI0 does not
read `action_is_pad`. On one process in float32 its accelerate calls reduce to backward, clip, step.
Unlike LeRobot: no logs, no checkpoints, and the peak learning rate is the caller's, since LeRobot's 2.5e-5 is meant for three billion
pretrained parameters.

Fairness. `LeRobotDataset` spends about 80 % of a laptop's processor time on queries in Python. A comparison of learning would measure that.
So the source of batches is an argument: `next_batch(step)` hands out frames that both sides hold decoded in memory; `dataset_source`
is what a LeRobot user has, to measure the whole. The budget pays for batches, processors and updates; not for building and calibration.

    seed -> policy -> [calibration on a copy: seconds a step -> length of the schedule] -> loop until the seconds are spent
                              not charged                                                     charged
"""

import copy
import math
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

from pi0fm import progress
from pi0fm.bench.cpu_time import cpu_seconds_of_tree
from pi0fm.bench.lerobot_pi0 import Processors, RobotFeatures, ShrunkPI0, ShrunkSize, policy_config, processors
from pi0fm.errors import ConfigError

# A batch as LeRobot's DataLoader makes it: observation.images.NAME uint8 or float32 in [0, 1] [B, 3, height, width],
# observation.state [B, S], action [B, H, A], task (list of B sentences); robot units, not normalised.
Batch = dict[str, Any]
BatchSource = Callable[[int], Batch]


@dataclass(frozen=True)
class TrainingPlan:
    """What a run may spend.

    cpu_seconds: of the process tree. max_steps: when given, the schedule's length too, as `--steps`; no calibration then.
    calibration_steps: steps on a thrown-away copy that tell how many steps the budget holds.
    """

    cpu_seconds: float
    learning_rate: float = 1e-3
    seed: int = 1000
    max_steps: int | None = None
    calibration_steps: int = 3

    def __post_init__(self) -> None:
        if self.cpu_seconds <= 0:
            raise ConfigError(f"cpu_seconds must be above 0, found {self.cpu_seconds}")
        if self.calibration_steps < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise ConfigError(f"calibration_steps and max_steps must be at least 1, found {self.calibration_steps} and {self.max_steps}")


@dataclass(frozen=True)
class TrainingResult:
    """What a run did. `scheduled_steps` is the length of the learning-rate schedule; later steps keep the last rate."""

    steps: int
    samples: int
    scheduled_steps: int
    cpu_seconds: float
    losses: tuple[float, ...]


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
            scheduled = plan.max_steps or _steps_in_budget(policy, steps_around, next_batch, plan)
        result = _run(policy, steps_around, next_batch, plan, scheduled)
    return TrainedPolicy(policy.eval(), steps_around, robot, result)


class _Updater:
    """LeRobot's `update_policy` on one process: forward, backward, clip, optimiser, scheduler, in this order."""

    def __init__(self, policy: ShrunkPI0, scheduled_steps: int) -> None:
        preset = policy.config.get_optimizer_preset()
        self._policy = policy
        self._clip = preset.grad_clip_norm
        self._optimizer = preset.build(policy.get_optim_params())
        self._scheduler = policy.config.get_scheduler_preset().build(self._optimizer, scheduled_steps)

    def update(self, batch: Batch) -> float:
        """One step on a processed batch; returns the loss."""
        self._policy.train()
        loss, _ = self._policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._policy.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        return float(loss.item())


def _run(policy: ShrunkPI0, steps_around: Processors, next_batch: BatchSource, plan: TrainingPlan, scheduled_steps: int) -> TrainingResult:
    updater = _Updater(policy, scheduled_steps)
    losses: list[float] = []
    samples, shown, spent, began = 0, 0, 0.0, cpu_seconds_of_tree()
    with progress.step("LeRobot PI0, CPU-seconds", math.ceil(plan.cpu_seconds)) as bar:
        while spent < plan.cpu_seconds and (plan.max_steps is None or len(losses) < plan.max_steps):
            raw = next_batch(len(losses))
            losses.append(updater.update(_prepared(raw, steps_around)))
            samples += len(raw["task"])
            spent = cpu_seconds_of_tree() - began
            bar.advance(min(int(spent), math.ceil(plan.cpu_seconds)) - shown, f"loss {losses[-1]:.3f}")
            shown = min(int(spent), math.ceil(plan.cpu_seconds))
    return TrainingResult(len(losses), samples, scheduled_steps, spent, tuple(losses))


def _prepared(raw: Batch, steps_around: Processors) -> Batch:
    """Pictures from bytes to [0, 1], then LeRobot's own steps: newline, tokens, normalisation."""
    batch = dict(raw)
    for key, value in raw.items():
        if key.startswith(OBS_IMAGES) and isinstance(value, Tensor) and value.dtype == torch.uint8:
            batch[key] = value.to(torch.float32) / 255.0
    return dict(steps_around[0](batch))


def _steps_in_budget(policy: ShrunkPI0, steps_around: Processors, next_batch: BatchSource, plan: TrainingPlan) -> int:
    """How many steps `plan.cpu_seconds` hold, from a few on a copy; the first, which pays for allocation, is not counted."""
    updater = _Updater(copy.deepcopy(policy), plan.calibration_steps + 1)
    updater.update(_prepared(next_batch(0), steps_around))
    began = cpu_seconds_of_tree()
    for step in range(1, plan.calibration_steps + 1):
        updater.update(_prepared(next_batch(step), steps_around))
    seconds_a_step = (cpu_seconds_of_tree() - began) / plan.calibration_steps
    return max(1, round(plan.cpu_seconds / seconds_a_step))


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
