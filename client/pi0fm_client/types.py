"""The robot-side types that every layer shares: numpy arrays in robot units, no torch.

Owns: `Observation`, `ActionChunk`, `ActionPrefix`, `RobotReport`, `Policy`. Does not know: tensors, normalisation, the network.
Shape letters: H action horizon, A robot action dim, S state dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Observation:
    """Images, state and instruction at one control step.

    images: by the embodiment's camera name, uint8 [height, width, 3], RGB. A camera that is absent is missing, not black.
    state: float32 [S], robot units.
    prompt: the instruction, as the user wrote it.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    prompt: str


@dataclass(frozen=True)
class ActionChunk:
    """The actions that a policy chose for one observation.

    actions: float32 [H, A], robot units; row k is meant for k control steps after the observation.
    timings: milliseconds by stage, at least `infer_ms`; over the network `server_ms` and `round_trip_ms` too.
    scores: `spread` of the velocity over the flow steps, over the network `uncertainty`, and of a calibrated policy whether it is an
    `alarm`, 1 or 0; where they were asked for `log_prob` (nats, of the normalised chunk) and `noise_norm` in their place.
    """

    actions: NDArray[np.float32]
    timings: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ActionPrefix:
    """The remainder of a chunk while the next one is inferred.

    actions: float32 [n, A], robot units, absolute; row i is for the control step of row i of the next chunk.
    inference_delay: how many of them are executed before the next chunk arrives, 0 to n.
    """

    actions: NDArray[np.float32]
    inference_delay: int


@dataclass(frozen=True)
class RobotReport:
    """A robot's report of its commands.

    executed: float32 [n, A], commands; row i is for the control step of row i of the answer before. counts: since its start, by name.
    """

    executed: NDArray[np.float32]
    counts: Mapping[str, int]


@runtime_checkable
class Policy(Protocol):
    """Anything that turns observations into action chunks: a loaded bundle, or a server's client.

    The two of pi0fm also have `infer(observation, noise_seed=None)`, which takes a flat map of keys and returns one ActionChunk.
    """

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Facts that a caller needs: `action_horizon`, `robot_action_dim`, `state_dim`, `cameras` (name -> key), `embodiment`."""

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        """One chunk for each observation, in order.

        noise_seeds: one for each observation; the same seed and observation give the same chunk. None draws fresh noise.
        """
