"""Chain from robot units to the network and back: the same object in training, inference and evaluation.

Owns: `Sample`, the transforms of state and actions with their exact inverses, the chain, the conversion to tensors.
Does not know: where a sample came from, what the network does with it.

    forward:  delta actions -> normalise -> pad dimensions -> [resize pictures, tokenise prompt] -> tensors
    inverse:  unpad dimensions -> unnormalise -> absolute actions                                <- tensors

Shape letters: B batch, H horizon, S state dim, A action dim (the robot's before padding, the network's after it).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pi0fm.data.columns.embodiment import Embodiment, picture, vector
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.normalization import RELATIVE, Scaling, scaling
from pi0fm.data.pictures.images import resize_with_padding
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize
from pi0fm.data.prompt import PromptTokenizer
from pi0fm.models.observation import ModelObservation
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import Observation

MAX_NORMALIZED = 1e9
"""Largest normalised state or action, in spreads of the data set: far above any robot's, far below an overflow of its float32 square."""


@dataclass(frozen=True)
class Sample:
    """State [B, S] and actions [B, H, A], None at inference; both float32."""

    state: NDArray[np.float32]
    actions: NDArray[np.float32] | None


class Transform(ABC):
    """Step of the chain on state and actions, with its exact inverse."""

    @abstractmethod
    def forward(self, sample: Sample) -> Sample:
        """Map towards the network."""

    @abstractmethod
    def inverse(self, sample: Sample) -> Sample:
        """Map towards the robot; `inverse(forward(s)) == s` up to rounding."""


@dataclass(frozen=True)
class DeltaActions(Transform):
    """Differences of the listed action dimensions from the same state dimensions at the chunk's start."""

    dims: tuple[int, ...]

    def forward(self, sample: Sample) -> Sample:
        """Subtract the state from the listed dimensions."""
        return self._shift(sample, -1.0)

    def inverse(self, sample: Sample) -> Sample:
        """Add the state to the listed dimensions."""
        return self._shift(sample, 1.0)

    def _shift(self, sample: Sample, sign: float) -> Sample:
        if sample.actions is None or not self.dims:
            return sample
        actions = sample.actions.copy()
        actions[..., list(self.dims)] += np.float32(sign) * sample.state[:, None, list(self.dims)]
        return replace(sample, actions=actions)


@dataclass(frozen=True)
class Normalize(Transform):
    """Affine map of state and actions, dimension by dimension (data/normalization.py)."""

    state: Scaling
    action: Scaling

    def forward(self, sample: Sample) -> Sample:
        """Map to units of the data set's spread."""
        return Sample(self.state.forward(sample.state), None if sample.actions is None else self.action.forward(sample.actions))

    def inverse(self, sample: Sample) -> Sample:
        """Map to robot units."""
        return Sample(self.state.inverse(sample.state), None if sample.actions is None else self.action.inverse(sample.actions))


@dataclass(frozen=True)
class PadDimensions(Transform):
    """Zero padding to the network's widths, removed by the inverse."""

    state_dim: int
    robot_action_dim: int
    padded_state_dim: int
    padded_action_dim: int

    def forward(self, sample: Sample) -> Sample:
        """Pad to the network's widths."""
        actions = None if sample.actions is None else _pad(sample.actions, self.padded_action_dim)
        return Sample(_pad(sample.state, self.padded_state_dim), actions)

    def inverse(self, sample: Sample) -> Sample:
        """Cut to the robot's widths."""
        actions = None if sample.actions is None else sample.actions[..., : self.robot_action_dim]
        return Sample(sample.state[..., : self.state_dim], actions)


