"""LeRobot's PI0 behind pi0fm's `Policy`, so that one evaluation judges both.

Owns: observations to LeRobot's batch and its actions back to robot units. Does not know: how the policy was trained.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from pi0fm.bench.lerobot_pi0 import image_key
from pi0fm.bench.lerobot_training import TrainedPolicy
from pi0fm_client.errors import ObservationError
from pi0fm_client.types import ActionChunk, Observation


@final
class LeRobotPolicy:
    """A pi0fm `Policy` that calls LeRobot's `predict_action_chunk`: its prefix cache, its 10 Euler steps."""

    def __init__(self, trained: TrainedPolicy) -> None:
        self._policy = trained.policy.eval()
        self._before, self._after = trained.processors
        self._robot = trained.robot

    @property
    def metadata(self) -> Mapping[str, Any]:
        """`action_horizon`, `robot_action_dim`, `state_dim`, `cameras` (name -> LeRobot's key), `embodiment`."""
        return {
            "action_horizon": self._policy.config.chunk_size,
            "robot_action_dim": self._robot.action_dim,
            "state_dim": self._robot.state_dim,
            "cameras": {camera: image_key(camera) for camera in self._robot.cameras},
            "embodiment": "lerobot",
        }

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        """One chunk for each observation; the same seed and observation give the same chunk, None lets LeRobot draw its noise.

        Raises ObservationError for a missing camera, a picture that is no uint8 [height, width, 3], a state of another size.
        """
        if not observations:
            return []
        if noise_seeds is not None and len(noise_seeds) != len(observations):
            raise ObservationError(f"one noise seed for each observation is needed, found {len(noise_seeds)} for {len(observations)}")
        began = time.perf_counter()
        noise = None if noise_seeds is None else torch.stack([self._noise(seed) for seed in noise_seeds])
        normalized = self._policy.predict_action_chunk(self._before(self._batch(observations)), noise=noise)
        actions = np.asarray(self._after(normalized), dtype=np.float32)
        milliseconds = (time.perf_counter() - began) * 1e3
        return [ActionChunk(chunk, {"infer_ms": milliseconds}) for chunk in actions]

    def _noise(self, seed: int) -> Tensor:
        config = self._policy.config
        return torch.randn(config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(seed))

    def _batch(self, observations: Sequence[Observation]) -> dict[str, Any]:
        batch: dict[str, Any] = {"task": [observation.prompt for observation in observations]}
        for camera in self._robot.cameras:
            pictures = np.stack([_picture(observation, camera) for observation in observations])
            batch[image_key(camera)] = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32) / 255.0
        for observation in observations:
            if observation.state.shape != (self._robot.state_dim,):
                raise ObservationError(f"the state must have {self._robot.state_dim} numbers, found shape {observation.state.shape}")
        batch[OBS_STATE] = torch.from_numpy(np.stack([observation.state for observation in observations])).to(torch.float32)
        return batch


def _picture(observation: Observation, camera: str) -> np.ndarray:
    if camera not in observation.images:
        raise ObservationError(f"the policy needs camera {camera!r}, found {sorted(observation.images)}")
    picture = observation.images[camera]
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ObservationError(f"camera {camera!r} must be uint8 [height, width, 3], found {picture.dtype} {list(picture.shape)}")
    return picture
