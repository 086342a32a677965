"""The choice of one chunk among several for one observation, and the spread of each.

Owns: the criteria and the choice. Does not know: the network, robots; policy/local.py samples.

    observation -> prefix, once -> N chunks from N noises -> criterion -> one

    medoid       the chunk with the least mean distance to the others: one of the largest crowd, never a mean between two
    likelihood   the chunk that the policy finds most likely (policy/sampling/scores.py); costs a divergence
    spread       the chunk whose velocity changed least on its way: the flow of one certain answer is straight

The spread is the standard deviation of the velocity over the evaluations of the solver, root mean square over the robot's own entries, in
normalised units. The evaluations are made anyway, so it costs nothing, and each chunk carries it under every criterion. It measures
how far the policy is from one certain answer; that it predicts success is not shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi0fm.options import nearest
from pi0fm.policy.sampling.scores import ScoreOptions
from pi0fm_client.errors import ConfigError

MEDOID, LIKELIHOOD, SPREAD = "medoid", "likelihood", "spread"
CRITERIA = (MEDOID, LIKELIHOOD, SPREAD)


@dataclass(frozen=True)
class BestOf:
    """The number of chunks for an observation, and the criterion of the choice. likelihood: its options, under that criterion."""

    num_chunks: int = 8
    criterion: str = MEDOID
    likelihood: ScoreOptions = ScoreOptions()

    def __post_init__(self) -> None:
        if self.num_chunks < 1:
            raise ConfigError(f"num_chunks must be 1 or more, found {self.num_chunks}; 8 is usual")
        if self.criterion not in CRITERIA:
            raise ConfigError(f"criterion must be {', '.join(CRITERIA)}, found {self.criterion!r}: {nearest(self.criterion, CRITERIA)}")


def choose(measures: Mapping[str, NDArray[np.float64]], options: BestOf) -> NDArray[np.int64]:
    """The row of the chosen chunk of each observation, whose chunks are `num_chunks` rows; measures: by name, one number a row."""
    worse = {MEDOID: "medoid_distance", SPREAD: "spread"}.get(options.criterion)
    groups = (-measures["log_prob"] if worse is None else measures[worse]).reshape(-1, options.num_chunks)
    chosen: NDArray[np.int64] = np.arange(len(groups)) * options.num_chunks + groups.argmin(axis=1)
    return chosen


def medoid_distances(chunks: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean over the others of the root mean square difference of each of N chunks [N, entries] to them; 0 of one alone."""
    wide = chunks.astype(np.float64)
    distances: NDArray[np.float64] = np.sqrt(np.square(wide[:, None] - wide[None]).mean(axis=2)).sum(axis=1)
    return distances / max(1, len(chunks) - 1)
