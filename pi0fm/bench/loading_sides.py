"""The comparisons of `pi0fm bench loading`, each of two sides in turn.

Owns: what either side does in a round, and what of it is inside the clock. Does not know: how figures are shown.

    stream, one round     a new buffer | first window, no clock | the middle of an epoch: CLOCK | whole windows, and one is left
    of one epoch                         fills the buffer         decodes as much ahead at its end as lay ready at its begin

In the middle of one epoch every group is used once. Over whole epochs a buffer of half the data set would still hold what the next one
begins with, as no buffer does whose data set is as large as streams are for. A small data set has shorter groups than such a buffer, which
cost more seeks.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from pi0fm.bench.loading_config import LoadingConfig, make_collator, take
from pi0fm.bench.paired import Ratio, paired_ratio, ratio_of
from pi0fm.data.columns.lerobot_source import DatasetConfig, LeRobotSource
from pi0fm.data.loading.loader import Collator, LoaderConfig, micro_batches
from pi0fm.data.pictures.decoding import cores
from pi0fm.data.pictures.frame_cache import FrameCache, open_cache
from pi0fm.data.pictures.streaming import FrameStream
from pi0fm.data.pictures.video import choose_decoder, decode
from pi0fm.processes import cpu_seconds_of_tree
from pi0fm_client.errors import ConfigError

OURS_A_ROUND = 20  # samples of ours for each of LeRobot's in a round: both sides then take a time that can be measured
SECONDS_TO_REST = 1.0  # until worker processes have prepared the few batches that they may be ahead; no processor time
BUFFER_SHARE = 0.5  # of the data set: groups are then about as long as in a buffer of 4 GiB


def compare_lerobot(source: LeRobotSource, collator: Collator, config: LoadingConfig) -> Ratio:
    """LeRobot's processor seconds for its batches by ours for as many samples.

    LeRobot's side as its own training sets it up: pictures as uint8, workers that stay from round to round with what they have opened, four
    batches ahead. Opening the data set and starting workers, theirs and ours, are outside the clock. Our threads begin and end with a
    round; our worker processes stay, and what they prepare ahead at its end is waited for, so that none of it falls into LeRobot's time.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torch.utils.data import DataLoader, RandomSampler

    chunk = {source.embodiment.action: [step / source.fps for step in range(config.action_horizon)]}
    name, backend = source.repo_id or "local/bench", choose_decoder("auto")
    data = LeRobotDataset(name, root=source.root, delta_timestamps=chunk, video_backend=backend, return_uint8=True)
    batches = max(config.lerobot_batches, config.lerobot_workers)
    sampler = RandomSampler(data, num_samples=batches * config.batch_size)
    workers = config.lerobot_workers
    ahead = 4 if workers else None
    loader = DataLoader(
        data, config.batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, prefetch_factor=ahead
    )

    def theirs() -> None:
        for batch in loader:
            assert batch[source.embodiment.action].shape[1] == config.action_horizon

    first, each = count(), OURS_A_ROUND * batches
    endless = micro_batches(collator, 0, 10**9, config.batch_size, 0, 1, config.batch_size, config.loader)

    def in_threads() -> None:
        begin = next(first) * each
        take(collator, begin, begin + each, config.batch_size, config.loader)

    def in_processes() -> None:
        for batch in islice(endless, each):
            assert len(batch.actions) == config.batch_size
        time.sleep(SECONDS_TO_REST)

    found = paired_ratio(theirs, in_processes if config.processes else in_threads, config.rounds, warm_up=1, clock=cpu_seconds_of_tree)
    endless.close()
    samples = batches * config.batch_size
    return scaled(found, samples, OURS_A_ROUND * samples)


