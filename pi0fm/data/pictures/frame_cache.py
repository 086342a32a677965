"""Every picture of a data set, decoded once to the network's size and kept in memory-mapped shards.

Owns: which shard holds which frames, building missing shards under a lock that all processes of a node share, their check.
Does not know: training, how a shard is laid out, how a video is decoded.

    <cache_dir>/<data set>-<episodes>-<columns>-<size>-<resize>-<format>/<column>/00003.u8    a stretch of whole episodes
                                                                   verified-<host>.json   shards checked since the machine started
    open    checks size and count of every shard; sums of those that changed, or that a restart of the machine may have torn
    build   decodes missing and torn shards, so that an interrupted build continues

Folders are named by the data set's column: two embodiments may give one column different names, or swap two names.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psutil
from numpy.typing import NDArray

from pi0fm import files, progress
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.config import DatasetConfig
from pi0fm.data.order.orders import Order, Shuffled
from pi0fm.data.pictures.decoding import Job, TooFarError, VideoSegment, needed_tolerance, write_jobs
from pi0fm.data.pictures.images import resize_with_padding
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize, refuse_size
from pi0fm.data.pictures.shards import SUFFIX, CacheFormat, ShardedFrames, is_whole, open_shard, write_shard
from pi0fm.data.pictures.source import Pictures
from pi0fm.data.pictures.stored import stored_picture
from pi0fm.data.pictures.video import choose_decoder
from pi0fm.machine import cores
from pi0fm_client.errors import DatasetError, OutputError

SHARD_BYTES = 64 * 2**20
MOST_SHARDS = 4096  # per camera: each is a memory map, and a process may have tens of thousands
LONGEST_NAME = 120  # characters of a folder's name that come from columns
JPEG_SHARE = 0.2  # of the raw bytes, at quality 95; only for an estimate of space


@dataclass(frozen=True)
class ShardFolder:
    """Folder with the shards of some columns at one size: enough to open them in any process."""

    directory: Path
    columns: tuple[str, ...]
    firsts: tuple[int, ...]
    size: int
    form: CacheFormat

    def path(self, column: str, number: int) -> Path:
        """File of a shard."""
        return self.directory / file_name(column) / f"{number:05d}.{SUFFIX[self.form]}"

    def open(self) -> "FrameCache":
        """Open the pictures of shards that are known to be whole."""
        cameras = []
        for column in self.columns:
            shards = [open_shard(self.path(column, number), self.size, self.form) for number in range(len(self.firsts))]
            cameras.append(ShardedFrames(self.firsts, shards, self.size))
        return FrameCache(tuple(cameras), self)


@dataclass(frozen=True)
class FrameCache(Pictures):
    """Pictures by camera, in the embodiment's order; each uint8 [N, size, size, 3], read-only.

    folder: where they are stored; None for arrays in memory. A pickle of the cache holds the folder instead of the pictures.
    """

    cameras: tuple[NDArray[np.uint8] | ShardedFrames, ...]
    folder: ShardFolder | None = None

    def __reduce__(self) -> tuple[Callable[..., "FrameCache"], tuple[Any, ...]]:
        return (FrameCache, (self.cameras,)) if self.folder is None else (ShardFolder.open, (self.folder,))

    @property
    def order(self) -> Order:
        """Uniform shuffling, since any order is read equally fast."""
        return Shuffled()

    def gather(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read uint8 [B, C, size, size, 3] of the given frames."""
        out = np.empty((len(frames), len(self.cameras), *self.cameras[0].shape[1:]), np.uint8)
        for number, camera in enumerate(self.cameras):
            if isinstance(camera, ShardedFrames):
                camera.read(frames, out[:, number])
            else:
                out[:, number] = camera[frames]
        return out


def open_cache(
    source: LeRobotSource, config: DatasetConfig, size: int, form: CacheFormat = "uint8", resize: Resize = ANTIALIAS
) -> FrameCache:
    """Open the cache, building missing shards. Raises DatasetError when it would exceed the limit, or a video is unreadable."""
    directory = cache_folder(source, config, size, form, resize)
    firsts = shard_firsts(source, size)
    cache = _ShardBuilder(ShardFolder(directory, tuple(source.embodiment.cameras.values()), firsts, size, form), source, resize)
    if not os.access(directory, os.W_OK) and directory.is_dir() and not cache.missing():
        return cache.place.open()  # a complete cache on a read-only disk
    try:
        with files.write_faults(directory), _locked(directory):
            missing = cache.missing()
            if missing:
                _check_room(directory, sum(cache.count(number) for _, number in missing) * size * size * 3, config.cache_limit_gib, form)
                cache.build(config, missing)
            cache.record_verified()
    except OutputError as error:
        raise OutputError(f"decoded frames: {error}, or type --dataset.cache_dir FOLDER") from None
    return cache.place.open()


