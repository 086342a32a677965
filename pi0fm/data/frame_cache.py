"""Every picture of a data set, decoded once to the network's size and kept as one memory-mapped array a camera.

Owns: building it in threads, under a lock that all processes of a node share, and its shape on disk. Does not know: training.

    <cache_dir>/<fingerprint of data set>-<columns>-<size>/<column>.u8     uint8 [N, size, size, 3]
                                                          cache.json       written last: a directory without it is rebuilt

Files are named by the data set's column: two embodiments may give one column different names, or swap two names.
"""

import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pi0fm import files, progress
from pi0fm.data.images import resize_with_padding
from pi0fm.data.lerobot_source import Clip, DatasetConfig, LeRobotSource
from pi0fm.data.video import choose_decoder, decode
from pi0fm.errors import DatasetError

BATCH = 64


@dataclass(frozen=True)
class FrameCache:
    """Pictures by camera, in the embodiment's order; each uint8 [N, size, size, 3], read-only."""

    cameras: tuple[NDArray[np.uint8], ...]

    def gather(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [B, C, size, size, 3] of the frames asked for."""
        return np.stack([camera[frames] for camera in self.cameras], axis=1)


def open_cache(source: LeRobotSource, config: DatasetConfig, size: int) -> FrameCache:
    """Open the cache, building what is missing. Raises DatasetError when it would exceed the limit, or a video is unreadable."""
    directory = (
        cache_directory(config) / f"{source.fingerprint}-{'+'.join(sorted(source.embodiment.cameras.values())).replace('/', '_')}-{size}"
    )
    columns = tuple(source.embodiment.cameras.values())
    count = len(source.state)
    with _locked(directory):
        if not (directory / "cache.json").is_file():
            _check_room(directory, count * len(columns) * size * size * 3, config.cache_limit_gib)
            _build(source, config, directory, size)
    shape = (count, size, size, 3)
    return FrameCache(tuple(np.memmap(_file(directory, column), dtype=np.uint8, mode="r", shape=shape) for column in columns))


def cache_directory(config: DatasetConfig) -> Path:
    """Where decoded frames are kept: the configured place, else the user's cache."""
    return config.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pi0fm" / "frames"


def _build(source: LeRobotSource, config: DatasetConfig, directory: Path, size: int) -> None:
    shutil.rmtree(directory, ignore_errors=True)  # without its cache.json it is the rest of an interrupted build
    decoder = choose_decoder(config.video_decoder)
    count = len(source.state)
    with files.new_directory(directory) as aside, progress.step("decode frames", count * len(source.embodiment.cameras)) as bar:
        for camera, column in source.embodiment.cameras.items():
            target = np.memmap(_file(aside, column), dtype=np.uint8, mode="w+", shape=(count, size, size, 3))
            if camera in source.stored_pictures:
                for index, encoded in source.stored(camera):
                    target[index] = resize_with_padding(np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))[None], size)[0]
                    bar.advance()
            else:
                by_file: dict[Path, list[Clip]] = {}
                for clip in source.clips[camera]:
                    by_file.setdefault(clip.file, []).append(clip)
                with ThreadPoolExecutor(os.cpu_count()) as threads:
                    jobs = [threads.submit(_decode_file, path, clips, source.fps, decoder, target, bar) for path, clips in by_file.items()]
                    for job in jobs:
                        job.result()
            target.flush()
        files.write_json(aside / "cache.json", {"frames": count, "size": size, "columns": list(source.embodiment.cameras.values())})


def _file(directory: Path, column: str) -> Path:
    return directory / f"{column.replace('/', '_')}.u8"


def _decode_file(
    path: Path, clips: list[Clip], fps: float, decoder: Literal["pyav", "torchcodec"], target: NDArray[np.uint8], bar: progress.Step
) -> None:
    """Write every frame of one file to its place; a frame that the episodes expect and the file lacks is an error."""
    size = target.shape[1]
    length = max(clip.offset + clip.count for clip in clips)
    place = np.full(length, -1, dtype=np.int64)  # frame number in the file -> frame of the data set
    for clip in clips:
        place[clip.offset : clip.offset + clip.count] = np.arange(clip.first, clip.first + clip.count)
    seen = np.zeros(length, dtype=bool)
    pending: list[tuple[int, NDArray[np.uint8]]] = []

    def write() -> None:
        if pending:
            target[[index for index, _ in pending]] = resize_with_padding(np.stack([frame for _, frame in pending]), size)
            bar.advance(len(pending))
            pending.clear()

    for number, frame in decode(path, fps, decoder):
        if number < length and place[number] >= 0 and not seen[number]:
            seen[number] = True
            pending.append((int(place[number]), frame))
            if len(pending) == BATCH:
                write()
    write()
    missing = np.flatnonzero((place >= 0) & ~seen)
    if len(missing):
        found = int(seen.sum())
        raise DatasetError(
            f"video {path} holds {found} of the {found + len(missing)} frames that its episodes name; download or record it again"
        )


def _check_room(directory: Path, needed: int, limit_gib: float) -> None:
    if needed > limit_gib * 2**30:
        raise DatasetError(
            f"decoded frames need {needed / 2**30:.1f} GiB, dataset.cache_limit_gib is {limit_gib}; raise it or use a smaller image_size"
        )
    place = directory.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DatasetError(
            f"decoded frames need {needed / 2**30:.1f} GiB, {place} has {free / 2**30:.1f} GiB free; set dataset.cache_dir to another disk"
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process of a node builds, the others wait; the lock goes with its process, however that ends."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
