"""Encoding of episodes' pictures as video in the simulating process, which relieves the writing process.

Owns: the codec, the encoding of one episode, the joining of several without encoding again. Does not know: data sets, Ray.

    episode A   I P B P I P B ..  n frames     time 0 .. (n - 1) / fps
    episode B   I P B P I ..      m frames     time 0 .. (m - 1) / fps
    joined      I P B P I P B .. I P B P I ..  B's clocks (shown and decoded) move by n / fps; no packet changes
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.video
import numpy as np
from numpy.typing import NDArray

from pi0fm.demos.demonstration import Demonstration
from pi0fm.demos.statistics import Statistics, of_pictures
from pi0fm_client.errors import OutputError

# A key frame every 4 frames: random access decodes at most 4 frames. x264's mbtree reads uninitialised memory: with it, the same small
# pictures sometimes give other bytes, and it gains nothing with key frames so close.
CODEC: Mapping[str, Any] = {
    "vcodec": "h264",
    "pix_fmt": "yuv420p",
    "g": 4,
    "crf": 18,
    "preset": "veryfast",
    "extra_options": {"x264-params": "mbtree=0"},
}


@dataclass(frozen=True)
class Video:
    """One camera's pictures of one episode: an mp4 file's bytes, and the statistics of the pictures."""

    content: bytes
    statistics: Statistics


type EncodedDemonstration = Demonstration[Video]


def encode(episode: Demonstration[NDArray[np.uint8]], fps: int) -> EncodedDemonstration:
    """Encode every camera on one thread: the bytes are a function of the pictures and `fps`, in any process."""
    videos = {name: Video(encode_pictures(pictures, fps), of_pictures(pictures)) for name, pictures in episode.images.items()}
    return Demonstration(**{**vars(episode), "images": videos})


def encode_pictures(pictures: NDArray[np.uint8], fps: int) -> bytes:
    """Encode an mp4 file with picture k at time k / fps. pictures: uint8 [T, height, width, 3], height and width even."""
    av.logging.set_libav_level(av.logging.ERROR)  # every encoder logs 20 lines, which would hide the progress line
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        settings = {name: str(CODEC[name]) for name in ("g", "crf", "preset")} | CODEC["extra_options"] | {"threads": "1"}
        stream = container.add_stream(CODEC["vcodec"], fps, options=settings)
        assert isinstance(stream, av.video.VideoStream)
        stream.pix_fmt = CODEC["pix_fmt"]
        stream.height, stream.width = pictures.shape[1:3]
        stream.time_base = Fraction(1, fps)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def join_videos(path: Path, videos: Sequence[bytes], fps: int) -> None:
    """Write one mp4 file with the pictures of all videos, in order. Packets are copied, not encoded again.

    Raises OutputError when the videos were encoded with different settings or by different releases of the encoder.
    """
    with ExitStack() as opened:
        sources = [opened.enter_context(av.open(io.BytesIO(content))).streams.video[0] for content in videos]
        if len({source.codec_context.extradata for source in sources}) > 1:
            raise OutputError("episodes were encoded in different ways; install the same release of PyAV on every node of the Ray cluster")
        groups = [[packet for packet in source.container.demux(source) if packet.size > 0] for source in sources]
        tick = int(1 / (fps * Fraction(sources[0].time_base or 0)))
        # The decoder's clock lags by 2 frames, but by none in an episode of 1 or 2: the joined video takes the longest lag.
        lag = max(-(group[0].dts or 0) for group in groups)
        joined = opened.enter_context(av.open(str(path), "w", options={"movflags": "faststart"}))
        stream = joined.add_stream_from_template(sources[0], opaque=True)
        stream.time_base = sources[0].time_base
        before = 0
        for group in groups:
            for number, packet in enumerate(group, start=before):
                packet.pts, packet.dts = (packet.pts or 0) + before * tick, number * tick - lag
                packet.stream = stream
                joined.mux(packet)
            before += len(group)
