"""What loading costs: samples from the cache, from the stream, building the cache, statistics; LeRobot and plain decoding beside them.

Owns: the comparisons, in seconds of processor time over the process tree. Does not know: the command line.

    cached     LeRobotDataset in its DataLoader : our loader from the frame cache     processor seconds a sample, same pictures and chunks
    gather     copying as many bytes as one block : gathering a batch of pictures     processor seconds, both into fresh arrays
    build      decoding every video once, in order : building the frame cache         processor seconds, helpers included
    stream     decoding every video once, in order : one epoch of the stream          processor seconds, batches included
    memory     anonymous memory of this process over many batches                     a leak, however small a batch of it, shows

Both sides of a comparison run in turn in this process, one thread each, and the ratio is of neighbours. What these figures do not say:
wall time on many cores, where decoding spreads and a ratio of processor seconds stays; disks slower than the page cache, which holds
everything after the first round; LeRobot with workers pays for moving batches between processes, which --lerobot_workers shows.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from pi0fm import progress
from pi0fm.bench.cpu_time import cpu_seconds_of_tree
from pi0fm.bench.loading_data import write_dataset
from pi0fm.bench.paired import Ratio, paired_ratio
from pi0fm.data.embodiment import Embodiment
from pi0fm.data.frame_cache import FrameCache, open_cache
from pi0fm.data.lerobot_source import DatasetConfig, LeRobotSource, open_source
from pi0fm.data.loader import Collator, micro_batches
from pi0fm.data.norm_stats import compute_norm_stats
from pi0fm.data.pictures import Pictures
from pi0fm.data.prompt import BYTES, PromptTokenizer, load_tokenizer
from pi0fm.data.streaming import FrameStream
from pi0fm.data.transforms import make_chain
from pi0fm.data.video import choose_decoder, decode
from pi0fm.errors import ConfigError
from pi0fm.options import option
from pi0fm.train.allocator import keep_freed_memory

NETWORK_WIDTH, PROMPT_TOKENS = 32, 64  # pi0's widths of state and action
OURS_A_ROUND = 20  # samples of ours for each of LeRobot's in a round: both sides then take a time that can be measured
STATS_FRAMES, STATS_WIDTH, STATS_EPISODE = 1_000_000, 14, 300
BUFFER_SHARE = 0.5  # of the data set: a stream that held everything would be a cache


@dataclass(frozen=True)
class LoadingConfig:
    """Options of `pi0fm bench loading`."""

    root: Path | None = option(None, "folder of a LeRobot data set with videos; one is drawn and written when not given")
    frames: int = option(16000, "frames of the data set that is written")
    size: int = option(128, "side of the pictures, of the data set that is written and of those that are loaded")
    action_horizon: int = option(50, "actions of a sample")
    batch_size: int = option(32, "samples of a batch, on both sides")
    rounds: int = option(3, "times that both sides of a comparison run")
    lerobot_batches: int = option(2, "batches of LeRobot's loader in a round")
    lerobot_workers: int = option(0, "processes of LeRobot's DataLoader; 0, its cheapest, loads in the calling process")
    memory_batches: int = option(2000, "batches over which memory is watched; the issue's own figure is 100000")

    def __post_init__(self) -> None:
        least = {"frames": 1400, "size": 16, "action_horizon": 1, "batch_size": 1, "rounds": 1, "lerobot_batches": 1, "memory_batches": 10}
        for name, low in (least | {"lerobot_workers": 0}).items():
            if getattr(self, name) < low:
                raise ConfigError(f"--{name} must be {low} or more, found {getattr(self, name)}; leave it out for the default")
        if self.size % 2:
            raise ConfigError(f"--size must be even, since video is, found {self.size}; try {self.size + 1}")


@dataclass(frozen=True)
class LoadingFigures:
    """The comparisons; each ratio is of speeds, ours over the other.

    lerobot, cached: samples a processor second. decode: frames a processor second.
    """

    cached: Ratio
    gather: Ratio
    collate: Ratio
    build: Ratio
    stream: Ratio
    lerobot_samples: float
    cached_samples: float
    decoded_frames: float
    norm_stats_seconds: float
    anonymous_mib: tuple[float, float]
    frames: int


def measure(config: LoadingConfig) -> LoadingFigures:
    """All of them, in this process with one thread. Raises DatasetError for a data set that cannot be read."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    with tempfile.TemporaryDirectory(prefix="pi0fm-bench-loading-") as folder:
        dataset = DatasetConfig(root=config.root or _written(Path(folder) / "dataset", config), cache_dir=Path(folder) / "cache")
        source = open_source(dataset, Embodiment())
        cache = open_cache(source, dataset, config.size)
        collator = make_collator(source, cache, config)
        progress.say(f"LeRobot's loader and ours, {config.rounds} rounds")
        ratio = compare_lerobot(source, collator, config)
        gather, collate = compare_copying(collator, config)
        progress.say("building the cache and streaming, beside decoding")
        build, stream = compare_decoding(source, dataset, config)
        progress.say("statistics, and memory")
        return LoadingFigures(
            cached=_scaled(ratio, OURS_A_ROUND),
            gather=gather,
            collate=collate,
            build=build,
            stream=stream,
            lerobot_samples=config.lerobot_batches * config.batch_size / ratio.first_seconds,
            cached_samples=OURS_A_ROUND * config.lerobot_batches * config.batch_size / ratio.second_seconds,
            decoded_frames=len(source.state) * len(source.clips) / build.first_seconds,
            norm_stats_seconds=norm_stats_seconds(),
            anonymous_mib=memory_over(collator, config),
            frames=len(source.state),
        )


