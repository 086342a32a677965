"""A prompt, a network of about 10 000 parameters and an arm without a simulator, for testing the comparison of learning."""

import numpy as np
import tiny_dataset
from eval_fakes import FakeEnvironment

from pi0fm.sim import catalog
from pi0fm.sim.environment import CameraSpec

TASK = "reach-v3"
PROMPT = catalog.prompt_of(TASK)
NETWORK = tiny_dataset.NETWORK | {"max_prompt_tokens": 32}


class SeededArm(FakeEnvironment):
    """An arm whose third step succeeds when the seed, the grey of its pictures, is odd, whatever the policy does."""

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        super().__init__(task, cameras, max_steps)
        self.prompt = catalog.prompt_of(task)

    def succeeds(self) -> bool:
        return len(self.executed) == 3 and self.resets[-1] % 2 == 1

    def picture(self, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), self.resets[-1], np.uint8)
