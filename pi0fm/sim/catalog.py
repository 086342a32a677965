"""Suites and their tasks by the name `SUITE/TASK`.

Owns: the list of suites, the written form of a task, its name in reports. Does not know: the contents of a suite.

    metaworld/drawer-open-v3  --find-->  the suite metaworld, drawer-open-v3
              drawer-open-v3  --find-->  the same: a name alone belongs to DEFAULT_SUITE
"""

from collections.abc import Sequence
from typing import Final

from pi0fm.options import nearest
from pi0fm.sim.aloha import ALOHA
from pi0fm.sim.environment import CameraSpec, Environment
from pi0fm.sim.libero.suite import LIBERO
from pi0fm.sim.metaworld.suite import METAWORLD
from pi0fm.sim.pusht import PUSHT
from pi0fm.sim.so101 import SO101
from pi0fm.sim.suite import Suite
from pi0fm_client.errors import ConfigError

SUITES: Final = {suite.name: suite for suite in (METAWORLD, *LIBERO, ALOHA, PUSHT, SO101)}
DEFAULT_SUITE = METAWORLD.name
TASK_FORM = (
    "SUITE/TASK, such as metaworld/drawer-open-v3, or SUITE/all or SUITE/GROUP, such as metaworld/mt10; a name alone is a task of metaworld"
)


def suite_named(name: str) -> Suite:
    """Return the suite of that name. Raises ConfigError that names the nearest."""
    if name not in SUITES:
        raise ConfigError(f"unknown simulator {name!r}: {nearest(name, list(SUITES))}; a task is written {TASK_FORM}")
    return SUITES[name]


def find(task: str) -> tuple[Suite, str]:
    """Return the suite of a task, and the task's name there. Raises ConfigError that names the nearest suite or task."""
    prefix, slash, name = task.rpartition("/")
    suite = suite_named(prefix if slash else DEFAULT_SUITE)
    suite.check(name)
    return suite, name


def expand(tasks: Sequence[str]) -> list[str]:
    """Replace `SUITE/GROUP` and `SUITE/all` by the tasks that they stand for, each `SUITE/TASK`; others are left as they are."""
    found = []
    for task in tasks:
        prefix, slash, word = task.rpartition("/")
        suite = SUITES.get(prefix if slash else DEFAULT_SUITE)
        group = None if suite is None else suite.groups.get(word, tuple(suite.tasks) if word == "all" else None)
        found += [task] if suite is None or group is None else [f"{suite.name}/{name}" for name in group]
    return found


def report_name(task: str) -> str:
    """Return a task's name in reports, noise seeds and recordings, without the prefix of DEFAULT_SUITE. The task need not exist."""
    return task.removeprefix(f"{DEFAULT_SUITE}/")


def is_task(task: str) -> bool:
    """Tell whether a suite has that task; the tasks of a real robot's data set are in none."""
    try:
        find(task)
    except ConfigError:
        return False
    return True


def prompt_of(task: str) -> str:
    """Return the sentence that a policy reads for a task. Raises ConfigError as `find` does."""
    suite, name = find(task)
    return suite.tasks[name].prompt


def shared_suite(tasks: Sequence[str]) -> Suite:
    """Return the suite that all tasks share. Raises ConfigError when they belong to several, and as `find` does."""
    suites = suites_of(tasks)
    if len(suites) != 1:
        names = ", ".join(suite.name for suite in suites)
        raise ConfigError(f"all tasks must be of one simulator, found {names or 'none'}; a task is written {TASK_FORM}")
    return suites[0]


def suites_of(tasks: Sequence[str]) -> list[Suite]:
    """Return the suites of the tasks, each once, in the order of `tasks`. Raises ConfigError as `find` does."""
    return list({suite.name: suite for suite in (find(task)[0] for task in tasks)}.values())


def open_environment(task: str, cameras: tuple[CameraSpec, ...] = (), max_steps: int | None = None) -> Environment:
    """Open the environment of a task in its written form."""
    suite, name = find(task)
    return suite.open(name, cameras, max_steps)