def compare_copying(collator: Collator, config: LoadingConfig) -> tuple[Ratio, Ratio]:
    """Seconds of copying a block of the cache by those of gathering as many pictures, and by those of making the whole batch."""
    cache = collator.cache
    assert isinstance(cache, FrameCache)
    camera, cameras = np.array(cache.cameras[0]), len(cache.cameras)
    pictures = config.batch_size * cameras
    random = np.random.default_rng(0)
    batches = max(1, min(len(camera) // pictures, 64))

    def copy() -> None:
        for first in random.integers(0, max(len(camera) - pictures, 0) + 1, batches).tolist():
            camera[first : first + pictures].copy()

    def gather() -> None:
        for _ in range(batches):
            cache.gather(random.integers(0, len(camera), config.batch_size))

    def collate() -> None:
        for first in random.integers(0, len(camera), batches).tolist():
            collator(first, config.batch_size)

    rounds = 4 * config.rounds
    return (
        paired_ratio(copy, gather, rounds, clock=cpu_seconds_of_tree),
        paired_ratio(copy, collate, rounds, clock=cpu_seconds_of_tree),
    )


def compare_building(source: LeRobotSource, dataset: DatasetConfig, config: LoadingConfig) -> tuple[Ratio, Ratio]:
    """Seconds of decoding every video once by those of building the cache, of a frame: on one processor, and on all of them.

    The first counts processor seconds, the second wall time, in which either side decodes as many files at once as there are processors.
    """

    def compare(clock: Callable[[], float]) -> Ratio:
        with _folder() as folder:
            place = replace(dataset, cache_dir=folder / "cache")
            found = paired_ratio(
                lambda: decode_all(source, dataset),
                lambda: open_cache(source, place, config.size),
                config.rounds,
                warm_up=1,
                clock=clock,
                after=lambda: shutil.rmtree(folder / "cache", ignore_errors=True),
            )
        frames = len(source.state) * len(source.clips)
        return scaled(found, frames, frames)

    with one_processor():
        alone = compare(cpu_seconds_of_tree)
    return alone, compare(time.perf_counter)


@dataclass(frozen=True)
class Streaming:
    """Processor seconds of decoding in order what a sample shows, by those of a sample of the stream: its pictures, and whole batches.

    On one processor, both.

    frames_a_sample: that the stream decoded for its pictures; 1 is every frame once.
    """

    pictures: Ratio
    batches: Ratio
    frames_a_sample: float


def compare_streaming(source: LeRobotSource, dataset: DatasetConfig, config: LoadingConfig) -> Streaming:
    """Rounds of the drawing above. Raises ConfigError for a data set that is shorter than three windows."""
    pictures: list[tuple[float, float]] = []
    batches: list[tuple[float, float]] = []
    decoded = []
    for number in range(config.rounds + 1):
        with one_processor():
            before = _seconds_of_decoding(source, dataset)
            shown, frames = _stream_round(source, dataset, config, 2 * number, _gather)
            between = _seconds_of_decoding(source, dataset)
            made, _ = _stream_round(source, dataset, config, 2 * number + 1, _collate)
        if number:  # the first round warms up
            plain = (before + between) / 2  # one decoding on either side of the pictures; the second stands in front of the batches
            pictures.append((plain, shown))
            batches.append((between, made))
            decoded.append(frames)
    return Streaming(ratio_of(pictures), ratio_of(batches), float(np.mean(decoded)))


def _gather(collator: Collator, first: int, stop: int, batch: int) -> None:
    """The pictures of some steps in the stream's order, nothing else of a batch."""
    for start in range(first * batch, stop * batch, batch):
        places = collator.places(np.arange(start, start + batch))
        assert len(collator.cache.gather(collator.source.frames[places.index])) == batch
        collator.expect_after(start, batch)


def _collate(collator: Collator, first: int, stop: int, batch: int) -> None:
    """Whole batches, as training takes them, from threads: a stream has no worker processes."""
    take(collator, first, stop, batch, LoaderConfig())


def _stream_round(
    source: LeRobotSource, dataset: DatasetConfig, config: LoadingConfig, epoch: int, read: Callable[[Collator, int, int, int], None]
) -> tuple[float, float]:
    """(processor seconds, frames decoded) for each sample in the middle of an epoch, see the drawing."""
    gib = BUFFER_SHARE * len(source.state) * len(source.clips) * config.size**2 * 3 / 2**30
    pictures = FrameStream(source, dataset, config.size, config.batch_size, gib)
    collator = make_collator(source, pictures, config)
    size, batch = len(source.frames), config.batch_size
    first, window = -(-epoch * size // batch), -(-pictures.look_ahead // batch)
    windows = ((epoch + 1) * size // batch - first) // window - 2  # whole ones: a window that is begun is decoded as a whole
    begin, end = first + window, first + (1 + windows) * window
    if windows < 1:
        raise ConfigError(f"streaming is measured over more than three windows of {window * batch} samples, found {size}; raise --frames")
    read(collator, first, begin, batch)
    pictures.settle()
    began, before = cpu_seconds_of_tree(), pictures.frames_decoded
    read(collator, begin, end, batch)
    pictures.settle()
    seconds, frames = cpu_seconds_of_tree() - began, pictures.frames_decoded - before
    pictures.close()
    samples = (end - begin) * batch
    return seconds / samples, frames / samples


def _seconds_of_decoding(source: LeRobotSource, dataset: DatasetConfig) -> float:
    """Processor seconds of decoding in order what one sample shows."""
    began = cpu_seconds_of_tree()
    decode_all(source, dataset)
    return (cpu_seconds_of_tree() - began) / len(source.state)


def decode_all(source: LeRobotSource, dataset: DatasetConfig) -> None:
    """Every video once, from its first frame to its last, by the decoder that the loader takes; nothing is kept.

    As many files at once as there are processors.
    """
    decoder = choose_decoder(dataset.video_decoder)

    def decode_file(path: Path) -> None:
        for _ in decode(path, decoder):
            pass

    with ThreadPoolExecutor(cores()) as threads:
        for _ in threads.map(decode_file, sorted({clip.file for clips in source.clips.values() for clip in clips})):
            pass


@contextmanager
def one_processor() -> Iterator[None]:
    """Keep this thread, and the threads and programs that it starts meanwhile, on one processor, where the system can.

    Two threads on the two halves of a core are charged a second each and decode hardly more than one: with as many on either side, a
    ratio of processor seconds compares work.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def scaled(ratio: Ratio, first: float, second: float) -> Ratio:
    """A ratio of unequal work: `first` pieces on one side, `second` on the other; seconds become those of a piece."""
    times = second / first
    return Ratio(times * ratio.median, times * ratio.low, times * ratio.high, ratio.first_seconds / first, ratio.second_seconds / second)


@contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="pi0fm-bench-frames-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)
