"""What the comparison of learning is tried on: a sentence, a network of some ten thousand parameters, an arm without a simulator."""

import numpy as np
import tiny_dataset

from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec, Environment, StepResult
from pi0fm_client.errors import SimulationError
from pi0fm_client.types import Observation

TASK = "reach-v3"
PROMPT = catalog.prompt_of(TASK)
NETWORK = tiny_dataset.NETWORK | {"max_prompt_tokens": 32}


class SeededArm(Environment):
    """An arm whose third step succeeds when the seed is odd, whatever the policy does."""

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        self.task, self.prompt, self.cameras, self.max_steps = task, catalog.prompt_of(task), cameras, max_steps
        self.fps, self.action_dim, self.state_dim = 80, 4, 4
        self._seed = self._steps = 0

    def reset(self, seed: int) -> None:
        self._seed, self._steps = seed, 0

    def step(self, action: np.ndarray) -> StepResult:
        assert action.shape == (4,)
        self._steps += 1
        success = self._steps == 3 and self._seed % 2 == 1
        return StepResult(success, success or self._steps >= self.max_steps)

    def observe(self) -> Observation:
        images = {camera.name: np.full((camera.height, camera.width, 3), self._seed, np.uint8) for camera in self.cameras}
        return Observation(images, np.full(4, self._steps, np.float32), self.prompt)

    def picture(self, height: int, width: int) -> np.ndarray:
        return np.zeros((height, width, 3), np.uint8)

    def expert_action(self) -> np.ndarray:
        raise SimulationError("this arm has no expert")

    def close(self) -> None:
        """Nothing is held."""
