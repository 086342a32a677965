"""Source of a batch's pictures, as collation sees it.

Owns: the interface between the loader and the frame cache or the stream. Does not know: files, videos, the network.
"""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.order.orders import Order


class Pictures(ABC):
    """Pictures of a data set by frame."""

    @property
    @abstractmethod
    def order(self) -> Order:
        """Order of samples in which these pictures are read efficiently."""

    @property
    def look_ahead(self) -> int:
        """Number of positions by which `announce` should precede the use of frames; 0 where all are ready."""
        return 0

    @abstractmethod
    def gather(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read uint8 [B, C, size, size, 3] of the given frames, in the embodiment's order of cameras."""

    def announce(self, frames: NDArray[np.int64]) -> None:
        """Announce that these frames will be read soon; may start work, never waits."""
        del frames
