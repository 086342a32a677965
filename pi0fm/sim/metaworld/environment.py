"""Meta-World v3: 50 tabletop tasks of a Sawyer arm, each with a scripted expert.

Owns: the adapter from Meta-World to `Environment`: random starts from a seed, the published camera, success that ends an episode.
Does not know: policies, data sets.
"""

import pickle
import warnings
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.sim.coarse_mesh import coarsen
from pi0fm.sim.environment import CameraSpec, RenderedEnvironment, StepResult, checked_action
from pi0fm.sim.metaworld.prompts import TASK_PROMPTS
from pi0fm.sim.renderer import Renderer, load_mujoco
from pi0fm_client.errors import SimulationError

FPS: Final = 80
MAX_STEPS: Final = 400
LONGEST_EPISODE: Final = 500  # Meta-World refuses a step beyond
FIELD_OF_VIEW: Final = 1.2  # metres that a picture spans at the robot: determines the resolution of meshes
STATE_NAMES: Final = ("x", "y", "z", "gripper_opening")
ACTION_NAMES: Final = ("dx", "dy", "dz", "gripper_effort")
CAMERAS: Final = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
_PUBLISHED_CAMERA = "corner2"
_PUBLISHED_POSITION = (0.75, 0.075, 0.7)  # of corner2 in published results of vision-language-action models


@final
class MetaWorld(RenderedEnvironment):
    """One Meta-World task; building it takes about half a second.

    State: hand x, y, z in metres and the gripper's opening, 0 to 1. Action: hand dx, dy, dz and gripper effort.
    """

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        mujoco = load_mujoco()  # before metaworld, which imports mujoco too
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
        from metaworld.types import Task

        self.task, self.prompt, self.cameras, self.max_steps = task, TASK_PROMPTS[task], cameras, max_steps
        self.fps, self.action_dim, self.state_dim = FPS, len(ACTION_NAMES), len(STATE_NAMES)
        kind = ALL_V3_ENVIRONMENTS[task]
        self._env: Any = kind()
        # The goal stays in the state that the expert reads; positions come from the seed, not from a stored task.
        settings = {"env_cls": kind, "rand_vec": None, "partially_observable": False}
        self._env.set_task(Task(env_name=task, data=pickle.dumps(settings)))
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._camera_ids = {name: mujoco.mj_name2id(self._env.model, mujoco.mjtObj.mjOBJ_CAMERA, name) for name in CAMERAS}
        self._env.model.cam_pos[self._camera_ids[_PUBLISHED_CAMERA]] = _PUBLISHED_POSITION
        self._expert: Any = ENV_POLICY_MAP[task]()
        self._renderer: Renderer | None = None
        self._full_state: NDArray[np.float64] | None = None
        self._steps, self._done = 0, True

    def reset(self, seed: int) -> None:
        """Place hand and objects at random by the seed."""
        self._env.seed(seed)
        self._full_state, _ = self._env.reset()
        self._steps, self._done = 0, False

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Move for 1/80 s; success or the last of `max_steps` ends the episode."""
        self._full_state, _, _, _, info = self._env.step(np.clip(checked_action(self, action, self._done), -1.0, 1.0))
        self._steps += 1
        success = bool(info["success"])
        self._done = success or self._steps >= self.max_steps
        return StepResult(success, self._done)

    def expert_action(self) -> NDArray[np.float32]:
        """Return the action of Meta-World's scripted policy, clipped to [-1, 1] from up to 19."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant", category=UserWarning)
            action = self._expert.get_action(self._state())
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Free the renderer, if a picture was rendered."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._full_state, self._done = None, True

    def _state(self) -> NDArray[np.float64]:
        if self._full_state is None:
            raise SimulationError(f"{self.task}: call reset(seed) first")
        return self._full_state

    def _robot_state(self) -> NDArray[np.float32]:
        return self._state()[:4].astype(np.float32)

    def _render(self, source: str, height: int, width: int) -> NDArray[np.uint8]:
        self._state()
        if self._renderer is None:
            # before the renderer copies the meshes; by the cameras only, so that filming does not change the policy's pictures
            coarsen(self._env.model, FIELD_OF_VIEW / 2 / max(self._largest()))
            self._renderer = Renderer(self._env.model, *self._largest(height, width))
        pixels = self._renderer.render(self._env.data, self._camera_ids[source], height, width)
        # the four corner cameras are mounted upside down
        return np.ascontiguousarray(pixels[::-1, ::-1] if source.startswith("corner") else pixels)
