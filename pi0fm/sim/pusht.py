"""PushT: a disc pushes a T-shaped block onto its target, drawn in the plane.

Owns: the adapter from gym-pusht to `Environment` and `Suite`: sentences, cameras and limits of published data sets. Does not know:
policies, data sets.
"""

from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.sim.environment import CameraSpec, Environment, StepResult, checked_action, parse_cameras
from pi0fm.sim.suite import Suite, Task
from pi0fm_client.types import Observation

FPS: Final = 10
SIDE: Final = 512.0  # of the table: positions of the disc are from 0 to SIDE
PROMPT: Final = "Push the T-shaped block onto the T-shaped target."


@final
class PushT(Environment):
    """PushT task. State: the disc's x, y. Action: its target x, y. Success: more than 95 % of the block's target is covered."""

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        from gym_pusht.envs.pusht import PushTEnv

        self.task, self.prompt, self.cameras, self.max_steps = f"pusht/{task}", PROMPT, cameras, max_steps
        self.fps, self.action_dim, self.state_dim = FPS, 2, 2
        self._env: Any = PushTEnv(obs_type="state")
        self._steps, self._done = 0, True

    def reset(self, seed: int) -> None:
        """Place disc and block at random by the seed."""
        self._env.reset(seed=seed)
        self._steps, self._done = 0, False

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Move for 1/10 s."""
        target = checked_action(self, action, self._done)
        _, _, success, _, _ = self._env.step(np.clip(target, 0.0, SIDE).astype(np.float64))
        self._steps += 1
        self._done = bool(success) or self._steps >= self.max_steps
        return StepResult(bool(success), self._done)

    def observe(self) -> Observation:
        """Draw every camera now and read the state."""
        screen = self._env._draw()
        images = {camera.name: self._env._get_img(screen, camera.width, camera.height) for camera in self.cameras}
        return Observation(images, self.still_action(), self.prompt)

    def picture(self, height: int, width: int) -> NDArray[np.uint8]:
        """Draw at another size."""
        return np.asarray(self._env._get_img(self._env._draw(), width, height))

    def still_action(self) -> NDArray[np.float32]:
        """Return the disc's position."""
        return np.array(self._env.agent.position, np.float32)

    def close(self) -> None:
        """Do nothing; no window is open."""
        self._done = True


PUSHT: Final = Suite(
    name="pusht",
    title="PushT",
    tasks={"push-t": Task(PROMPT, 300)},
    cameras=("top",),
    default_cameras=parse_cameras("image=top:96x96"),
    fps=FPS,
    robot_type="pusht",
    state_names=("x", "y"),
    action_names=("x", "y"),
    longest_episode=1000,
    has_expert=False,
    packages=("gym-pusht",),
    install="pip install 'pi0fm[pusht]'",
    build=PushT,
    action_low=0.0,
    action_high=SIDE,
)
