"""Simulated ALOHA: two ViperX arms hand over a cube, or put a peg into a socket.

Owns: the adapter from gym-aloha's physics and tasks to `Environment` and `Suite`; pictures by our renderer, where gym-aloha draws three
cameras at every step. Does not know: policies, data sets.
"""

from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.sim.environment import CameraSpec, RenderedEnvironment, StepResult, checked_action, parse_cameras
from pi0fm.sim.renderer import FAST, Renderer, load_mujoco
from pi0fm.sim.suite import Suite, Task

FPS: Final = 50
SOLVED: Final = 4  # the reward of both tasks
PROMPTS: Final = {
    "transfer-cube": "Pick up the cube with the right arm and transfer it to the left arm.",
    "insertion": "Insert the peg into the socket.",
}
_JOINTS: Final = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
NAMES: Final = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _JOINTS)
CAMERAS: Final = tuple(name + how for name in ("top", "angle", "front_close") for how in ("", FAST))
WIDEST: Final = 3.15  # largest joint angle in radians


@final
class Aloha(RenderedEnvironment):
    """ALOHA task. State and action: six joint angles of each arm and its gripper, 0 closed to 1 open, left first; actions are targets."""

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        load_mujoco()  # before dm_control, which imports mujoco too
        from dm_control import mujoco
        from dm_control.rl import control
        from gym_aloha import utils
        from gym_aloha.constants import ASSETS_DIR, DT
        from gym_aloha.tasks import sim

        kind: Any = {"transfer-cube": sim.TransferCubeTask, "insertion": sim.InsertionTask}[task]
        physics = mujoco.Physics.from_xml_path(str(Path(ASSETS_DIR) / f"bimanual_viperx_{task.replace('-', '_')}.xml"))
        self.task, self.prompt, self.cameras, self.max_steps = f"aloha/{task}", PROMPTS[task], cameras, max_steps
        self.fps, self.action_dim, self.state_dim = FPS, len(NAMES), len(NAMES)
        self._sim, self._utils, self._one_box = sim, utils, task == "transfer-cube"
        self._env: Any = control.Environment(physics, _undrawn(kind)(), time_limit=float("inf"), control_timestep=DT)
        self._renderers: dict[bool, Renderer] = {}
        self._target: NDArray[np.float32] = np.zeros(len(NAMES), np.float32)
        self._steps, self._done = 0, True

    def reset(self, seed: int) -> None:
        """Place the objects at random by the seed, as gym-aloha does."""
        place = self._utils.sample_box_pose(seed) if self._one_box else np.concatenate(self._utils.sample_insertion_pose(seed))
        self._sim.BOX_POSE[0] = place  # gym-aloha's tasks read it there at their reset
        self._env.reset()
        self._steps, self._done, self._target = 0, False, self._robot_state()

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Move for 1/50 s."""
        self._target = checked_action(self, action, self._done)
        success = self._env.step(self._target.astype(np.float64)).reward == SOLVED
        self._steps += 1
        self._done = success or self._steps >= self.max_steps
        return StepResult(success, self._done)

    def still_action(self) -> NDArray[np.float32]:
        """Return the last target, or the arms' position before the first step."""
        return self._target.copy()

    def close(self) -> None:
        """Free the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers, self._done = {}, True

    def _robot_state(self) -> NDArray[np.float32]:
        return np.asarray(self._env.task.get_qpos(self._env.physics), np.float32)

    def _render(self, source: str, height: int, width: int) -> NDArray[np.uint8]:
        fast, physics = source.endswith(FAST), self._env.physics
        if fast not in self._renderers:
            self._renderers[fast] = Renderer(physics.model.ptr, *self._largest(height, width), official=not fast)
        number = physics.model.name2id(source.removesuffix(FAST), "camera")
        return np.ascontiguousarray(self._renderers[fast].render(physics.data.ptr, number, height, width))


def _undrawn(kind: Any) -> Any:
    """Derive a task of gym-aloha that renders nothing when it is stepped."""
    return type(kind.__name__, (kind,), {"get_observation": lambda self, physics: {}})


ALOHA: Final = Suite(
    name="aloha",
    title="ALOHA",
    tasks={"transfer-cube": Task(PROMPTS["transfer-cube"], 400), "insertion": Task(PROMPTS["insertion"], 500)},
    cameras=CAMERAS,
    default_cameras=parse_cameras("top=top:640x480"),
    fps=FPS,
    robot_type="aloha",
    state_names=NAMES,
    action_names=NAMES,
    longest_episode=1000,
    has_expert=False,
    packages=("gym-aloha", "mujoco"),
    install="pip install 'pi0fm[aloha]'",
    build=Aloha,
    action_low=-WIDEST,
    action_high=WIDEST,
)
