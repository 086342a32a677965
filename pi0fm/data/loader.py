r"""From (seed, step, rank) to a batch of tensors, prepared in a thread while the last one is trained on.

Owns: `Batch`, collation, prefetching. Does not know: the model, devices beyond moving to one, the optimiser.

    position in the stream -> sample -> frame -> pictures (memory map), state and action chunk (one slice) -> chain -> tensors
                                    \-> noise and uniform number for the flow, by counter

Shape letters: B micro batch, H horizon, A action dim, C cameras.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from pi0fm.data.frame_cache import FrameCache
from pi0fm.data.lerobot_source import LeRobotSource
from pi0fm.data.sampler import draws, slots
from pi0fm.data.transforms import Chain, Sample
from pi0fm.models.observation import ModelObservation


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs.

    actions: [B, H, A] normalised and padded; action_mask: [B, H, A], False past the episode's end and on padded dimensions;
    noise: [B, K, H, A], K flow draws of each observation; uniform: [B, K] in [0, 1), from which the time density makes t.
    """

    observation: ModelObservation
    actions: Float[Tensor, "B H A"]
    action_mask: Bool[Tensor, "B H A"]
    noise: Float[Tensor, "B K H A"]
    uniform: Float[Tensor, "B K"]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "observation"}
        return Batch(self.observation.to(device), **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Collator:
    """Makes the batch of any stretch of the stream."""

    source: LeRobotSource
    cache: FrameCache
    chain: Chain
    action_horizon: int
    action_dim: int
    seed: int
    flow_draws: int = 1

    def __call__(self, first: int, count: int) -> Batch:
        """The samples at stream positions first .. first + count - 1."""
        at = slots(self.seed, len(self.source.frames), first, count)
        frames = self.source.frames[at.index]
        actions, inside = action_chunks(self.source.action, self.source.end, frames, self.action_horizon)
        sample = self.chain.forward(Sample(self.source.state[frames], actions))
        prompts = [self.source.tasks[task] for task in self.source.task[frames]]
        images = self.cache.gather(frames)
        observation = self.chain.to_model(images, np.ones(images.shape[:2], dtype=bool), sample.state, prompts)
        real = np.arange(self.action_dim) < self.chain.embodiment.dims()[1]
        mask = inside[:, :, None] & real
        drawn = [draws(self.seed, at, number, (self.action_horizon, self.action_dim)) for number in range(self.flow_draws)]
        noise, uniform = np.stack([pair[0] for pair in drawn], axis=1), np.stack([pair[1] for pair in drawn], axis=1)
        assert sample.actions is not None
        arrays = (sample.actions, mask, noise * real, uniform)
        return Batch(observation, *(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def valid_elements(self, first: int, count: int) -> int:
        """How many True entries `action_mask` has over stream positions first .. first + count - 1, whoever trains on them."""
        at = slots(self.seed, len(self.source.frames), first, count)
        frames = self.source.frames[at.index]
        steps = np.minimum(self.source.end[frames] - frames, self.action_horizon)
        return int(steps.sum()) * self.chain.embodiment.dims()[1]


def action_chunks(
    action: NDArray[np.float32], end: NDArray[np.int64], frames: NDArray[np.int64], horizon: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """action[frame .. frame + H - 1] as [B, H, A], the last action repeated past the episode's end, and [B, H] True inside it."""
    steps = frames[:, None] + np.arange(horizon)
    last = end[frames][:, None] - 1
    return action[np.minimum(steps, last)], steps <= last


def micro_batches(
    collator: Collator, first_step: int, num_steps: int, global_batch_size: int, rank: int, world_size: int, micro_batch_size: int
) -> Iterator[Batch]:
    """This rank's micro batches of steps first_step .. num_steps - 1, in order, two ahead of their use.

    Every rank takes an equal, contiguous share of each global batch, so the union is the same for any number of ranks.
    """
    share = global_batch_size // world_size
    starts = [
        step * global_batch_size + rank * share + offset
        for step in range(first_step, num_steps)
        for offset in range(0, share, micro_batch_size)
    ]
    return _prefetch(collator, starts, micro_batch_size)


def _prefetch(collator: Collator, starts: list[int], count: int, depth: int = 2) -> Iterator[Batch]:
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for start in starts:
                if not put(collator(start, count)):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001  (it is raised again in the thread that asks)
            put(error)

    thread = threading.Thread(target=work, name="pi0fm-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
