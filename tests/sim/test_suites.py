"""Tests of ALOHA, PushT and SO-101 as `Suite`: seeded starts, success, pictures, missing extras."""

import numpy as np
import pytest

from pi0fm.cli.main import main
from pi0fm.eval.rollouts.episode import Episode, RolloutSettings
from pi0fm.eval.rollouts.rollout import BatchedRollout, run_all
from pi0fm.sim import catalog, so101
from pi0fm.sim.environment import parse_cameras
from pi0fm.sim.suite import metadata
from pi0fm_client.errors import SimulationError
from pi0fm_client.types import ActionChunk

TASKS = {
    "aloha/transfer-cube": "gym_aloha",
    "aloha/insertion": "gym_aloha",
    "pusht/push-t": "gym_pusht",
    "so101/pick-place": "lerobot_env_so101",
}
PUSHED = [((381, 271), 5), ((193, 190), 7), ((175, 245), 4)]  # found by search: solves PushT from seed 70890 at the 14th step
SOLVED_SEED, SOLVED_STEPS = 70890, 14
EXECUTED = 10
# Right arm: above the cube, down, closed, lifted to the middle. Left arm: waits, comes, closes. Found by inverse kinematics for seed 0.
APART = [0, -0.55, 1.13, 0, -0.58, 1.57, 1]
MET = [0, -0.07, 0.71, 0, -0.64, 1.57]
DOWN = [-0.17, 0.02, 0.84, -2.72, -0.2, 2.59]
LIFTED = [0, 0.02, -0.03, -3.14, -1.05, 3.14, 0]
HANDED_OVER = {
    0: [0, -0.96, 1.16, 0, -0.3, 0, 0, 0, -0.96, 1.16, 0, -0.3, 0, 0],
    60: [*APART, -0.17, -0.22, 0.69, -2.99, -0.59, 2.87, 1],
    100: [*APART, *DOWN, 1],
    115: [*APART, *DOWN, 1],
    145: [*APART, *DOWN, 0],
    185: [*APART, *LIFTED],
    200: [*APART, *LIFTED],
    250: [*MET, 1, *LIFTED],
    300: [*MET, 0, *LIFTED],
}
pytestmark = pytest.mark.timeout(180)  # lerobot-env-so101 imports lerobot
SMALL = dict.fromkeys(("aloha/transfer-cube", "aloha/insertion"), parse_cameras("top=top-fast:96x96"))


@pytest.fixture(params=TASKS)
def task(request):
    pytest.importorskip(TASKS[request.param])
    return request.param


class Keyed:
    """Answers the rows of one sequence, whatever it sees."""

    metadata = {}  # noqa: RUF012

    def __init__(self, rows):
        self.rows = list(rows)

    def infer_batch(self, observations, noise_seeds=None):
        chunk = (self.rows + self.rows[-1:] * EXECUTED)[:EXECUTED]
        self.rows = self.rows[EXECUTED:] or self.rows[-1:]
        return [ActionChunk(np.asarray(chunk, np.float32))]


def outcome(task, rows, seed, max_steps=None):
    batch = BatchedRollout(lambda name: catalog.open_environment(name, max_steps=max_steps), Keyed(rows), RolloutSettings(EXECUTED), 1)
    (result,) = run_all([Episode(task, seed)], batch)
    batch.close()
    return result.outcome, result.steps


def test_a_start_is_a_function_of_its_seed(task):
    environment = catalog.open_environment(task, SMALL.get(task, ()))
    pictures = []
    for seed in (1, 2, 1):
        environment.reset(seed)
        seen = environment.observe()
        pictures.append(next(iter(seen.images.values())))
        assert seen.state.shape == (environment.state_dim,) and seen.state.dtype == np.float32
        assert seen.prompt == catalog.prompt_of(task)
    assert np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[1])
    assert pictures[0].shape == (96, 96, 3) and pictures[0].dtype == np.uint8 and pictures[0].std() > 10
    assert environment.picture(64, 80).shape == (64, 80, 3)
    environment.close()


def test_standing_still_moves_nothing_and_ends_at_the_limit(task):
    environment = catalog.open_environment(task, SMALL.get(task, ()), max_steps=6)
    environment.reset(3)
    before = environment.observe().state
    results = [environment.step(environment.still_action()) for _ in range(6)]
    assert [result.done for result in results] == [False] * 5 + [True] and not any(result.success for result in results)
    moved = np.abs(environment.observe().state - before)
    assert moved[:3].max() < 0.06 if task.startswith("so101") else moved.max() < 5  # the arm starts outstretched, and sags
    with pytest.raises(SimulationError, match="is over"):
        environment.step(environment.still_action())
    environment.reset(3)
    for wrong in (np.zeros(7), np.full(environment.action_dim, np.nan)):
        with pytest.raises(SimulationError, match="finite numbers"):
            environment.step(wrong.astype(np.float32))
    environment.close()


def test_pusht_success_is_counted():
    pytest.importorskip("gym_pusht")
    rows = [place for place, count in PUSHED for _ in range(count)]
    assert outcome("pusht/push-t", rows, SOLVED_SEED) == ("success", SOLVED_STEPS)
    assert outcome("pusht/push-t", rows, SOLVED_SEED + 1, max_steps=20) == ("failure", 20)


