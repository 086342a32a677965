"""A video file to frames, in order, from any frame on.

Owns: sequential decoding with PyAV, or torchcodec where it loads. Does not know: episodes, data sets.

    key frame       K . . . K . . . K . . . K
    asked for                 [ start .. stop )
    decoded                 K . . . K . .            from the last key frame at or before `start`; what lies before it is dropped

One thread a call: callers read several files at once, and an idle pool of threads in every decoder costs a fifth of the work.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pi0fm_client.errors import ConfigError, DatasetError

Decoder = Literal["auto", "pyav", "torchcodec"]
Frames = Iterator[tuple[int, NDArray[np.uint8]]]


def choose_decoder(wanted: Decoder) -> Literal["pyav", "torchcodec"]:
    """`auto` is torchcodec when it loads (it needs the system's ffmpeg libraries), else PyAV, which brings its own."""
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


def decode(path: Path, fps: float, decoder: Literal["pyav", "torchcodec"], start: int = 0, stop: int | None = None) -> Frames:
    """(frame number = round(time * fps), uint8 [height, width, 3]) for every frame in start .. stop - 1 that can be read, in order.

    Raises DatasetError for a file that is missing, or that cannot be opened or read on.
    """
    if not path.is_file():
        raise DatasetError(f"the data set's video {path} is missing; download or record the data set again")
    read = _pyav if decoder == "pyav" else _torchcodec
    try:
        for number, frame in read(path, fps, start):
            if stop is not None and number >= stop:
                return
            if number >= start:
                yield number, frame
    except (_ffmpeg_error(), RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"the data set's video {path} cannot be decoded ({reason:.160}); download or record the data set again"
        ) from None


def _ffmpeg_error() -> type[Exception]:
    import av.error

    return av.error.FFmpegError


def _pyav(path: Path, fps: float, start: int) -> Frames:
    # here, since a machine that reads no video trains without PyAV
    import av.logging
    from av.video.reformatter import VideoReformatter

    av.logging.set_libav_level(av.logging.PANIC)  # its lines on standard error say once more what the one raised here says
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        converter = VideoReformatter()  # one for all frames: setting up a conversion costs as much as converting a small frame
        if start:
            container.seek(round(start / fps / float(stream.time_base or 1)), stream=stream)
        first = True
        for frame in container.decode(stream):
            number = round((frame.time or 0.0) * fps)
            if first and number > start:  # the container's index and the frames' clock disagree
                yield from _pyav(path, fps, 0)
                return
            first = False
            if number >= start:
                yield number, converter.reformat(frame, format="rgb24").to_ndarray()


def _torchcodec(path: Path, fps: float, start: int) -> Frames:
    decoders = importlib.import_module("torchcodec.decoders")
    video = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    for index in range(start, len(video)):
        frame = video.get_frame_at(index)
        number = round(frame.pts_seconds * fps)
        if index == start and number > start:  # frames are missing in front: their place in the file is not their number
            yield from _torchcodec(path, fps, 0)
            return
        yield number, frame.data.numpy()