def cache_folder(source: LeRobotSource, config: DatasetConfig, size: int, form: CacheFormat = "uint8", resize: Resize = ANTIALIAS) -> Path:
    """Folder of the frames of a source's episodes at one size."""
    episodes = hashlib.sha256(np.unique(source.episode).tobytes() + str(config.tolerance_s).encode()).hexdigest()[:8]
    columns = file_name("+".join(sorted(source.embodiment.cameras.values())))
    return cache_directory(config) / f"{source.fingerprint}-{episodes}-{columns}-{size}-{resize}-{form}"


def file_name(column: str) -> str:
    """File name for a column, valid on any file system and different for every column."""
    name = quote(column, safe="+ ")
    if name.strip(".") and len(name) <= LONGEST_NAME:
        return name
    return hashlib.sha256(column.encode()).hexdigest()[:32]


def cache_directory(config: DatasetConfig) -> Path:
    """Folder of all decoded frames: the configured one, else in the user's cache."""
    return config.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pi0fm" / "frames"


def cache_bytes(source: LeRobotSource, size: int, form: CacheFormat = "uint8") -> int:
    """Bytes that the whole cache takes on disk; an estimate for JPEG."""
    raw = len(source.state) * len(source.embodiment.cameras) * size * size * 3
    return raw if form == "uint8" else int(JPEG_SHARE * raw)


