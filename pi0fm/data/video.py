"""A video file to frames, in order.

Owns: sequential decoding with PyAV, or torchcodec where it loads. Does not know: episodes, data sets.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import av.error
import av.logging
import numpy as np
from numpy.typing import NDArray

from pi0fm.errors import ConfigError, DatasetError

Decoder = Literal["auto", "pyav", "torchcodec"]


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


def decode(path: Path, fps: float, decoder: Literal["pyav", "torchcodec"]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(frame number = round(time * fps), uint8 [height, width, 3]) for every frame that can be read, in order.

    Raises DatasetError for a file that is missing, or that cannot be opened or read on.
    """
    if not path.is_file():
        raise DatasetError(f"the data set's video {path} is missing; download or record the data set again")
    try:
        yield from _pyav(path, fps) if decoder == "pyav" else _torchcodec(path, fps)
    except (av.error.FFmpegError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"the data set's video {path} cannot be decoded ({reason:.160}); download or record the data set again"
        ) from None


def _pyav(path: Path, fps: float) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    av.logging.set_libav_level(av.logging.PANIC)  # its lines on standard error say once more what the one raised here says
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield round((frame.time or 0.0) * fps), frame.to_ndarray(format="rgb24")


def _torchcodec(path: Path, fps: float) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    decoders = importlib.import_module("torchcodec.decoders")
    video = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0)
    for index in range(len(video)):
        frame = video.get_frame_at(index)
        yield round(frame.pts_seconds * fps), frame.data.numpy()
