"""The few shapes that a compiled policy meets, so that all of them are made before a robot asks.

Owns: how a batch of observations is padded to one of them, and the list of all. Does not know: compilation, graphs.

    rows             the next power of two, where a shape is recorded or compiled for itself (CUDA); else as they are
    cameras          all that the robot has: one that fails in mid-flight must not wait for a compiler
    prompt tokens    the next of at most four lengths: 48 -> 16, 24, 40, 48        200 -> 56, 104, 152, 200
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from pi0fm.models.config import Pi0Config
from pi0fm.models.observation import PROMPT_MULTIPLE, ModelObservation

LENGTHS = 4


@final
@dataclass(frozen=True)
class Buckets:
    """The shapes of one robot's policy. static: rows are padded too."""

    config: Pi0Config
    cameras: int
    static: bool

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Ascending; the last is the network's own."""
        most = self.config.max_prompt_tokens
        parts = (-(-most * part // LENGTHS) for part in range(1, LENGTHS + 1))
        return tuple(sorted({min(most, -(-length // PROMPT_MULTIPLE) * PROMPT_MULTIPLE) for length in parts}))

    def rows(self, batch: int) -> int:
        """How many rows stand for so many observations."""
        return 1 << (batch - 1).bit_length() if self.static else batch

    def padded(self, observation: ModelObservation) -> ModelObservation:
        """The observation in the smallest shape that holds it. No answer changes: the padding is masked, or another row."""
        given = observation.prompt_tokens.shape[1]
        length = next(length for length in self.prompt_lengths if length >= given)
        return observation.padded(self.rows(len(observation)), self.cameras, length)

    def examples(self, max_batch: int) -> Iterator[ModelObservation]:
        """A batch of every shape that up to `max_batch` observations can take; of a static one with a mask and without."""
        batches = {1, max_batch} if not self.static else {self.rows(batch) for batch in range(1, max_batch + 1)}
        size = self.config.vision.image_size
        for batch in sorted(batches):
            for length in self.prompt_lengths:
                for real in (length - 1, length) if self.static else (length,):
                    yield ModelObservation(
                        torch.zeros(batch, self.cameras, size, size, 3, dtype=torch.uint8),
                        torch.ones(batch, self.cameras, dtype=torch.bool),
                        torch.zeros(batch, length, dtype=torch.long),
                        (torch.arange(length) < real).expand(batch, -1),
                        torch.zeros(batch, self.config.state_dim),
                    )
