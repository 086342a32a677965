"""Processor time of data loading: cached samples, streamed samples, building the cache, statistics; against LeRobot and plain decoding.

Owns: the work of each side in a round, the timed part of it, a generated data set. Does not know: training.

    cached_ratio               LeRobotDataset in its DataLoader : our loader from the frame cache    same pictures and chunks; at least 30
    cached_of_memcpy           copying as many bytes as one block : gathering a batch of pictures    both into new arrays; at least 0.5
    batch_of_memcpy            the same : a whole batch, noise included
    build_of_decode            decoding every video once, in order : building the frame cache        on one processor; at least 0.8
    .._on_all_processors       the same, as many files at once as there are processors               wall time
    streaming_of_decode        decoding in order : as many pictures in the stream's order            on one processor; at least 0.6
    streamed_batch_of_decode   the same : as many samples of the stream, noise included
    norm_stats_seconds         statistics of a million frames whose columns are in memory            at most 20
    memory_mib                 anonymous memory of this process and its workers over many batches, which reveals a leak

A ratio is the first's processor seconds / the second's, both sides alternating in this process. Decoding threads share one processor on
both sides: two hyper-threads of one core are charged twice the seconds for few more frames. Not measured: disks slower than the page
cache, which holds everything after the first round; the share of building the cache in a run of few epochs. LeRobot with workers pays for
moving batches between processes (--lerobot_workers). The generated data set has a key frame every 4 frames, as `pi0fm demos` records;
LeRobot's recordings have one every 2, which makes random access cheaper for LeRobot: --root measures one of them.

    stream, one round     a new buffer | first window, not timed | the middle of an epoch: TIMED | whole windows, one is left
    of one epoch                         fills the buffer          decodes as much ahead at its end as was ready at its start

In the middle of an epoch every group is used once. Over whole epochs a buffer of half the data set would still hold the start of the next
epoch, which the buffer of a data set large enough for streaming never does. A small data set has shorter groups, which cost more seeks.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pi0fm import progress
from pi0fm.bench.config import LoadingOptions
from pi0fm.bench.harness.measure import BenchReport, PairedRatio, paired_ratio, ratio_of, seconds_of
from pi0fm.data.chain import make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import LeRobotSource, open_source
from pi0fm.data.columns.norm_stats import compute_norm_stats
from pi0fm.data.config import DatasetConfig, LoaderConfig
from pi0fm.data.loading.loader import Collator, micro_batches
from pi0fm.data.pictures.frame_cache import FrameCache, open_cache
from pi0fm.data.pictures.source import Pictures
from pi0fm.data.pictures.streaming import FrameStream
from pi0fm.data.pictures.video import choose_decoder, decode
from pi0fm.data.prompt import BYTES, PromptTokenizer, load_tokenizer
from pi0fm.demos.demonstration import Demonstration
from pi0fm.demos.encoding import EncodedDemonstration, encode
from pi0fm.demos.lerobot_writer import Contents, Layout, write_segment
from pi0fm.machine import cores
from pi0fm.processes import anonymous_memory_of_tree, cpu_seconds_of_tree
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm_client.errors import ConfigError

NETWORK_WIDTH, PROMPT_TOKENS = 32, 64  # pi0's widths of state and action
STATS_FRAMES, STATS_WIDTH, STATS_EPISODE = 1_000_000, 14, 300
BATCHES_A_ROUND = 20  # our samples for each of LeRobot's in a round, so that our side also takes a measurable time
BUFFER_SHARE = 0.5  # of the data set: groups are then about as long as in a buffer of 4 GiB
MEMORY_SAMPLES = 500
FPS, EPISODE_FRAMES, SEGMENT_EPISODES = 50, 100, 10  # of the generated data set
DISTINCT_EPISODES = 40  # encoded once and written repeatedly: decoding a repeated picture takes as long


def measure(options: LoadingOptions) -> BenchReport:
    """Run all comparisons in this process. Raises DatasetError for a data set that cannot be read."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as training does
    with tempfile.TemporaryDirectory(prefix="pi0fm-bench-loading-") as folder:
        dataset = DatasetConfig(root=options.root or Path(folder) / "dataset", cache_dir=Path(folder) / "cache")
        if options.root is None:
            write_dataset(Path(folder) / "dataset", options.frames, options.size)
        source = open_source(dataset, Embodiment())
        collator = make_collator(source, open_cache(source, dataset, options.size), options)
        progress.say(f"LeRobot's loader and ours, {options.rounds} rounds")
        cached = compare_lerobot(source, collator, options)
        gather, collate = compare_copying(collator, options)
        progress.say("building the cache and streaming, against decoding")
        build, build_all = compare_building(source, dataset, options)
        stream, batches, decoded = compare_streaming(source, dataset, options)
        progress.say("statistics, and memory")
        stats_seconds, memory = norm_stats_seconds(), memory_over(collator, options)
    ratios = {
        "cached_ratio": cached,
        "cached_of_memcpy": gather,
        "streaming_of_decode": stream,
        "build_of_decode": build,
        "batch_of_memcpy": collate,
        "build_of_decode_on_all_processors": build_all,
        "streamed_batch_of_decode": batches,
    }
    return BenchReport(
        {
            **{name: ratio.median for name, ratio in ratios.items()},
            "norm_stats_seconds_per_million_frames": stats_seconds,
            "intervals": {name: ratio.interval for name, ratio in ratios.items()},
            "cached_samples_per_cpu_second": 1 / cached.second_seconds,
            "lerobot_samples_per_cpu_second": 1 / cached.first_seconds,
            "decoded_frames_per_cpu_second": 1 / build.first_seconds,
            "streamed_frames_a_sample": decoded,
            "memory_mib": memory,
            "memory_growth_mib": memory["end"] - memory["start"],
            "frames": len(source.state),
            **{name: getattr(options, name) for name in ("size", "action_horizon", "batch_size", "memory_batches", "lerobot_workers")},
            "video_backend": choose_decoder("auto"),
        }
    )


