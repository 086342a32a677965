"""What loading costs: samples from the cache, from the stream, building the cache, statistics; LeRobot and plain decoding beside them.

Owns: which comparisons are made, in processor time over the process tree. Does not know: the command line, what a side does.

    cached     LeRobotDataset in its DataLoader : our loader from the frame cache     processor seconds a sample, same pictures and chunks
    gather     copying as many bytes as one block : gathering a batch of pictures     processor seconds, both into fresh arrays
    collate    copying as many bytes as one block : a whole batch, noise included     the same
    build      decoding every video once, in order : building the frame cache         processor seconds, both on one processor
    build_all  the same, as many files at once as there are processors                wall time
    stream     decoding in order : as many pictures in the stream's order             processor seconds, both on one processor
    batches    decoding in order : as many samples of the stream, noise included      the same
    memory     anonymous memory of this process and its workers over many batches     a leak, however small a batch of it, shows

Both sides of a comparison run in turn in this process, and the ratio is of neighbours. Decoding threads share one processor on both
sides: two on the two halves of a core are charged twice the seconds for hardly more frames, which is the machine's doing, not the
cache's; `build_all` shows what becomes of it on all processors. What these figures do not say: disks slower than the page cache, which
holds everything after the first round; what building the cache costs a run of few epochs (`build` says it a frame); LeRobot with workers
pays for moving batches between processes, which --lerobot_workers shows, and ours does, which --processes shows. The drawn data set has a
key frame every 4 frames, as `pi0fm demos` records; LeRobot's own recordings have one every 2, which makes its random access cheaper:
--root. Statistics are computed from columns in memory; reading them is not in their figure.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pi0fm import progress
from pi0fm.bench.loading_config import LoadingConfig, make_collator
from pi0fm.bench.loading_data import write_dataset
from pi0fm.bench.loading_memory import MemoryUse, memory_over
from pi0fm.bench.loading_sides import Streaming, compare_building, compare_copying, compare_lerobot, compare_streaming
from pi0fm.bench.paired import Ratio
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import DatasetConfig, open_source
from pi0fm.data.columns.norm_stats import compute_norm_stats
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.data.pictures.video import choose_decoder
from pi0fm.processes import cpu_seconds_of_tree
from pi0fm.train.parallel.allocator import keep_freed_memory

STATS_FRAMES, STATS_WIDTH, STATS_EPISODE = 1_000_000, 14, 300


@dataclass(frozen=True)
class LoadingFigures:
    """The comparisons; each ratio is of speeds, ours over the other, and its seconds are those of a sample or a frame.

    video_backend: of both sides.
    """

    cached: Ratio
    gather: Ratio
    collate: Ratio
    build: Ratio
    build_all: Ratio
    streaming: Streaming
    norm_stats_seconds: float
    memory: MemoryUse
    frames: int
    video_backend: str


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
        cached = compare_lerobot(source, collator, config)
        gather, collate = compare_copying(collator, config)
        progress.say("building the cache and streaming, beside decoding")
        build, build_all = compare_building(source, dataset, config)
        streaming = compare_streaming(source, dataset, config)
        progress.say("statistics, and memory")
        return LoadingFigures(
            cached=cached,
            gather=gather,
            collate=collate,
            build=build,
            build_all=build_all,
            streaming=streaming,
            norm_stats_seconds=norm_stats_seconds(),
            memory=memory_over(collator, config),
            frames=len(source.state),
            video_backend=choose_decoder("auto"),
        )


def norm_stats_seconds(frames: int = STATS_FRAMES) -> float:
    """Processor seconds for the statistics of a million frames, of 14 state and 14 action dimensions, scaled from `frames`."""
    random = np.random.default_rng(0)
    state, action = (random.standard_normal((frames, STATS_WIDTH), dtype=np.float32) for _ in range(2))
    end = np.minimum((np.arange(frames) // STATS_EPISODE + 1) * STATS_EPISODE, frames)
    began = cpu_seconds_of_tree()
    compute_norm_stats(state, action, end, (), 50)
    return (cpu_seconds_of_tree() - began) * STATS_FRAMES / frames


def _written(root: Path, config: LoadingConfig) -> Path:
    write_dataset(root, config.frames, config.size)
    return root
