"""Streaming of pictures from videos within a bound of memory, for a data set too large to be kept decoded.

Owns: which frames are a group, the buffer, decoding ahead, the choice between stream and cache. Does not know: batches, devices.

    order (stream_order)   window k                      window k + 1
    buffer                 [g7][g2][g9]                  [g3][g5][ ]        groups, decoded whole, at most `capacity` frames
    asked for (gather)       ^    ^  any of window k
    expected                                               ^ one window ahead: decoded in threads meanwhile
    dropped first            the group used longest ago

The order is a function of the position, so a resumed run needs no saved buffer: it is filled again from the videos.
"""

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from pi0fm import progress
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.config import DatasetConfig
from pi0fm.data.order.orders import Order
from pi0fm.data.order.streamed import StreamOrder, lanes_of
from pi0fm.data.pictures.decoding import decode_job
from pi0fm.data.pictures.frame_cache import cache_bytes, make_job, open_cache
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize
from pi0fm.data.pictures.shards import CacheFormat
from pi0fm.data.pictures.source import Pictures
from pi0fm.machine import cores
from pi0fm_client.errors import ConfigError, DatasetError

BUFFER_GIB = 4.0
GROUPS_A_LANE = 8  # in memory; fewer, longer groups seek less and are shuffled less
SHORTEST_GROUP, LONGEST_GROUP = 16, 256


