"""Meta-World v3 as a `Suite`.

Owns: its numbers and names. Does not know: how it is simulated.
"""

from typing import Final

from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.metaworld.environment import ACTION_NAMES, CAMERAS, FPS, LONGEST_EPISODE, MAX_STEPS, STATE_NAMES, MetaWorld
from pi0fm.sim.metaworld.prompts import TASK_PROMPTS
from pi0fm.sim.suite import Suite, Task

METAWORLD: Final = Suite(
    name="metaworld",
    title="Meta-World",
    tasks={name: Task(prompt, MAX_STEPS) for name, prompt in TASK_PROMPTS.items()},
    cameras=CAMERAS,
    default_cameras=parse_cameras("base=corner2:96x96"),
    fps=FPS,
    robot_type="sawyer",
    state_names=STATE_NAMES,
    action_names=ACTION_NAMES,
    longest_episode=LONGEST_EPISODE,
    has_expert=True,
    packages=("metaworld", "mujoco"),
    install="pip install 'metaworld==3.1.1' 'mujoco>=3.3,<4'",
    build=MetaWorld,
    increments=(0, 1, 2),
)
