"""Videos of episodes: which pictures are kept, and their encoding for every browser: H.264 in yuv420p with the index first.

Owns: `VideoFrames`, its bounds of pictures and pixels, the encoding. Does not know: the renderer, which episodes are filmed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

FASTEST = 20.0  # frames per second; a faster video would be hard to judge
LONGEST = 64  # frames kept
SIDE = 128  # pixels of the longer side; 1.5 times as many at most


@dataclass
class VideoFrames:
    """Pictures of one episode, bounded in number and size: beyond LONGEST, every second one is left out.

    every: pictures added for each one kept.
    """

    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    every: int = 1
    _added: int = 0

    def add(self, picture: NDArray[np.uint8], last: bool = False) -> None:
        """Keep a small copy of `picture`, uint8 [height, width, 3], if it is due, or the last one."""
        from PIL import Image

        if last or self._added % self.every == 0:
            factor = max(1, round(max(picture.shape[:2]) / SIDE))
            self.frames.append(np.asarray(Image.fromarray(picture).reduce(factor)) if factor > 1 else picture.copy())
        self._added += 1
        if len(self.frames) > LONGEST and not last:
            self.frames, self.every = self.frames[::2], 2 * self.every


def encode(frames: Sequence[NDArray[np.uint8]], fps: float) -> bytes:
    """Encode `frames`, uint8 [height, width, 3] RGB of one size, at `fps` or FASTEST, whichever is slower.

    An odd height or width loses its last row or column: yuv420p halves both. Raises ValueError without frames.
    """
    import av

    if not frames:
        raise ValueError("a video needs one frame or more, found none")
    height, width = frames[0].shape[0] // 2 * 2, frames[0].shape[1] // 2 * 2
    # Moving the index to the front needs a file that can be reopened; in memory it cannot fail on a full disk.
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