class FrameStream(Pictures):
    """Pictures of a data set by frame, decoded on request or ahead of it, and dropped when memory is needed."""

    def __init__(
        self,
        source: LeRobotSource,
        config: DatasetConfig,
        size: int,
        global_batch_size: int,
        buffer_gib: float,
        resize: Resize = ANTIALIAS,
    ) -> None:
        """Plan groups and windows. Raises DatasetError for pictures outside videos, ConfigError for a buffer too small to shuffle in."""
        if source.stored_pictures:
            raise DatasetError(
                f"{source.root} keeps pictures of {', '.join(source.stored_pictures)} in parquet files, which are not streamed; "
                "raise --dataset.cache_limit_gib, or record the data set as videos"
            )
        self._source, self._config, self._size, self._resize = source, config, size, resize
        self.capacity = int(buffer_gib * 2**30) // (len(source.embodiment.cameras) * size * size * 3)
        lanes = lanes_of(global_batch_size)
        longest = int(np.clip(self.capacity // (GROUPS_A_LANE * lanes), SHORTEST_GROUP, LONGEST_GROUP))
        window = (self.capacity // lanes - 3 * longest) // 2  # the current and the next one, and the groups that reach out of them
        if window < longest:
            need = 5 * longest * lanes * len(source.embodiment.cameras) * size * size * 3 / 2**30
            raise ConfigError(f"a stream of this data set needs a buffer of {need:.2f} GiB or more, found {buffer_gib}; raise it")
        self._ends = group_ends(source, longest)
        ends = np.searchsorted(source.frames, self._ends)
        self._order = StreamOrder(ends[np.diff(ends, prepend=0) > 0], global_batch_size, lanes, window)
        self._threads = ThreadPoolExecutor(min(cores(), 8), thread_name_prefix="pi0fm-stream")
        self._held: dict[int, Future[NDArray[np.uint8]]] = {}
        self._used: dict[int, int] = {}  # group -> its last use, counted in gathered samples
        self._clock, self._frames_held, self._frames_decoded, self._lock = 0, 0, 0, threading.Lock()

    @property
    def order(self) -> Order:
        """Order for which a window of memory is enough."""
        return self._order

    @property
    def look_ahead(self) -> int:
        """One window of every lane, in whole batches, so that a position stays in its lane."""
        batch = self._order.global_batch_size
        return -(-self._order.window * self._order.lanes // batch) * batch

    @property
    def frames_held(self) -> int:
        """Frames in memory or being decoded; at most `capacity`."""
        return self._frames_held

    @property
    def frames_decoded(self) -> int:
        """Frames of one camera decoded so far, counting repeated decoding."""
        return self._frames_decoded

    def gather(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read uint8 [B, C, size, size, 3] of the given frames, waiting for those not yet decoded. Raises DatasetError."""
        out = np.empty((len(frames), len(self._source.embodiment.cameras), self._size, self._size, 3), np.uint8)
        groups = np.searchsorted(self._ends, frames, side="right")
        with self._lock:
            self._clock += len(frames)
        self._submit(groups, self._clock)
        group, first = -1, 0
        pictures: NDArray[np.uint8] = out
        for row in np.argsort(groups, kind="stable").tolist():
            if int(groups[row]) != group:
                group = int(groups[row])
                first, pictures = self._first(group), self._pictures(group)
            out[row] = pictures[int(frames[row]) - first]
        return out

    def announce(self, frames: NDArray[np.int64]) -> None:
        """Start decoding the groups of these frames."""
        self._submit(np.searchsorted(self._ends, frames, side="right"), self._clock + self.look_ahead)

    def settle(self) -> None:
        """Wait until all decoding in progress is done."""
        with self._lock:
            begun = list(self._held.values())
        wait(begun)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit(self, groups: NDArray[np.int64], when: int) -> None:
        """Start decoding these groups, as far as dropping groups of earlier use makes room."""
        with self._lock:
            wanted = np.unique(groups).tolist()
            for group in wanted:
                if group in self._held:
                    self._used[group] = max(self._used[group], when)
            for group in wanted:
                if group not in self._held and self._make_room(group, when):
                    self._start(group, when)

    def _pictures(self, group: int) -> NDArray[np.uint8]:
        while True:
            with self._lock:
                if group not in self._held:
                    self._make_room(group, 2**62)
                    self._start(group, self._clock)
                waiting = self._held[group]
            try:
                return waiting.result()
            except CancelledError:  # another thread's batch took its room before decoding began
                continue

    def _start(self, group: int, when: int) -> None:
        self._held[group] = self._threads.submit(self._decode, group)
        self._used[group] = when
        self._frames_held += self._count(group)

    def _make_room(self, group: int, when: int) -> bool:
        """Drop groups whose last use is before `when`, oldest first; False where that is not enough."""
        while self._frames_held + self._count(group) > self.capacity:
            oldest = min(self._used, key=self._used.__getitem__, default=None)
            if oldest is None or self._used[oldest] >= when:
                return False
            self._held.pop(oldest).cancel()
            del self._used[oldest]
            self._frames_held -= self._count(oldest)
        return True

    def _first(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0

    def _count(self, group: int) -> int:
        return int(self._ends[group]) - self._first(group)

    def _decode(self, group: int) -> NDArray[np.uint8]:
        first, count = self._first(group), self._count(group)
        with self._lock:
            self._frames_decoded += count
        cameras = []
        for camera in self._source.embodiment.cameras:
            cameras.append(decode_job(make_job(self._source, self._config, camera, first, first + count, self._size, self._resize)))
        return cameras[0][:, None] if len(cameras) == 1 else np.stack(cameras, axis=1)


def open_pictures(
    source: LeRobotSource,
    config: DatasetConfig,
    size: int,
    global_batch_size: int,
    form: CacheFormat = "uint8",
    buffer_gib: float = BUFFER_GIB,
    resize: Resize = ANTIALIAS,
) -> Pictures:
    """Open the frame cache where it fits into `config.cache_limit_gib`, else the stream, and report the stream.

    The two have different orders of samples, so the choice depends on the configuration and the data set alone, not on free space.
    """
    needed = cache_bytes(source, size, form) / 2**30
    if needed <= config.cache_limit_gib:
        return open_cache(source, config, size, form, resize)
    progress.say(
        f"decoded frames would take {needed:.1f} GiB, more than dataset.cache_limit_gib {config.cache_limit_gib:g}: "
        f"streaming from the videos with a buffer of {buffer_gib:g} GiB"
    )
    return FrameStream(source, config, size, global_batch_size, buffer_gib, resize)


def group_ends(source: LeRobotSource, longest: int) -> NDArray[np.int64]:
    """Frame after each group: short episodes together and long ones in equal parts, about `longest` frames each."""
    ends: list[int] = []
    begin = 0
    episodes = np.unique(source.end).tolist()
    for number, end in enumerate(episodes):
        following = episodes[number + 1] if number + 1 < len(episodes) else None
        if following is not None and following - begin <= longest:
            continue
        parts = -(-(end - begin) // longest)
        ends += [begin + (end - begin) * (part + 1) // parts for part in range(parts)]
        begin = end
    return np.array(ends, dtype=np.int64)
