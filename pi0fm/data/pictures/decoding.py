"""Decoding of segments of video to arrays, in this process or in helper processes.

Owns: `Job`, which picture belongs to which row, decoding a job into an array or a shard, the helper program and the threads that feed it.
Does not know: data sets, locks, what is already on disk.

    caller   thread 1 -- (path, job, form) -->  helper 1   decode, resize, write the shard   -- None, or the error -->
             thread 2 ------------------------>  helper 2   a program that calls `run_helper`

A helper is a separate program rather than a fork: video decoders do not survive a fork, and a caller that is itself a daemon (a worker
of Ray, of a DataLoader) may start one. It imports numpy and PyAV; torch only where pictures must be resized. It ends when its input ends.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.pictures.resizing import ANTIALIAS, Resize, Sizes, refuse_size
from pi0fm.data.pictures.shards import CacheFormat, write_shard
from pi0fm.data.pictures.video import CLOSE, Picture, frame_times, open_video
from pi0fm.machine import cores
from pi0fm_client.errors import DatasetError, Pi0fmError

BATCH = 64
ONE_THREAD: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FRAMES_WORTH_HELPERS = 100_000  # a helper's start and imports cost as much as decoding 4 000; below this, a few threads are as fast


@dataclass(frozen=True)
class VideoSegment:
    """Rows of one episode in a video: `times` in seconds, ascending, within the span of `file` from `begin` to `end`.

    first: the data set's index of the first row, for messages.
    """

    file: str
    times: tuple[float, ...]
    begin: float
    end: float
    episode: int
    first: int


@dataclass(frozen=True)
class Job:
    """Pictures of one camera to decode together, in the order of the segments. period: seconds between rows.

    tolerance: seconds allowed between a row and its picture; None for the longer of the rows' and the video's period.
    sizes: every (height, width) that the data set declares for the pictures.
    """

    segments: tuple[VideoSegment, ...]
    size: int
    period: float
    decoder: Literal["pyav", "torchcodec"]
    tolerance: float | None = None
    resize: Resize = ANTIALIAS
    sizes: Sizes = ()

    @property
    def count(self) -> int:
        """Number of pictures."""
        return sum(len(segment.times) for segment in self.segments)


class TooFarError(DatasetError):
    """Error of a row whose nearest picture is further away than the tolerance."""


def decode_job(job: Job) -> NDArray[np.uint8]:
    """Decode to uint8 [count, size, size, 3]. Raises DatasetError for an unreadable video, or one without a picture for a row."""
    pictures = np.empty((job.count, job.size, job.size, 3), np.uint8)
    for number, picture in enumerate(decoded(job)):
        pictures[number] = picture
    return pictures


def decoded(job: Job) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures of `decode_job`, in order."""
    yield from resized(decoded_at_full_size(job), job.size, job.resize)


def decoded_at_full_size(job: Job) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures of `decoded` at the video's size."""
    for run in _runs(job):
        yield from _nearest(run, job)


def needed_tolerance(job: Job) -> float | None:
    """Largest time in seconds between a row and its span's nearest picture, from timestamps alone; None for a span without any."""
    most = 0.0
    for run in _runs(job):
        times, period = frame_times(Path(run[0].file))
        slack = min(job.period, period or job.period) / 4
        for segment in run:
            inside = times[(times >= segment.begin - slack) & (times < segment.end - slack)]
            if not len(inside):
                return None
            wanted = np.array(segment.times)
            after = np.searchsorted(inside, wanted)
            neighbours = inside[np.minimum(after, len(inside) - 1)], inside[np.maximum(after - 1, 0)]
            most = max(most, float(np.minimum(*(np.abs(each - wanted) for each in neighbours)).max()))
    return most


def write_jobs(work: Sequence[tuple[Path, Job]], form: CacheFormat) -> Iterator[Job]:
    """Decode every job into the shard at its path; yield each when it is done.

    Raises DatasetError for a fault of the data set and Pi0fmError for a helper that died, once all helpers have ended.
    """
    helpers = min(cores(), len(work))
    if helpers < 2 or sum(job.count for _, job in work) < FRAMES_WORTH_HELPERS:
        with ThreadPoolExecutor(max(helpers, 1)) as pool:  # decoders let other threads run
            yield from pool.map(lambda item: _write(item[0], item[1], form), work)
        return
    waiting: queue.SimpleQueue[tuple[Path, Job]] = queue.SimpleQueue()
    for item in work:
        waiting.put(item)
    done: queue.SimpleQueue[Job | Exception] = queue.SimpleQueue()
    stop = threading.Event()
    threads = [threading.Thread(target=_feed, args=(waiting, done, stop, form)) for _ in range(helpers)]
    for thread in threads:
        thread.start()
    try:
        for _ in work:
            outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _write(path: Path, job: Job, form: CacheFormat) -> Job:
    write_shard(path, decoded(job), job.size, form)
    return job


