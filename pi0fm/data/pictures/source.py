"""Where a batch's pictures come from, as far as collation knows.

Owns: the interface between the loader and the frame cache or the stream. Does not know: files, videos, the network.
"""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.order.orders import Order


class Pictures(ABC):
    """The pictures of a data set by frame."""

    @property
    @abstractmethod
    def order(self) -> Order:
        """The order of samples in which these pictures are served well."""

    @property
    def look_ahead(self) -> int:
        """How many positions ahead of their use frames want to be expected; 0 where they are all there."""
        return 0

    @abstractmethod
    def gather(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [B, C, size, size, 3] of the frames asked for, in the embodiment's order of cameras."""

    def expect(self, frames: NDArray[np.int64]) -> None:
        """A hint that these frames will be asked for soon; may start work, never waits."""
        del frames
