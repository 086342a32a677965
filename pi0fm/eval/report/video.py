"""Encoding of pictures to an mp4 that every browser plays: H.264 in yuv420p with the index in front."""

import os
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

FASTEST = 20.0  # frames a second; a faster video would be hard to judge


def encode(frames: Sequence[NDArray[np.uint8]], fps: float) -> bytes:
    """Encode `frames`, uint8 [height, width, 3] RGB of one size, at `fps` or FASTEST, whichever is slower.

    An odd height or width loses its last row or column: yuv420p halves both. Raises ValueError without frames.
    """
    if not frames:
        raise ValueError("a video needs one frame or more, found none")
    height, width = frames[0].shape[0] // 2 * 2, frames[0].shape[1] // 2 * 2
    # Moving the index to the front needs a file that can be opened a second time; in memory, it cannot fail on a full disk.
    with os.fdopen(os.memfd_create("pi0fm-video"), "rb") as file:
        with av.open(f"/proc/self/fd/{file.fileno()}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(min(fps, FASTEST)).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "23", "preset": "veryfast", "threads": "1"}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        return file.read()