@dataclass(frozen=True)
class Chain:
    """Conversion of an embodiment's observations to a network's tensors, and of its actions back."""

    embodiment: Embodiment
    transforms: tuple[Transform, ...]
    tokenizer: PromptTokenizer
    image_size: int
    resize: Resize = ANTIALIAS

    def forward(self, sample: Sample) -> Sample:
        """Apply all transforms, in order."""
        for transform in self.transforms:
            sample = transform.forward(sample)
        return sample

    def inverse(self, sample: Sample) -> Sample:
        """Apply all inverses, in reverse order."""
        for transform in reversed(self.transforms):
            sample = transform.inverse(sample)
        return sample

    def observe(self, observations: Sequence[Observation]) -> ModelObservation:
        """Convert robot-side observations to one batch for the network; a camera that an observation lacks is masked.

        Raises ObservationError for an unknown camera, none at all, or an array of another shape, type or range.
        """
        names = list(self.embodiment.cameras)
        images = np.zeros((len(observations), len(names), self.image_size, self.image_size, 3), dtype=np.uint8)
        mask = np.zeros((len(observations), len(names)), dtype=bool)
        for row, observation in enumerate(observations):
            self._refuse_unknown_cameras(observation.images)
            for column, name in enumerate(names):
                if name in observation.images:
                    given = picture(observation.images[name], name)
                    images[row, column] = resize_with_padding(given[None], self.image_size, self.resize)[0]
                    mask[row, column] = True
        width, key = self.embodiment.dims()[0], self.embodiment.state
        state = np.stack([vector(observation.state, width, key) for observation in observations])
        return self.to_model(images, mask, self.forward(Sample(state, None)).state, [observation.prompt for observation in observations])

    def check(self, observation: Observation) -> None:
        """Raise ObservationError for a prompt that does not fit or a state that would overflow in the network, without running it."""
        with np.errstate(over="ignore"):
            state = self.forward(Sample(observation.state[None], None)).state
        if not (np.abs(state) <= MAX_NORMALIZED).all():
            key, found = self.embodiment.state, float(observation.state[int(np.abs(state[0]).argmax())])
            raise ObservationError(
                f"{key} must be near the data set's values, found {found:g}; send it in the units that it was recorded in"
            )
        self.tokenizer([observation.prompt], state[:, : self.embodiment.dims()[0]])

    def check_actions(self, actions: NDArray[Any], what: str) -> None:
        """Raise ObservationError for actions [n, robot_action_dim] so far from the data set's that they would overflow in the network."""
        state = np.zeros((1, self.embodiment.dims()[0]), np.float32)
        with np.errstate(over="ignore"):
            normal = self.forward(Sample(state, np.asarray(actions, np.float32)[None])).actions
        assert normal is not None
        if not (np.abs(normal) <= MAX_NORMALIZED).all():
            row, dim = np.unravel_index(int(np.abs(normal[0]).argmax()), normal[0].shape)
            raise ObservationError(
                f"{what} must be near the data set's actions, found {actions[row][dim]:g} in row {row}; send robot units"
            )

    def to_model(
        self, images: NDArray[np.uint8], image_mask: NDArray[np.bool_], state: NDArray[np.float32], prompts: list[str]
    ) -> ModelObservation:
        """Convert pictures [B, C, size, size, 3], their mask [B, C], transformed state [B, S] and prompts to `trimmed` tensors."""
        tokens, mask = self.tokenizer(prompts, state[:, : self.embodiment.dims()[0]])
        arrays = (images, image_mask, tokens, mask, state)
        return ModelObservation(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)).trimmed()

    def _refuse_unknown_cameras(self, images: Mapping[str, NDArray[np.uint8]]) -> None:
        unknown = set(images) - set(self.embodiment.cameras)
        if unknown or not images:
            raise ObservationError(f"an observation must hold pictures of {sorted(self.embodiment.cameras)}, found {sorted(images)}")


def make_chain(
    embodiment: Embodiment,
    stats: NormStats,
    tokenizer: PromptTokenizer,
    *,
    normalization: str,
    floor: float,
    epsilon: float = 0.0,
    rule: str = RELATIVE,
    resize: Resize = ANTIALIAS,
    image_size: int,
    padded_state_dim: int,
    padded_action_dim: int,
) -> Chain:
    """Make the chain of one embodiment and one network. Raises ConfigError for a robot wider than the network, or unlike its statistics."""
    state_dim, action_dim = embodiment.dims()
    for what, width, limit in (("state", state_dim, padded_state_dim), ("action", action_dim, padded_action_dim)):
        if width > limit:
            raise ConfigError(f"the robot's {what} is {width} wide, the model's {limit}; type --model.{what}_dim {width}")
    for what, width, stats_width in (("state", state_dim, len(stats.state.mean)), ("action", action_dim, len(stats.action.mean))):
        if width != stats_width:
            raise ConfigError(f"norm stats of the {what} are {stats_width} wide, the embodiment's {what} is {width}; compute them again")
    transforms = (
        DeltaActions(embodiment.delta_dims),
        Normalize(*(scaling(column, normalization, floor, epsilon, rule) for column in (stats.state, stats.action))),
        PadDimensions(state_dim, action_dim, padded_state_dim, padded_action_dim),
    )
    return Chain(embodiment, transforms, tokenizer, image_size, resize)


def _pad(array: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    if width == array.shape[-1]:
        return array
    padded = np.zeros((*array.shape[:-1], width), dtype=array.dtype)  # np.pad takes ten times as long, a tenth of a batch
    padded[..., : array.shape[-1]] = array
    return padded