def make_collator(source: LeRobotSource, pictures: Pictures, options: LoadingOptions) -> Collator:
    """Collator of our batches at pi0's widths: normalised, padded, tokenised, with noise and flow times."""
    state_dim, action_dim = (max(NETWORK_WIDTH, own) for own in source.embodiment.dims())
    chain = make_chain(
        source.embodiment,
        source.norm_stats(options.action_horizon),
        PromptTokenizer(load_tokenizer(BYTES, 384), PROMPT_TOKENS),
        normalization="z_score",
        floor=1e-3,
        image_size=options.size,
        padded_state_dim=state_dim,
        padded_action_dim=action_dim,
    )
    return Collator(source, pictures, chain, options.action_horizon, action_dim, seed=0)


def compare_lerobot(source: LeRobotSource, collator: Collator, options: LoadingOptions) -> PairedRatio:
    """LeRobot's processor seconds for its batches / ours for as many samples.

    LeRobot's side is set up as in its training: pictures as uint8, persistent workers with open files, four batches ahead. Opening the data
    set and starting workers are not timed. Our threads start and end with a round.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torch.utils.data import DataLoader, RandomSampler

    name, horizon, size, workers = source.embodiment.action, options.action_horizon, options.batch_size, options.lerobot_workers
    chunk = {name: [step / source.fps for step in range(horizon)]}
    backend = choose_decoder("auto")
    data = LeRobotDataset(
        source.repo_id or "local/bench", root=source.root, delta_timestamps=chunk, video_backend=backend, return_uint8=True
    )
    batches = max(options.lerobot_batches, workers)
    sampler = RandomSampler(data, num_samples=batches * size)
    ahead: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    loader = DataLoader(data, size, sampler=sampler, num_workers=workers, **ahead)

    def theirs() -> None:
        for batch in loader:
            assert batch[name].shape[1] == horizon

    first, each = count(), BATCHES_A_ROUND * batches

    def in_threads() -> None:
        begin = next(first) * each
        _make_batches(collator, begin, begin + each, size)

    found = paired_ratio(theirs, in_threads, options.rounds, warm_up=1, clock=cpu_seconds_of_tree)
    return found.per_piece(batches * size, BATCHES_A_ROUND * batches * size)


def compare_copying(collator: Collator, options: LoadingOptions) -> tuple[PairedRatio, PairedRatio]:
    """Seconds of copying a block of the cache / those of gathering as many pictures, and / those of making the whole batch."""
    cache = collator.cache
    assert isinstance(cache, FrameCache)
    camera, pictures = np.array(cache.cameras[0]), options.batch_size * len(cache.cameras)
    random = np.random.default_rng(0)
    batches = max(1, min(len(camera) // pictures, 64))

    def copy() -> None:
        for first in random.integers(0, max(len(camera) - pictures, 0) + 1, batches).tolist():
            camera[first : first + pictures].copy()

    def gather() -> None:
        for _ in range(batches):
            cache.gather(random.integers(0, len(camera), options.batch_size))

    def collate() -> None:
        for first in random.integers(0, len(camera), batches).tolist():
            collator(first, options.batch_size)

    one, other = (paired_ratio(copy, ours, 4 * options.rounds, clock=cpu_seconds_of_tree) for ours in (gather, collate))
    return one, other


def compare_building(source: LeRobotSource, dataset: DatasetConfig, options: LoadingOptions) -> tuple[PairedRatio, PairedRatio]:
    """Seconds per frame of decoding every video once / those of building the cache: on one processor, and on all of them.

    The first counts processor seconds; the second counts wall time, and both sides decode as many files at once as there are processors.
    """
    frames = len(source.state) * len(source.clips)

    def compare(clock: Callable[[], float]) -> PairedRatio:
        with tempfile.TemporaryDirectory(prefix="pi0fm-bench-frames-") as folder:
            place = replace(dataset, cache_dir=Path(folder) / "cache")
            found = paired_ratio(
                lambda: decode_all(source, dataset),
                lambda: open_cache(source, place, options.size),
                options.rounds,
                warm_up=1,
                clock=clock,
                after=lambda: shutil.rmtree(Path(folder) / "cache", ignore_errors=True),
            )
        return found.per_piece(frames, frames)

    with one_processor():
        alone = compare(cpu_seconds_of_tree)
    return alone, compare(time.perf_counter)


def compare_streaming(source: LeRobotSource, dataset: DatasetConfig, options: LoadingOptions) -> tuple[PairedRatio, PairedRatio, float]:
    """Processor seconds of decoding a sample's pictures in order / those of a streamed sample: its pictures alone, and in whole batches.

    The last value is the number of frames that the stream decoded for a sample's pictures; 1 means every frame once.
    Raises ConfigError for a data set that is shorter than three windows.
    """
    pairs: tuple[list[tuple[float, float]], ...] = ([], [])
    decoded = []

    def decode_once() -> float:
        return seconds_of(lambda: decode_all(source, dataset), cpu_seconds_of_tree) / len(source.state)

    for number in range(options.rounds + 1):
        with one_processor():
            before = decode_once()
            shown, frames = _stream_round(source, dataset, options, 2 * number, _gather)
            between = decode_once()
            made, _ = _stream_round(source, dataset, options, 2 * number + 1, _make_batches)
        if number:  # the first round warms up
            pairs[0].append(((before + between) / 2, shown))  # one decoding on either side of the pictures
            pairs[1].append((between, made))
            decoded.append(frames)
    return ratio_of(pairs[0]), ratio_of(pairs[1]), float(np.mean(decoded))


def _gather(collator: Collator, first: int, stop: int, batch: int) -> None:
    """Gather the pictures of some steps in the stream's order, without the rest of a batch."""
    for start in range(first * batch, stop * batch, batch):
        places = collator.samples_at(np.arange(start, start + batch))
        assert len(collator.cache.gather(collator.source.frames[places.index])) == batch
        collator.announce_after(start, batch)


