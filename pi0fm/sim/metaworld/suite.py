"""Meta-World v3 as a `Suite`.

Owns: its numbers and names. Does not know: the simulation.
"""

from typing import Final

from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.metaworld.environment import ACTION_NAMES, CAMERAS, FPS, LONGEST_EPISODE, MAX_STEPS, STATE_NAMES, MetaWorld
from pi0fm.sim.metaworld.prompts import TASK_PROMPTS
from pi0fm.sim.suite import Suite, Task

# the four groups of published results for all 50 tasks, and the ten tasks that are trained together
GROUPS: Final = {
    "easy": "button-press button-press-topdown button-press-topdown-wall button-press-wall coffee-button dial-turn door-close door-lock "
    "door-open door-unlock drawer-close drawer-open faucet-close faucet-open handle-press handle-press-side handle-pull handle-pull-side "
    "lever-pull plate-slide plate-slide-back plate-slide-back-side plate-slide-side reach reach-wall window-close window-open "
    "peg-unplug-side",
    "medium": "basketball bin-picking box-close coffee-pull coffee-push hammer peg-insert-side push-wall soccer sweep sweep-into",
    "hard": "assembly hand-insert pick-out-of-hole pick-place push push-back",
    "very_hard": "shelf-place disassemble stick-pull stick-push pick-place-wall",
    "mt10": "reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open window-close",
}

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
    groups={name: tuple(f"{task}-v3" for task in tasks.split()) for name, tasks in GROUPS.items()},
)
