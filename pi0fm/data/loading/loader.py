r"""Batches as a function of (seed, step, rank), prepared in threads while the previous one is trained on.

Owns: collation, prefetching. Does not know: the model, devices beyond moving to one, the optimiser.

    position in the stream -> sample -> frame -> pictures (memory map), state and action chunk (one slice) -> chain -> tensors
                                    \-> noise and uniform number for the flow, numbers for augmentation, by counter

    starts   0   1   2   3   4   5   6        one ordered queue: batches leave in the order of the stream,
    thread A [0]     [2]     [4]              whichever thread is done first
    thread B     [1]     [3]     [5]          at most `threads + ahead` batches exist at a time

Shape letters: B micro batch, H horizon, A action dim.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from pi0fm.data.chain import Chain, Sample
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.config import AugmentConfig, LoaderConfig
from pi0fm.data.loading.batch import Batch
from pi0fm.data.order.counter import Slots, draws, uniforms
from pi0fm.data.order.orders import Order, StreamSamples
from pi0fm.data.order.split import split
from pi0fm.data.pictures.augmentation import draw_augmentation
from pi0fm.data.pictures.source import Pictures
from pi0fm_client.errors import ConfigError

__all__ = ["Batch", "BatchMaker", "Collator", "LoaderConfig", "action_chunks", "keep_count", "micro_batches"]

_COUNTS_KEPT = 64
PREPARED = LoaderConfig()
DELAYS = 4  # random number stream of the delays


class BatchMaker(ABC):
    """Maker of batches for `micro_batches`, from one data set (`Collator`) or several (`mixture.MixtureCollator`)."""

    @abstractmethod
    def __call__(self, first: int, count: int) -> Batch:
        """Make the batch of stream positions first .. first + count - 1."""

    @abstractmethod
    def valid_elements(self, first: int, count: int) -> int:
        """Number of entries that the loss counts over stream positions first .. first + count - 1, on all workers together.

        These are the True entries of `action_mask` for each flow draw, without the rows that the draw holds clean.
        """

    @abstractmethod
    def count_ahead(self, first: int, count: int) -> None:
        """Compute `valid_elements` of this stretch ahead, so that the training thread need not look samples up."""

    @abstractmethod
    def announce_after(self, first: int, count: int) -> None:
        """Announce that a stretch is in use, so that the pictures `look_ahead` positions after it can be prepared."""


@dataclass(frozen=True)
class Collator(BatchMaker):
    """Batches of any stretch of one data set's stream. order: None for the order that suits the pictures best.

    padded_noise: keep noise in the dimensions that the robot lacks, for weights that were trained with it (PolicyConfig.padded_noise).
    max_delay: largest number of rows that a flow draw holds clean; the number is uniform in 0..max_delay.
    """

    source: LeRobotSource
    cache: Pictures
    chain: Chain
    action_horizon: int
    action_dim: int
    seed: int
    flow_draws: int = 1
    augmentation: AugmentConfig | None = None
    order: Order | None = None
    padded_noise: bool = False
    max_delay: int = 0
    _counts: dict[tuple[int, int], int] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.order is not None and self.cache.look_ahead:
            raise ConfigError("sample weights need every picture at hand, but this data set is streamed; raise --dataset.cache_limit_gib")

    def __call__(self, first: int, count: int) -> Batch:
        """Make the batch of stream positions first .. first + count - 1."""
        return self.collate(np.arange(first, first + count))

    def collate(self, positions: NDArray[np.int64]) -> Batch:
        """Make the batch of these stream positions."""
        at = self.samples_at(positions)
        frames = self.source.frames[at.index]
        actions, inside = action_chunks(self.source.action, self.source.end, frames, self.action_horizon)
        sample = self.chain.forward(Sample(self.source.state[frames], actions))
        prompts = [self.source.tasks[task] for task in self.source.task[frames].tolist()]
        images = self.cache.gather(frames)
        observation = self.chain.to_model(images, np.ones(images.shape[:2], dtype=bool), sample.state, prompts)
        real = np.arange(self.action_dim) < self.chain.embodiment.dims()[1]
        mask = inside[:, :, None] & real
        keys = Slots(at.epoch, at.number)
        drawn = [draws(self.seed, keys, number, (self.action_horizon, self.action_dim)) for number in range(self.flow_draws)]
        noise, uniform = (_stacked([pair[part] for pair in drawn]) for part in (0, 1))
        if not self.padded_noise:
            noise[..., ~real] = 0
        assert sample.actions is not None
        arrays = {"actions": sample.actions, "action_mask": mask, "noise": noise, "uniform": uniform}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        augmentation = None
        if self.augmentation is not None:
            augmentation = draw_augmentation(self.augmentation, self.seed, keys, tuple(self.source.embodiment.cameras))
        delays = torch.from_numpy(self._delays(keys)) if self.max_delay else None
        return Batch(observation, **tensors, augmentation=augmentation, delays=delays)

    def samples_at(self, positions: NDArray[np.int64]) -> StreamSamples:
        """Epoch and sample at each of these positions."""
        return (self.order or self.cache.order).samples_at(self.seed, len(self.source.frames), positions)

    def announce_after(self, first: int, count: int) -> None:
        """Do nothing where all pictures are ready, else announce the positions `look_ahead` later."""
        if self.cache.look_ahead:
            self.announce(np.arange(first, first + count) + self.cache.look_ahead)

    def announce(self, positions: NDArray[np.int64]) -> None:
        """Announce to the pictures that these positions will be read."""
        self.cache.announce(self.source.frames[self.samples_at(positions).index])

    def valid_elements(self, first: int, count: int) -> int:
        """Return the count made ahead, or count now."""
        known = self._counts.pop((first, count), None)
        return self.count_valid(np.arange(first, first + count)) if known is None else known

    def count_ahead(self, first: int, count: int) -> None:
        """Count and keep the result until it is used, or until many later ones are kept."""
        keep_count(self._counts, (first, count), self.count_valid(np.arange(first, first + count)))

    def count_valid(self, positions: NDArray[np.int64]) -> int:
        """Count `valid_elements` of any positions."""
        at = self.samples_at(positions)
        frames = self.source.frames[at.index]
        steps = np.minimum(self.source.end[frames] - frames, self.action_horizon)
        rows = int(steps.sum()) * self.flow_draws
        if self.max_delay:
            rows = int((steps[:, None] - self._delays(Slots(at.epoch, at.number))).clip(min=0).sum())
        return rows * self.chain.embodiment.dims()[1]

    def _delays(self, keys: Slots) -> NDArray[np.int64]:
        """Rows held clean [B, K], a function of seed, epoch, sample and draw."""
        return (uniforms(self.seed, keys, DELAYS, self.flow_draws) * (self.max_delay + 1)).astype(np.int64)


def _stacked(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Stack along axis 1; a single array is not copied."""
    return arrays[0][:, None] if len(arrays) == 1 else np.stack(arrays, axis=1)