def make_collator(source: LeRobotSource, pictures: Pictures, config: LoadingConfig) -> Collator:
    """Our batches at pi0's widths: normalised, padded, tokenised, with noise and flow times."""
    chain = make_chain(
        source.embodiment,
        source.norm_stats(config.action_horizon),
        PromptTokenizer(load_tokenizer(BYTES, 384), PROMPT_TOKENS),
        normalization="z_score",
        floor=1e-3,
        image_size=config.size,
        padded_state_dim=max(NETWORK_WIDTH, source.embodiment.dims()[0]),
        padded_action_dim=max(NETWORK_WIDTH, source.embodiment.dims()[1]),
    )
    return Collator(source, pictures, chain, config.action_horizon, max(NETWORK_WIDTH, source.embodiment.dims()[1]), seed=0)


def compare_lerobot(source: LeRobotSource, collator: Collator, config: LoadingConfig) -> Ratio:
    """LeRobot's processor seconds for its batches by ours for OURS_A_ROUND times as many."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torch.utils.data import DataLoader, RandomSampler

    chunk = {source.embodiment.action: [step / source.fps for step in range(config.action_horizon)]}

    def fresh() -> LeRobotDataset:
        name, backend = source.repo_id or "local/bench", choose_decoder("auto")
        return LeRobotDataset(name, root=source.root, delta_timestamps=chunk, video_backend=backend)

    kept = fresh()

    def theirs() -> None:
        # with workers each round takes a data set that has decoded nothing: its decoders do not survive the fork
        data = kept if config.lerobot_workers == 0 else fresh()
        sampler = RandomSampler(data, num_samples=config.lerobot_batches * config.batch_size)
        for batch in DataLoader(data, config.batch_size, sampler=sampler, num_workers=config.lerobot_workers):
            assert batch[source.embodiment.action].shape[1] == config.action_horizon

    following = iter(range(10**9))

    def ours() -> None:
        first = next(following) * OURS_A_ROUND * config.lerobot_batches
        _take(collator, first, first + OURS_A_ROUND * config.lerobot_batches, config.batch_size)

    return paired_ratio(theirs, ours, config.rounds, warm_up=1, clock=cpu_seconds_of_tree)


def compare_copying(collator: Collator, config: LoadingConfig) -> tuple[Ratio, Ratio]:
    """Seconds of copying a block of the cache by those of gathering as many pictures, and by those of making the whole batch."""
    cache = collator.cache
    assert isinstance(cache, FrameCache)
    camera, cameras = np.array(cache.cameras[0]), len(cache.cameras)
    count = config.batch_size * cameras
    random = np.random.default_rng(0)
    batches = max(1, min(len(camera) // count, 64))

    def copy() -> None:
        for first in random.integers(0, max(len(camera) - count, 0) + 1, batches).tolist():
            camera[first : first + count].copy()

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


def compare_decoding(source: LeRobotSource, dataset: DatasetConfig, config: LoadingConfig) -> tuple[Ratio, Ratio]:
    """Processor seconds of decoding every video once by those of building the cache, and by those of an epoch of the stream."""
    paths = sorted({clip.file for clips in source.clips.values() for clip in clips})
    decoder = choose_decoder(dataset.video_decoder)

    def decode_all() -> None:
        for path in paths:
            for _ in decode(path, source.fps, decoder):
                pass

    def build() -> None:
        with _folder() as folder:
            open_cache(source, replace(dataset, cache_dir=folder), config.size)

    gib = BUFFER_SHARE * len(source.state) * len(source.clips) * config.size**2 * 3 / 2**30

    pictures = FrameStream(source, dataset, config.size, config.batch_size, gib)
    collator = make_collator(source, pictures, config)
    steps = len(source.frames) // config.batch_size
    following = iter(range(10**9))

    def stream() -> None:
        # the stream goes on from round to round: what the first reads ahead of its last batch is the start of the second
        first = next(following) * steps
        _take(collator, first, first + steps, config.batch_size)
        pictures.settle()

    built = paired_ratio(decode_all, build, config.rounds, warm_up=1, clock=cpu_seconds_of_tree)
    streamed = paired_ratio(decode_all, stream, config.rounds, warm_up=1, clock=cpu_seconds_of_tree)
    pictures.close()
    return built, streamed


def norm_stats_seconds(frames: int = STATS_FRAMES) -> float:
    """Processor seconds for the statistics of a million frames, of 14 state and 14 action dimensions, scaled from `frames`."""
    random = np.random.default_rng(0)
    state, action = (random.standard_normal((frames, STATS_WIDTH), dtype=np.float32) for _ in range(2))
    end = np.minimum((np.arange(frames) // STATS_EPISODE + 1) * STATS_EPISODE, frames)
    began = cpu_seconds_of_tree()
    compute_norm_stats(state, action, end, (), 50)
    return (cpu_seconds_of_tree() - began) * STATS_FRAMES / frames


def memory_over(collator: Collator, config: LoadingConfig) -> tuple[float, float]:
    """MiB of memory that no file backs: after a tenth of the batches, and after all of them."""
    begin = config.memory_batches // 10
    _take(collator, 0, begin, config.batch_size)
    before = _anonymous_mib()
    _take(collator, begin, config.memory_batches, config.batch_size)
    return before, _anonymous_mib()


def _take(collator: Collator, first: int, stop: int, batch_size: int) -> None:
    """Make the batches of some steps, as training's loader does, to the last."""
    for batch in micro_batches(collator, first, stop, batch_size, 0, 1, batch_size):
        assert len(batch.actions) == batch_size


def _written(root: Path, config: LoadingConfig) -> Path:
    write_dataset(root, config.frames, config.size)
    return root


@contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="pi0fm-bench-frames-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _anonymous_mib() -> float:
    info = psutil.Process().memory_info()
    return (info.rss - getattr(info, "shared", 0)) / 2**20


def _scaled(ratio: Ratio, factor: float) -> Ratio:
    return replace(ratio, median=factor * ratio.median, low=factor * ratio.low, high=factor * ratio.high)
