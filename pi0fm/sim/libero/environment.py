"""LIBERO tasks of a Panda arm, by the conventions of published results.

Owns: the adapter from the package `libero` to `Environment`: initial states in their order, settling steps, state, orientation of pictures.
Does not know: policies, data sets, the published limits (sim/libero/suite.py).

    seed s       the task's initial state s % 50, in the order of its file: trial i of the benchmark is seed i
    reset        the state set, then SETTLING steps of the action [0, 0, 0, 0, 0, 0, -1]
    state        eef_pos [3], axis-angle of eef_quat [3], gripper_qpos [2], all from the observation and not from the controller
    observation  taken when robosuite does, after the first of a step's physics substeps, so nearly a control step old
    picture      turned by 180 degrees from robosuite's, which has its first row at the bottom; agentview is `image`, the wrist `image2`
    `-fast`      after a camera's source: without shadows, reflections and multisampling, in a third of the time, with other pixels
"""

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from pi0fm.sim.environment import CameraSpec, RenderedEnvironment, StepResult, checked_action
from pi0fm.sim.renderer import FAST, Renderer, load_mujoco
from pi0fm_client.errors import SimulationError

FPS: Final = 20
SETTLING: Final = 10
OPEN: Final = -1.0  # of the gripper
LONGEST: Final = 1000
CAMERAS: Final = tuple(name + how for name in ("agentview", "robot0_eye_in_hand") for how in ("", FAST))
COLLISION_GROUP: Final = 0  # of geoms, which robosuite's pictures leave out


@final
class Libero(RenderedEnvironment):
    """LIBERO task; on a CPU, construction and each reset take seconds."""

    def __init__(self, suite: str, task: str, cameras: tuple[CameraSpec, ...], max_steps: int) -> None:
        load_mujoco()  # before robosuite, which imports mujoco too
        with _silent():
            from libero.libero import get_libero_path
            from libero.libero.envs.env_wrapper import ControlEnv

            benchmark = _benchmark(suite)
            task_files, number = benchmark.get_task(int(task)), int(task)
            file = Path(get_libero_path("bddl_files")) / task_files.problem_folder / task_files.bddl_file
            self._states: NDArray[np.float64] = np.asarray(benchmark.get_task_init_states(number))
            # no renderer of robosuite's: it would draw every camera at every step
            how = {"use_camera_obs": False, "has_offscreen_renderer": False, "ignore_done": True, "horizon": LONGEST + SETTLING}
            self._env: Any = ControlEnv(bddl_file_name=str(file), control_freq=FPS, **how)
        self.task, self.prompt, self.cameras, self.max_steps = f"{suite}/{task}", task_files.language, cameras, max_steps
        self.fps, self.action_dim, self.state_dim = FPS, 7, 8
        self._renderers: dict[bool, Renderer] = {}
        self._drawn: Any = None
        self._seen: dict[str, Any] = {}
        self._steps, self._done, self._gripper = 0, True, OPEN

    def reset(self, seed: int) -> None:
        """Set the initial state `seed % 50` and run the settling steps."""
        self._forget_pictures()  # robosuite builds its model again
        with _silent():
            self._env.seed(seed)
            self._env.reset()
            self._draw_at_sampling()
            self._env.set_init_state(self._states[seed % len(self._states)])
        for _ in range(SETTLING):
            self._seen, _, _, _ = self._env.step([0, 0, 0, 0, 0, 0, OPEN])
        self._steps, self._done, self._gripper = 0, False, OPEN

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Move for 1/20 s."""
        command = np.clip(checked_action(self, action, self._done), -1, 1)
        self._gripper = float(command[6])
        self._seen, _, _, _ = self._env.step(command)
        self._steps += 1
        success = bool(self._env.check_success())
        self._done = success or self._steps >= self.max_steps
        return StepResult(success, self._done)

    def still_action(self) -> NDArray[np.float32]:
        """Return zero displacement and the last gripper command."""
        return np.array([0, 0, 0, 0, 0, 0, self._gripper], np.float32)

    def position(self, name: str) -> NDArray[np.float64]:
        """Return the position x, y, z in metres of an object, by LIBERO's name, for scripted motions."""
        return np.array(self._seen[f"{name}_pos"], np.float64)

    def close(self) -> None:
        """Free pictures and simulation."""
        self._forget_pictures()
        if self._env is not None:
            self._env.close()
            self._env = None
        self._done = True

    def _robot_state(self) -> NDArray[np.float32]:
        if not self._seen:
            raise SimulationError(f"{self.task}: call reset(seed) first")
        parts = (self._seen["robot0_eef_pos"], axis_angle(self._seen["robot0_eef_quat"]), self._seen["robot0_gripper_qpos"])
        return np.concatenate(parts).astype(np.float32)

    def _render(self, source: str, height: int, width: int) -> NDArray[np.uint8]:
        self._robot_state()
        fast, sim = source.endswith(FAST), self._env.sim
        if fast not in self._renderers:
            sizes = self._largest(height, width)
            self._renderers[fast] = Renderer(sim.model._model, *sizes, official=not fast, hidden_groups=(COLLISION_GROUP,))
        upright = self._renderers[fast].render(self._drawn, sim.model.camera_name2id(source.removesuffix(FAST)), height, width)
        return np.ascontiguousarray(upright[:, ::-1])

    def _draw_at_sampling(self) -> None:
        """Have robosuite copy the simulation when it takes an observation, since pictures are rendered later, if at all."""
        from robosuite.utils.observables import Observable, sensor

        inner, name = self._env.env, "pi0fm_drawn"

        @sensor(modality="drawn")
        def copied(_: Any) -> float:
            self._drawn = copy.copy(inner.sim.data._data)
            return 0.0

        if name not in inner.observation_names:
            added, other = Observable(name, copied, sampling_rate=FPS), inner._observables["robot0_eef_pos"]
            added._time_since_last_sample, added._sampled = other._time_since_last_sample, other._sampled  # taken in the same substep
            inner.add_observable(added)

    def _forget_pictures(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}


def axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return axis times angle, [3], of a quaternion xyzw. The sign is kept for w < 0, so that the angle is in [0, 2 pi]."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    return np.zeros(3) if length < 1e-10 else np.asarray(quaternion[:3] * 2.0 * np.arccos(w) / length)


def _benchmark(suite: str) -> Any:
    from libero.libero import benchmark

    return benchmark.get_benchmark(suite)(task_order_index=0)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence robosuite and LIBERO."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