def _make_batches(collator: Collator, first: int, stop: int, batch: int) -> None:
    """Make the whole batches of some steps in threads, as in training."""
    for made in micro_batches(collator, first, stop, batch, 0, 1, batch, LoaderConfig()):
        assert len(made.actions) == batch


def _stream_round(
    source: LeRobotSource, dataset: DatasetConfig, options: LoadingOptions, epoch: int, read: Callable[[Collator, int, int, int], None]
) -> tuple[float, float]:
    """(processor seconds, frames decoded) per sample in the middle of an epoch; see the drawing."""
    gib = BUFFER_SHARE * len(source.state) * len(source.clips) * options.size**2 * 3 / 2**30
    pictures = FrameStream(source, dataset, options.size, options.batch_size, gib)
    collator = make_collator(source, pictures, options)
    size, batch = len(source.frames), options.batch_size
    first, window = -(-epoch * size // batch), -(-pictures.look_ahead // batch)
    windows = ((epoch + 1) * size // batch - first) // window - 2  # whole ones: a window once started is decoded to its end
    begin, end = first + window, first + (1 + windows) * window
    if windows < 1:
        raise ConfigError(f"streaming is measured over more than three windows of {window * batch} samples, found {size}; raise --frames")

    def whole(first: int, stop: int) -> None:
        read(collator, first, stop, batch)
        pictures.settle()

    whole(first, begin)
    before = pictures.frames_decoded
    seconds, frames = seconds_of(lambda: whole(begin, end), cpu_seconds_of_tree), pictures.frames_decoded - before
    pictures.close()
    samples = (end - begin) * batch
    return seconds / samples, frames / samples


def decode_all(source: LeRobotSource, dataset: DatasetConfig) -> None:
    """Decode every video once from first to last frame, with the loader's decoder, and discard the frames.

    Decodes as many files at once as there are processors.
    """
    decoder = choose_decoder(dataset.video_decoder)

    def decode_file(path: Path) -> None:
        for _ in decode(path, decoder):
            pass

    with ThreadPoolExecutor(cores()) as threads:
        list(threads.map(decode_file, sorted({clip.file for clips in source.clips.values() for clip in clips})))


@contextmanager
def one_processor() -> Iterator[None]:
    """Pin this thread, and the threads and programs that it starts in the block, to one processor, where the system supports it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def norm_stats_seconds(frames: int = STATS_FRAMES) -> float:
    """Processor seconds for the statistics of a million frames of 14 state and 14 action dimensions, scaled from `frames`."""
    random = np.random.default_rng(0)
    state, action = (random.standard_normal((frames, STATS_WIDTH), dtype=np.float32) for _ in range(2))
    end = np.minimum((np.arange(frames) // STATS_EPISODE + 1) * STATS_EPISODE, frames)
    return seconds_of(lambda: compute_norm_stats(state, action, end, (), 50), cpu_seconds_of_tree) * STATS_FRAMES / frames


def memory_over(collator: Collator, options: LoadingOptions) -> dict[str, float]:
    """Anonymous memory in MiB of this process and its children: after a tenth of the batches, after all, and the peak in between.

    The first tenth of the batches fills tables and the allocator's reserve.
    """
    last, size = options.memory_batches, options.batch_size
    begin, between = last // 10, max(1, last // MEMORY_SAMPLES)
    seen: list[float] = []
    batches = micro_batches(collator, 0, last, size, 0, 1, size)
    with progress.step("batches", last) as bar:
        for number, _ in enumerate(batches, start=1):
            bar.advance()
            if number in {begin, last} or (number > begin and number % between == 0):
                seen.append(anonymous_memory_of_tree() / 2**20)
    return {"start": seen[0], "end": seen[-1], "peak": max(seen)}


def write_dataset(root: Path, frames: int, size: int) -> None:
    """Write at least `frames` frames of one camera, size x size (even), in whole episodes in LeRobot's format; `root` must not exist."""
    names = ("x0", "x1", "x2", "x3")
    layout = Layout(FPS, "drawn", names, names, {"base": (size, size)})
    episodes, written = -(-frames // EPISODE_FRAMES), Contents()
    encoded: list[EncodedDemonstration] = []
    with progress.step("write a data set", episodes) as bar:
        for first in range(0, episodes, SEGMENT_EPISODES):
            segment = range(first, min(first + SEGMENT_EPISODES, episodes))
            encoded += [encode(draw_episode(seed, size), FPS) for seed in segment if seed < DISTINCT_EPISODES]
            written = write_segment(root, layout, written, [encoded[seed % DISTINCT_EPISODES] for seed in segment])
            bar.advance(len(segment))


def draw_episode(seed: int, size: int) -> Demonstration:
    """Draw an episode, a function of the seed: a gripper of two dark bars follows a slow curve over a lit table with a few blocks.

    Pictures compress like a simulator's. There is no noise, which would slow the decoder and so flatter everything that avoids decoding.
    """
    random = np.random.default_rng(seed)
    time = np.arange(EPISODE_FRAMES) / FPS
    path = 0.5 + 0.3 * np.sin(2 * np.pi * random.uniform(0.1, 0.6, (1, 2)) * time[:, None] + random.uniform(0, 6, (1, 2)))
    rows, columns = np.mgrid[0:size, 0:size] / size
    light = 0.55 + 0.35 * np.exp(-((rows - 0.4) ** 2 + (columns - 0.6) ** 2) * 3)
    table = (light + 0.03 * np.sin(columns * 60 + 4 * np.sin(rows * 9)))[..., None] * np.array([210.0, 190.0, 160.0])
    for _ in range(5):
        top, left = random.uniform(0.1, 0.8, 2)
        inside = (rows > top) & (rows < top + 0.12) & (columns > left) & (columns < left + 0.12)
        table[inside] = random.uniform(30, 230, 3) * light[inside, None]
    pictures = np.repeat(table.clip(0, 255).astype(np.uint8)[None], EPISODE_FRAMES, axis=0)
    bar, gap = max(size // 24, 1), max(size // 12, 2)
    for picture, (row, column) in zip(pictures, (path * size).astype(int), strict=True):
        for left in (column - gap, column + gap - bar):
            picture[max(row - 3 * bar, 0) : row + 3 * bar, max(left, 0) : max(left + bar, 0)] = 40
        picture[max(row - 5 * bar, 0) : max(row - 3 * bar, 0), max(column - gap, 0) : column + gap] = 70
    state = np.concatenate([path, np.gradient(path, axis=0)], axis=1).astype(np.float32)
    return Demonstration("push", "push the block to the edge", seed, {"base": pictures}, state, np.roll(state, -1, axis=0))