def shard_firsts(source: LeRobotSource, size: int) -> tuple[int, ...]:
    """First frame of every shard, each of whole episodes and about SHARD_BYTES."""
    per_shard = max(SHARD_BYTES // (size * size * 3), -(-len(source.state) // MOST_SHARDS), 1)
    firsts = [0]
    for end in np.unique(source.end).tolist():
        if end - firsts[-1] >= per_shard and end < len(source.state):
            firsts.append(end)
    return tuple(firsts)


def make_job(
    source: LeRobotSource, config: DatasetConfig, camera: str, first: int, stop: int, size: int, resize: Resize = ANTIALIAS
) -> Job:
    """Make the job that decodes one camera's pictures of the rows first .. stop - 1."""
    decoder = choose_decoder(config.video_decoder)
    pictures = video_segments(source, camera, first, stop)
    return Job(pictures, size, 1 / source.fps, decoder, config.tolerance_s, resize, source.sizes.get(camera, ()))


def wider_tolerance(source: LeRobotSource, config: DatasetConfig) -> str:
    """End of a message on a picture too far away: the tolerance that covers every row of the data set; empty where none does.

    Reads every video through, without decoding.
    """
    try:
        jobs = [make_job(source, config, camera, 0, len(source.state), 1) for camera in source.clips]
        with ThreadPoolExecutor(cores()) as threads:
            needed = list(threads.map(needed_tolerance, jobs))
    except DatasetError:
        return ""
    known = [each for each in needed if each is not None]
    return f", or type --dataset.tolerance_s {max(known) + 0.001:.3f}" if len(known) == len(needed) else ""


def video_segments(source: LeRobotSource, camera: str, first: int, stop: int) -> tuple[VideoSegment, ...]:
    """Segments of one camera's videos that show the rows first .. stop - 1."""
    found = []
    for clip in source.clips[camera]:
        begin, end = max(clip.first, first), min(clip.first + clip.count, stop)
        if begin < end:
            times = tuple((clip.begin + source.time[begin:end]).tolist())
            found.append(VideoSegment(str(clip.file), times, clip.begin, clip.end, clip.episode, int(source.rows[begin])))
    return tuple(found)


@dataclass(frozen=True)
class _ShardBuilder:
    """Shards of one data set at one size; `missing` and `build` are called under the lock."""

    place: ShardFolder
    source: LeRobotSource
    resize: Resize

    def count(self, number: int) -> int:
        """Number of pictures in a shard."""
        return ((*self.place.firsts, len(self.source.state)))[number + 1] - self.place.firsts[number]

    @property
    def directory(self) -> Path:
        """Folder of the shards."""
        return self.place.directory

    def missing(self) -> list[tuple[str, int]]:
        """(camera, shard) of every shard that is not there as a whole; a torn one is reported on standard error."""
        trusted = self._verified()
        wanted = [(camera, number) for camera in self.source.embodiment.cameras for number in range(len(self.place.firsts))]

        def whole(item: tuple[str, int]) -> bool:
            path = self.place.path(self.source.embodiment.cameras[item[0]], item[1])
            known = trusted.get(self._name(path)) == _stamp(path)
            return is_whole(path, self.count(item[1]), self.place.size, self.place.form, sums=not known)

        with ThreadPoolExecutor(cores()) as threads:
            lacking = [item for item, good in zip(wanted, threads.map(whole, wanted), strict=True) if not good]
        for camera, number in lacking:
            path = self.place.path(self.source.embodiment.cameras[camera], number)
            if path.exists():
                progress.say(f"{path} is torn or was changed; decoding its {self.count(number)} frames again")
        return lacking

    def build(self, config: DatasetConfig, missing: Sequence[tuple[str, int]]) -> None:
        """Decode missing shards; remove the folder of an unreadable data set, which has another fingerprint once it is corrected."""
        work = []
        ends = (*self.place.firsts[1:], len(self.source.state))
        for camera, number in missing:
            if camera not in self.source.stored_pictures:
                job = make_job(self.source, config, camera, self.place.firsts[number], ends[number], self.place.size, self.resize)
                work.append((self.place.path(self.source.embodiment.cameras[camera], number), job))
        try:
            with progress.step("decode frames", sum(self.count(number) for _, number in missing)) as bar:
                for job in write_jobs(work, self.place.form):
                    bar.advance(job.count)
                for camera in self.source.stored_pictures:
                    self._unpack(camera, {number for name, number in missing if name == camera}, bar)
        except DatasetError as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            wider = wider_tolerance(self.source, config) if isinstance(error, TooFarError) else ""
            skip = ", or type --dataset.skip_bad all to leave out every such episode" if config.skip_bad is True else ""
            raise DatasetError(f"{error}{wider}{skip}") from None

    def record_verified(self) -> None:
        """Record size and time of the shards, now that they are known to be whole."""
        shards = (
            self.place.path(column, number)
            for column in self.source.embodiment.cameras.values()
            for number in range(len(self.place.firsts))
        )
        stamps = {self._name(path): _stamp(path) for path in shards}
        if stamps != self._verified():
            files.write_json(self._record, {"boot": _boot(), "shards": stamps})

    @property
    def _record(self) -> Path:
        return self.directory / f"verified-{socket.gethostname()}.json"

    def _verified(self) -> dict[str, list[int]]:
        """Stamp of each shard when its sums were last found right, since this machine started."""
        try:
            record = json.loads(self._record.read_text())
        except (OSError, ValueError):
            return {}
        return dict(record["shards"]) if record.get("boot") == _boot() else {}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix()

    def _unpack(self, camera: str, wanted: set[int], bar: progress.Step) -> None:
        """Write the shards of a camera whose pictures are stored in the parquet files."""
        if not wanted:
            return
        column = self.source.embodiment.cameras[camera]
        pending: list[tuple[int, Any]] = []
        number = 0

        def square(item: tuple[int, Any]) -> NDArray[np.uint8]:
            return resize_with_padding(read_stored(self.source, camera, *item)[None], self.place.size, self.resize)[0]

        with ThreadPoolExecutor(cores()) as threads:
            for item in _in_order(self.source.stored(camera)):
                pending.append(item)
                if len(pending) == self.count(number):
                    if number in wanted:
                        pictures = threads.map(square, pending)
                        write_shard(self.place.path(column, number), pictures, self.place.size, self.place.form)
                        bar.advance(len(pending))
                    pending, number = [], number + 1


def read_stored(source: LeRobotSource, camera: str, place: int, value: Any) -> NDArray[np.uint8]:
    """Decode a value of `source.stored` to uint8 [height, width, 3]. Raises DatasetError."""
    what = f"{source.embodiment.cameras[camera]!r} in row {source.rows[place]} of episode {source.episode[place]} of {source.root}"
    picture = stored_picture(value, [source.root, *dict.fromkeys(path.parent for path in source.files)], what)
    refuse_size(what, picture, source.sizes.get(camera, ()))
    return picture


def _in_order(rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield the rows in the order of places; files of whole episodes are a permutation of a few stretches."""
    held: dict[int, Any] = {}
    following = 0
    for place, value in rows:
        held[place] = value
        while following in held:
            yield following, held.pop(following)
            following += 1


def _stamp(path: Path) -> list[int]:
    """Size in bytes and time in ns of a file's last change; empty for a missing file."""
    if not path.is_file():
        return []
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _boot() -> str:
    """Identity of this machine's start: only a restart can tear an fsynced file without a new time."""
    known = Path("/proc/sys/kernel/random/boot_id")
    return known.read_text().strip() if known.is_file() else str(round(psutil.boot_time()))


def _check_room(directory: Path, needed: int, limit_gib: float, form: CacheFormat) -> None:
    needed = needed if form == "uint8" else int(JPEG_SHARE * needed)
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
    """Hold the lock of a folder, so that one process of a node builds; it is released however the process ends."""
    files.make_folder(directory.parent)
    with (directory.parent / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
