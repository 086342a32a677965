"""Frames of a video file with their times, in order, from any time on.

Owns: sequential decoding with PyAV, or torchcodec where it loads. Does not know: episodes, data sets.

    key frame       K . . . K . . . K . . . K
    asked for                 | start ....
    decoded                 K . . . K . .            from the last key frame at or before `start`

A frame's time is the file's, in seconds, with any rate, start and gaps. Frames are converted to pictures on request only,
so that a skipped frame costs the decoder's work alone.
One thread per call: callers read several files at once, and an idle pool of threads in every decoder costs a fifth of the work.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.config import Decoder
from pi0fm_client.errors import ConfigError, DatasetError

CLOSE = 1e-4  # seconds: times of the data set and of the file that differ by less are equal
BACK = 64  # frames per step back
Picture = Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True)
class OpenVideo:
    """Open video. period: mean seconds between frames; frames: (time, uint8 [height, width, 3] on demand)."""

    period: float
    frames: Iterator[tuple[float, Picture]]


def choose_decoder(wanted: Decoder) -> Literal["pyav", "torchcodec"]:
    """Choose torchcodec for `auto` when it loads (it needs the system's ffmpeg libraries), else PyAV, which includes its own."""
    if wanted == "pyav":
        return "pyav"
    if importlib.util.find_spec("torchcodec") is not None:
        try:
            importlib.import_module("torchcodec.decoders")
        except (ImportError, OSError, RuntimeError) as error:
            if wanted == "torchcodec":
                raise ConfigError(
                    f"torchcodec does not load here ({str(error).splitlines()[0]:.120}); install ffmpeg, or set pyav"
                ) from None
        else:
            return "torchcodec"
    if wanted == "torchcodec":
        raise ConfigError("torchcodec is not installed; install it, or set dataset.video_decoder to pyav")
    return "pyav"


@contextmanager
def open_video(path: Path, decoder: Literal["pyav", "torchcodec"], start: float = 0.0) -> Iterator[OpenVideo]:
    """Open the frames of a file in order, from one at or before `start` seconds on.

    Raises DatasetError, inside the block too, for a file that is missing, that cannot be opened or read on, or that holds a depth map.
    """
    read = _pyav if decoder == "pyav" else _torchcodec
    with video_faults(path), read(path, start) as video:
        yield video


def frame_times(path: Path) -> tuple[NDArray[np.float64], float]:
    """(times of all frames, ascending; mean seconds between them), without decoding. Raises DatasetError."""
    import av

    with video_faults(path), av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        packets = (packet for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard)
        times = np.sort([float(packet.pts * packet.time_base) for packet in packets])
        return times, 1 / float(rate) if rate else 0.0


@contextmanager
def video_faults(path: Path) -> Iterator[None]:
    """Convert decoders' errors for a missing, cut or damaged file to a DatasetError of one line."""
    if not path.is_file():
        raise DatasetError(f"the data set's video {path} is missing; download or record the data set again")
    try:
        yield
    except (_ffmpeg_error(), RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"the data set's video {path} cannot be decoded ({reason:.160}); download or record the data set again"
        ) from None


def _ffmpeg_error() -> type[Exception]:
    import av.error

    return av.error.FFmpegError


def decode(path: Path, decoder: Literal["pyav", "torchcodec"], start: float = 0.0) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Yield (time, picture) of every frame of `open_video`. Raises DatasetError."""
    with open_video(path, decoder, start) as video:
        for time, picture in video.frames:
            yield time, picture()


@contextmanager
def _pyav(path: Path, start: float) -> Iterator[OpenVideo]:
    # imported here, since training without videos needs no PyAV
    import av.logging

    av.logging.set_libav_level(av.logging.PANIC)  # its lines on standard error would repeat the error raised here
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        pixels = str(stream.codec_context.pix_fmt)
        if pixels.startswith("gray") and pixels not in ("gray", "gray8"):
            raise DatasetError(f"the data set's video {path} is a depth map ({pixels}), not colour of 8 bits; leave this camera out")
        rate = stream.average_rate or stream.guessed_rate
        yield OpenVideo(1 / float(rate) if rate else 0.0, _pyav_frames(container, stream, start))


def _pyav_frames(container: Any, stream: Any, start: float) -> Iterator[tuple[float, Picture]]:
    from av.video.reformatter import VideoReformatter

    converter = VideoReformatter()  # one for all frames: setting up a conversion costs as much as converting a small frame
    if start > 0:
        container.seek(int((start + CLOSE) / float(stream.time_base or 1)), stream=stream)
    first = start > 0
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        if first and frame.time > start + CLOSE:  # the container's index and the frames' clock disagree
            container.seek(0, stream=stream)
            yield from _pyav_frames(container, stream, 0.0)
            return
        first = False
        yield frame.time, partial(_rgb, converter, frame)


def _rgb(converter: Any, frame: Any) -> NDArray[np.uint8]:
    return converter.reformat(frame, format="rgb24").to_ndarray()


@contextmanager
def _torchcodec(path: Path, start: float) -> Iterator[OpenVideo]:
    decoders = importlib.import_module("torchcodec.decoders")
    video = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    rate = float(video.metadata.average_fps or 0)
    yield OpenVideo(1 / rate if rate else 0.0, _torchcodec_frames(video, int(start * rate), start))


def _torchcodec_frames(video: Any, index: int, start: float) -> Iterator[tuple[float, Picture]]:
    index = max(0, min(index, len(video) - 1))
    while index > 0 and video.get_frame_at(index).pts_seconds > start + CLOSE:  # at a variable frame rate
        index = max(0, index - BACK)
    for number in range(index, len(video)):
        frame = video.get_frame_at(number)
        yield frame.pts_seconds, frame.data.numpy