def test_aloha_success_is_a_cube_that_the_left_hand_holds_above_the_table():
    pytest.importorskip("gym_aloha")
    environment = catalog.open_environment("aloha/transfer-cube", SMALL["aloha/transfer-cube"])
    environment.reset(1)
    assert not environment.step(environment.still_action()).success
    physics = environment._env.physics
    finger = physics.named.data.xpos["vx300s_left/left_finger_link"]
    physics.named.data.qpos[-7:-4] = (finger + physics.named.data.xpos["vx300s_left/right_finger_link"]) / 2
    closed = environment.still_action()
    closed[6] = 0
    assert any(environment.step(closed).success for _ in range(25))
    environment.close()


def test_so101_success_is_the_experts_and_a_cube_that_is_left_alone_is_none():
    pytest.importorskip("lerobot_env_so101")
    environment = catalog.open_environment("so101/pick-place")
    for seed in (1, 7):
        environment.reset(seed)
        rows = []
        while True:
            rows.append(environment.expert_action())
            result = environment.step(rows[-1])
            if result.done:
                break
        assert result.success and len(rows) < 80
    environment.close()
    assert outcome("so101/pick-place", rows, 7) == ("success", len(rows))
    assert outcome("so101/pick-place", rows[:20], 7, max_steps=60) == ("failure", 60)


@pytest.mark.parametrize("millimetres", [(0, 0), (10, 0), (-10, 0), (0, 9), (0, -9)])
def test_so101s_expert_aims_at_the_middle_of_what_it_can_grasp(millimetres, monkeypatch):
    """A policy misses by millimetres: an expert near the edge of success teaches what only an exact copy can do."""
    pytest.importorskip("lerobot_env_so101")
    monkeypatch.setattr(so101, "AIM", so101.AIM + np.array([*millimetres, 0]) / 1000)
    environment = catalog.open_environment("so101/pick-place", max_steps=80)
    environment.reset(4)
    while not (result := environment.step(environment.expert_action())).done:
        pass
    environment.close()
    assert result.success


def test_so101_holds_at_small_displacements_as_at_none():
    """A network never answers exactly the present place; the package's control holds the arm at nothing else."""
    pytest.importorskip("lerobot_env_so101")
    environment = catalog.open_environment("so101/pick-place")
    small = np.random.default_rng(0).uniform(-0.0022, 0.0022, (20, 3))
    ends = []
    for factor in (0, 1, 3):
        environment.reset(2)
        for _ in range(10):
            environment.step(environment.expert_action())
        for way in small:
            environment.step(environment.still_action() + np.array([*(factor * way), 0], np.float32))
        ends.append(environment.observe().state)
    environment.close()
    assert np.array_equal(ends[0], ends[1]) and not np.array_equal(ends[0], ends[2])


def test_so101_goes_to_the_place_that_an_action_names_within_the_hold():
    pytest.importorskip("lerobot_env_so101")
    environment = catalog.open_environment("so101/pick-place")
    for place in ((0.20, 0.08, 0.10), (0.28, -0.08, 0.07)):
        environment.reset(2)
        for _ in range(25):
            environment.step(np.array([*place, 1], np.float32))
        assert np.linalg.norm(environment.observe().state[:3] - place) < 2 * so101.STILL
    environment.close()


def test_so101s_default_cameras_show_the_cube_wherever_it_starts():
    """At least 200 pixels, most of a patch of the tiny preset; the package's camera shows 86."""
    pytest.importorskip("lerobot_env_so101")
    environment = catalog.open_environment("so101/pick-place")
    (left, near), (right, far) = so101.CUBE_LOW, so101.CUBE_HIGH
    for place in ((left, near), (left, far), (right, near), (right, far)):
        environment.reset(0)
        cube = environment._env.data.joint("block").qpos
        seen = {}
        for steps, camera in ((0, "side"), (9, "wrist")):  # the wrist's looks down once the expert is above the cube
            cube[:2] = place
            for _ in range(steps):
                environment.step(environment.expert_action())
            shown = environment.observe().images[camera].astype(int)
            here, cube[:2] = cube[:2].copy(), (2, 2)
            seen[camera] = int((np.abs(shown - environment.observe().images[camera]).max(axis=2) > 20).sum())
            cube[:2] = here
        assert min(seen.values()) >= 200, (place, seen)
    environment.close()


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch, capsys, tmp_path):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    for name, suite in catalog.SUITES.items():
        with pytest.raises(SimulationError, match="is not installed here; type pip install"):
            suite.open(next(iter(suite.tasks)))
        assert name.split("_")[0] in suite.install
    monkeypatch.undo()
    words = ["demos", "--tasks", "pusht/push-t", "--dataset.root", str(tmp_path / "demos")]
    assert main(words) == 2 and "PushT has no scripted expert" in capsys.readouterr().err


def test_a_camera_that_a_simulator_lacks(task):
    with pytest.raises(Exception, match="has no camera 'nowhere'"):
        catalog.open_environment(task, parse_cameras("base=nowhere:96x96"))


def test_a_cube_that_is_handed_over_is_counted_and_one_that_only_the_right_arm_lifts_is_not():
    pytest.importorskip("gym_aloha")
    steps, keyed = list(HANDED_OVER), np.array(list(HANDED_OVER.values()))
    rows = np.stack([np.interp(np.arange(steps[-1] + 10), steps, column) for column in keyed.T], axis=1)
    alone = rows.copy()
    alone[:, 6] = 1  # the left gripper stays open
    verdict, count = outcome("aloha/transfer-cube", rows, 0)
    assert verdict == "success" and 250 < count < 300
    assert outcome("aloha/transfer-cube", alone[: count - EXECUTED], 0, max_steps=240) == ("failure", 240)
    assert outcome("aloha/transfer-cube", rows[:300], 2, max_steps=300) == ("failure", 300), "the cube lies elsewhere"