def keep_count(counts: dict[tuple[int, int], int], stretch: tuple[int, int], valid: int) -> None:
    """Add to a table of counts, which drops the oldest when none is used."""
    while len(counts) >= _COUNTS_KEPT:
        counts.pop(list(counts)[0], None)  # noqa: RUF015  (an iterator would fail when another thread adds an entry)
    counts[stretch] = valid


def action_chunks(
    action: NDArray[np.float32], end: NDArray[np.int64], frames: NDArray[np.int64], horizon: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """action[frame .. frame + H - 1] as [B, H, A], the last action repeated past the episode's end, and [B, H] True inside it."""
    steps = frames[:, None] + np.arange(horizon)
    last = end[frames][:, None] - 1
    return action[np.minimum(steps, last)], steps <= last


def micro_batches(
    collator: BatchMaker,
    first_step: int,
    num_steps: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int | None,
    config: LoaderConfig = PREPARED,
    device: torch.device | None = None,
) -> Generator[Batch]:
    """Yield this rank's micro batches of steps first_step .. num_steps - 1, in order, some prepared ahead.

    data/order/split.py deals samples to ranks. device: a GPU receives batches from page-locked
    memory, each while the previous one is trained on; None or a CPU copies nothing.
    """
    parts = split(global_batch_size, rank, world_size, micro_batch_size)

    def starts() -> Iterator[tuple[int, int, int, bool]]:
        for step in range(first_step, num_steps):
            for number, (offset, count) in enumerate(parts):
                yield step, step * global_batch_size + offset, count, number == 0

    on_gpu = device is not None and device.type == "cuda"

    def prepare(step: int, start: int, count: int, begins: bool) -> Batch:
        if begins:
            collator.count_ahead(step * global_batch_size, global_batch_size)
        batch = collator(start, count)
        collator.announce_after(start, count)
        return batch.pinned() if on_gpu else batch

    batches = _in_threads(prepare, starts(), config.threads, config.threads + config.ahead)
    return _on_device(batches, device) if on_gpu and device is not None else batches


def _in_threads(
    prepare: Callable[[int, int, int, bool], Batch], starts: Iterator[tuple[int, int, int, bool]], num_threads: int, most: int
) -> Generator[Batch]:
    """Yield `prepare` of every start in order, `most` at a time; threads end after the last, on an error, or with the generator."""
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="pi0fm-loader")
    under_way: deque[Future[Batch]] = deque()

    def submit() -> None:
        start = next(starts, None)
        if start is not None:
            under_way.append(threads.submit(prepare, *start))

    try:
        for _ in range(most):
            submit()
        while under_way:
            batch = under_way.popleft().result()
            submit()
            yield batch
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Copy batches to a GPU on a separate stream, each while the previous one is trained on."""
    copying = torch.cuda.Stream(device)

    def copied(batch: Batch | None) -> Batch | None:
        with torch.cuda.stream(copying):
            return None if batch is None else batch.to(device)

    following = copied(next(batches, None))
    while following is not None:
        batch, done = following, copying.record_event()
        following = copied(next(batches, None))
        torch.cuda.current_stream(device).wait_event(done)
        for tensor in batch.tensors():
            tensor.record_stream(torch.cuda.current_stream(device))  # else its memory is reused while the step still reads it
        yield batch
