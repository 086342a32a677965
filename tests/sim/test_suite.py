"""Tests of task names, their suites, refusals; and that only sim/ names a simulator."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from eval_fakes import PointEnvironment

from pi0fm.demos.config import DemosConfig
from pi0fm.sim import catalog
from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.metaworld.suite import METAWORLD
from pi0fm.sim.suite import Suite, Task
from pi0fm_client.errors import ConfigError, SimulationError

FOLD = Suite(
    name="fold",
    title="Fold",
    tasks={"towel": Task("fold the towel", 30)},
    cameras=("front",),
    default_cameras=parse_cameras("base=front:32x32"),
    fps=10,
    robot_type="two arms",
    state_names=("x",),
    action_names=("dx",),
    longest_episode=40,
    has_expert=False,
    packages=(),
    install="pip install fold-sim",
    build=lambda task, cameras, max_steps: PointEnvironment(task, max_steps=max_steps, cameras=cameras),
)


@pytest.mark.parametrize("written", ["metaworld/drawer-open-v3", "drawer-open-v3"])
def test_a_name_alone_is_of_the_default_suite(written: str) -> None:
    suite, task = catalog.find(written)
    assert (suite.name, task, suite.tasks[task].prompt) == ("metaworld", "drawer-open-v3", "open the drawer")
    assert catalog.report_name(written) == "drawer-open-v3" and catalog.prompt_of(written) == "open the drawer"
    assert (len(suite.state_names), len(suite.action_names), suite.fps, suite.tasks[task].max_steps) == (4, 4, 80, 400)
    assert suite.has_expert and len(suite.tasks) == 50


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("drawer-open", "unknown Meta-World task 'drawer-open': did you mean 'drawer-open-v3'"),
        ("metaworld/drawer-opn-v3", "unknown Meta-World task 'drawer-opn-v3': did you mean 'drawer-open-v3'"),
        ("metawrld/drawer-open-v3", "unknown simulator 'metawrld': did you mean 'metaworld'"),
        ("", "unknown Meta-World task ''"),
    ],
)
def test_an_unknown_suite_or_task_is_one_line_that_names_the_nearest(written: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        catalog.find(written)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not catalog.is_task(written) and catalog.is_task("reach-v3")


def test_what_is_not_asked_for_is_the_suites() -> None:
    base = parse_cameras("wide=front:64x64")
    plain, chosen = FOLD.open("towel"), FOLD.open("towel", base, 40)
    assert (plain.task, plain.cameras, plain.max_steps) == ("towel", FOLD.default_cameras, 30)
    assert (chosen.cameras, chosen.max_steps) == (base, 40)


@pytest.mark.parametrize(
    ("task", "camera", "steps", "words"),
    [
        ("towl", "base=front:32x32", None, "unknown Fold task 'towl': did you mean 'towel'"),
        ("towel", "base=frnt:32x32", None, "Fold has no camera 'frnt': did you mean 'front'"),
        ("towel", "base=front:32x32", 41, "max_steps must be from 1 to 40 in Fold, found 41"),
        ("towel", "base=front:32x32", 0, "max_steps must be from 1 to 40 in Fold, found 0"),
    ],
)
def test_what_a_suite_has_not_is_refused(task: str, camera: str, steps: int | None, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FOLD.open(task, parse_cameras(camera), steps)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_simulator_that_is_not_installed_says_what_to_type() -> None:
    with pytest.raises(SimulationError, match=r"Fold needs the package fold-sim, which is not installed here; type pip install fold-sim"):
        replace(FOLD, packages=("numpy", "fold-sim")).open("towel")


def test_tasks_of_two_simulators_and_of_one_without_an_expert_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = catalog.suite_named
    monkeypatch.setattr(catalog, "suite_named", lambda name: FOLD if name == "fold" else known(name))
    assert catalog.shared_suite(["fold/towel", "fold/towel"]) is FOLD and catalog.report_name("fold/towel") == "fold/towel"
    with pytest.raises(ConfigError, match="all tasks must be of one simulator, found fold, metaworld"):
        catalog.shared_suite(["fold/towel", "reach-v3"])
    with pytest.raises(ConfigError, match="Fold has no scripted expert to record"):
        DemosConfig("fold/towel")


def test_only_sim_names_a_simulator(repository: Path) -> None:
    package = repository / "pi0fm"
    outside = [path for path in package.rglob("*.py") if not path.is_relative_to(package / "sim")]
    naming = [str(path) for path in outside if re.search(r"meta.?world|mujoco", path.read_text(), re.IGNORECASE)]
    assert len(outside) > 100 and naming == []


def test_groups_and_all_stand_for_their_tasks():
    assert catalog.expand(["mt10"]) == catalog.expand(["metaworld/mt10"]) and len(catalog.expand(["mt10"])) == 10
    fifty = [task for group in ("easy", "medium", "hard", "very_hard") for task in catalog.expand([f"metaworld/{group}"])]
    assert sorted(fifty) == sorted(catalog.expand(["metaworld/all"])) and len(fifty) == 50
    assert [len(METAWORLD.groups[name]) for name in ("easy", "medium", "hard", "very_hard")] == [28, 11, 6, 5]
    assert catalog.expand(["libero_goal/all", "reach-v3"]) == [*(f"libero_goal/{k}" for k in range(10)), "reach-v3"]
    assert catalog.expand(["metaworld/mt11", "nowhere/all"]) == ["metaworld/mt11", "nowhere/all"]  # refused by `find`