def _runs(job: Job) -> list[list[VideoSegment]]:
    """Group segments that follow each other in one file, so that one pass reads them."""
    runs: list[list[VideoSegment]] = []
    for segment in job.segments:
        last = runs[-1][-1] if runs else None
        if last is not None and last.file == segment.file and 0 < segment.times[0] - last.times[-1] < BATCH * job.period:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _nearest(run: Sequence[VideoSegment], job: Job) -> Iterator[NDArray[np.uint8]]:
    r"""Yield the picture nearest to each time of the segments; of two equally near, the earlier.

        file       f0    f1    f2    f3  |  f4    f5            | the segment's end: f4 is the next episode's
        rows        r0   r1  r2      r3  |
        shown       f0   f1  f1      f3  |                      never f4, however near

    Raises DatasetError where the nearest picture is too far away.
    """
    path = Path(run[0].file)
    waiting = iter(run)
    segment, row = next(waiting), 0
    held: tuple[float, Picture] | None = None
    picture: NDArray[np.uint8] | None = None  # of `held`, once converted
    with open_video(path, job.decoder, run[0].times[0]) as video:
        slack = min(job.period, video.period or job.period) / 4
        tolerance = job.tolerance if job.tolerance is not None else max(job.period, video.period)
        latest = -np.inf
        for time, frame in chain(video.frames, ((np.inf, _no_picture),)):
            if time <= latest:  # a frame whose time goes backwards is skipped
                continue
            latest = time
            while True:
                inside = segment.begin - slack <= time < segment.end - slack
                while row < len(segment.times) and held is not None:
                    wanted = segment.times[row]
                    if inside and time - wanted < wanted - held[0] - CLOSE:
                        break
                    if abs(held[0] - wanted) > tolerance + CLOSE:
                        raise _too_far(segment, row, held[0], tolerance)
                    if picture is None:
                        picture = held[1]()
                        refuse_size(f"video {path}", picture, job.sizes)
                    yield picture
                    row += 1
                if row < len(segment.times) and held is None and time >= segment.end - slack:
                    raise _too_far(segment, row, None, tolerance)
                if row < len(segment.times):
                    break
                following = next(waiting, None)
                if following is None:
                    return
                segment, row, held, picture = following, 0, None, None
            if inside:
                held, picture = (time, frame), None


def _no_picture() -> NDArray[np.uint8]:
    raise AssertionError("the end of a file has no picture")


def _too_far(segment: VideoSegment, row: int, nearest: float | None, tolerance: float) -> DatasetError:
    span = f"{segment.begin:g}..{segment.end:g} s"
    found = f"no picture in its span {span}" if nearest is None else f"the nearest one at {nearest:.3f} s"
    return TooFarError(
        f"video {segment.file} must show row {segment.first + row} of episode {segment.episode}, at {segment.times[row]:.3f} s, within "
        f"{tolerance:.3f} s, found {found}; download or record the episode again"
    )


def resized(pictures: Iterable[NDArray[np.uint8]], size: int, resize: Resize) -> Iterator[NDArray[np.uint8]]:
    """Resize pictures of any sizes to squares, in order; those of one size together."""
    pending: list[NDArray[np.uint8]] = []

    def flushed() -> Iterator[NDArray[np.uint8]]:
        if pending:
            from pi0fm.data.pictures.images import resize_with_padding  # torch, which most helpers do not need

            yield from resize_with_padding(np.stack(pending), size, resize)
            pending.clear()

    for picture in pictures:
        if pending and (pending[0].shape != picture.shape or len(pending) == BATCH):
            yield from flushed()
        if max(picture.shape[:2]) != size:
            pending.append(picture)
        else:
            yield picture if picture.shape[:2] == (size, size) else _padded(picture, size)
    yield from flushed()


def _padded(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Add black bands to a picture whose longer side needs no resizing."""
    height, width = frame.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + height, left : left + width] = frame
    return square


def _feed(
    waiting: "queue.SimpleQueue[tuple[Path, Job]]",
    done: "queue.SimpleQueue[Job | Exception]",
    stop: threading.Event,
    form: CacheFormat,
) -> None:
    """Start a helper, send it jobs until there are none, and wait for its end."""
    package = str(Path(__file__).resolve().parents[3])
    found = os.environ.get("PYTHONPATH")
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": package + (os.pathsep + found if found else "")}
    command = [
        sys.executable,
        "-P",
        "-c",
        "from pi0fm.data.pictures.decoding import run_helper; run_helper()",
    ]  # -P: the user's folder may hold a queue.py
    helper: subprocess.Popen | None = None
    while not stop.is_set():
        try:
            path, job = waiting.get_nowait()
        except queue.Empty:
            break
        try:
            helper = helper or subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            done.put(_send_task(helper, (path, job, form)) or job)
        except Exception as error:  # noqa: BLE001  (it is raised again in the thread that waits)
            done.put(error)
    if helper is not None:
        _end_helper(helper)


def _send_task(helper: subprocess.Popen, task: tuple[Path, Job, CacheFormat]) -> Exception | None:
    """Send a task and return the helper's error, None for success; an error too for a helper that died."""
    assert helper.stdin is not None and helper.stdout is not None
    try:
        pickle.dump(task, helper.stdin)
        helper.stdin.flush()
        return _received(helper.stdout)
    except (EOFError, BrokenPipeError):
        ended = f"a decoding process ended with code {helper.wait()}"
        return Pi0fmError(f"frames could not be decoded ({ended}); what is decoded is kept: type the command again")


def _received(pipe: IO[bytes]) -> Exception | None:
    found = pickle.load(pipe)  # noqa: S301  (written by our helper)
    return found if isinstance(found, Exception) else None


def _end_helper(helper: subprocess.Popen) -> None:
    """Close the helper's input, on which it ends, and wait."""
    assert helper.stdin is not None and helper.stdout is not None
    with suppress(BrokenPipeError):
        helper.stdin.close()
    helper.stdout.close()
    helper.wait()


def run_helper() -> None:
    """Run a helper: answer every job until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller ends the input
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # keeps prints of libraries out of the answers
    with suppress(EOFError):
        while True:
            path, job, form = pickle.load(sys.stdin.buffer)  # noqa: S301
            fault: Exception | None = None
            try:
                _write(path, job, form)
            except (DatasetError, OSError) as error:
                fault = error
            pickle.dump(fault, answers)
            answers.flush()
