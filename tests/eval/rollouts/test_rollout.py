"""Rounds: batching, isolation of crashes, independence of batching, ablations, refusals."""

import io

import av
import numpy as np
import pytest
from eval_fakes import HORIZON, PointEnvironment, PointPolicy, no_fault

from pi0fm.eval.report import video
from pi0fm.eval.rollouts.episode import Episode, RolloutSettings, noise_seed, other_seed
from pi0fm.eval.rollouts.rollout import BatchedRollout, run_all
from pi0fm_client.errors import BundleError, ConfigError, ServingError, SimulationError
from pi0fm_client.types import ActionChunk

FOUR = RolloutSettings(execution_horizon=4)


def run(seeds, *, environments=3, fault=no_fault, policy=None, settings=FOUR, tasks=("a",), film="no"):
    opened = []

    def open_environment(task):
        opened.append(PointEnvironment(task, fault))
        return opened[-1]

    policy = policy or PointPolicy()
    batch = BatchedRollout(open_environment, policy, settings, environments)
    episodes = [Episode(task, seed, film) for task in tasks for seed in seeds]
    results = {(result.task, result.seed): result for result in run_all(episodes, batch)}
    batch.close()
    return results, policy, opened


def verdicts(results):
    return {key: (result.outcome, result.steps) for key, result in results.items()}


def test_one_call_serves_every_slot_and_the_batch_stays_full():
    results, policy, opened = run(range(9), environments=3)
    sizes = [len(batch) for batch in policy.batches]
    rounds = sum(-(-result.steps // 4) for result in results.values())
    assert len(results) == 9 and sum(sizes) == rounds
    # An ended episode gives its slot to the next one at once: the batch shrinks only when the queue is empty.
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 3
    assert len(opened) == 3 and all(environment.closed == 1 for environment in opened)


@pytest.mark.parametrize("environments", [1, 2, 5, 12])
def test_results_do_not_depend_on_batching_or_order(environments):
    alone, _, _ = run(range(12), environments=1)
    assert {outcome for outcome, _ in verdicts(alone).values()} == {"success", "failure"}, "the fake must tell episodes apart"
    together, _, _ = run(reversed(range(12)), environments=environments)
    assert verdicts(together) == verdicts(alone)


def test_the_evaluation_seed_changes_the_noise():
    first, _, _ = run(range(6))
    second, _, _ = run(range(6), settings=RolloutSettings(execution_horizon=4, seed=1))
    assert verdicts(first) != verdicts(second)


def test_noise_seeds_differ_in_each_argument_and_fit_63_bits():
    seeds = [noise_seed(s, task, seed, step) for s in (0, 1) for task in ("a", "b", "a/1") for seed in (1, 11) for step in (0, 8)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(0, "a", 1, 0) == noise_seed(0, "a", 1, 0)


@pytest.mark.parametrize("where", ["reset", "step", "observe"])
def test_a_crash_stays_with_its_episode(where):
    def fault(at, seed, step):
        if at == where and seed == 2 and (where != "step" or step == 6):
            raise ValueError("the arm\nexploded")

    healthy, _, _ = run(range(6))
    results, _, opened = run(range(6), fault=fault)
    assert results["a", 2].outcome == "crash"
    assert results["a", 2].error == "ValueError: the arm exploded"
    assert results["a", 2].steps == (6 - 1 if where == "step" else 0)
    del healthy["a", 2]
    assert verdicts({key: value for key, value in results.items() if key != ("a", 2)}) == verdicts(healthy)
    assert len(opened) == 4, "a crashed environment is not used again"
    assert all(environment.closed for environment in opened)


def test_an_environment_that_does_not_open_is_a_crash_but_an_unknown_task_is_the_users():
    def broken(error):
        def open_environment(task):
            raise error

        return BatchedRollout(open_environment, PointPolicy(), FOUR, 2)

    (result,) = broken(OSError("no file")).advance([Episode("a", 1)])
    assert (result.outcome, result.error) == ("crash", "OSError: no file")
    with pytest.raises(SimulationError, match="unknown task"):
        broken(SimulationError("unknown task")).advance([Episode("a", 1)])


def test_a_machine_that_cannot_render_stops_the_evaluation():
    def fault(at, seed, step):
        if at == "observe":
            raise SimulationError("no renderer")

    with pytest.raises(SimulationError, match="no renderer"):
        run([1], fault=fault)


def test_a_policys_fault_is_not_a_crash():
    class Silent(PointPolicy):
        def infer_batch(self, observations, noise_seeds=None):
            raise ServingError("no answer in 10 s")

    with pytest.raises(ServingError, match="no answer"):
        run([1], policy=Silent())


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.full((8, 1), np.nan, np.float32), "finite actions, found nan in row 0, column 0 at a, seed 1, step 0"),
        (np.zeros((8, 2), np.float32), r"actions \[>= 4, 1\], found \[8, 2\] at a, seed 1, step 0"),
        (np.zeros((3, 1), np.float32), r"found \[3, 1\]"),
        (np.zeros(8, np.float32), r"found \[8\]"),
    ],
)
def test_actions_that_cannot_be_executed_are_named(actions, words):
    class Odd(PointPolicy):
        def infer_batch(self, observations, noise_seeds=None):
            return [ActionChunk(actions=actions) for _ in observations]

    with pytest.raises(BundleError, match=words):
        run([1], policy=Odd())


def test_a_policy_that_loses_an_answer_is_refused():
    class Lossy(PointPolicy):
        def infer_batch(self, observations, noise_seeds=None):
            return super().infer_batch(observations, noise_seeds)[1:]

    with pytest.raises(BundleError, match="3 observations, 2 chunks"):
        run(range(3), policy=Lossy())


@pytest.mark.parametrize(
    ("metadata", "horizon", "words"),
    [
        ({"robot_action_dim": 4}, 4, "robot_action_dim 4, but the task a has 1"),
        ({"state_dim": 7}, 4, "state_dim 7, but the task a has 1"),
        ({"cameras": {"base": "x", "wrist": "y"}}, 4, "needs the camera 'wrist'"),
        ({}, HORIZON + 1, "action_horizon 8, found 9"),
    ],
)
def test_a_policy_of_another_robot_is_refused_before_the_first_step(metadata, horizon, words):
    def fault(at, seed, step):
        assert at != "step"

    with pytest.raises(ConfigError, match=words):
        run([1], fault=fault, policy=PointPolicy(**metadata), settings=RolloutSettings(execution_horizon=horizon))


def test_a_frozen_image_is_the_start_picture_of_another_seed_and_never_changes():
    seed = 3
    results, policy, opened = run([seed], settings=RolloutSettings(execution_horizon=4, observation_change="frozen_image"))
    stranger = PointEnvironment("a")
    stranger.reset(other_seed(seed))
    expected = stranger.observe().images["base"]
    shown = [observation for batch in policy.batches for observation in batch]
    assert len(shown) > 1 and other_seed(seed) != seed
    assert all(np.array_equal(observation.images["base"], expected) for observation in shown)
    assert len({float(observation.state[0]) for observation in shown}) == len(shown), "the state stays live"
    assert opened[0].resets == [other_seed(seed), seed]
    assert results["a", seed].outcome == "failure"


def test_a_swapped_prompt_is_the_next_tasks():
    settings = RolloutSettings(execution_horizon=4, observation_change="swapped_prompt", tasks=("a", "b", "c"))
    _, policy, _ = run([1], environments=3, settings=settings, tasks=("a", "b", "c"))
    assert [observation.prompt for observation in policy.batches[0]] == ["do b", "do c", "do a"]
    with pytest.raises(ConfigError, match="name two or more"):
        RolloutSettings(observation_change="swapped_prompt", tasks=("a",))
    with pytest.raises(ConfigError, match="one of none, frozen_image"):
        RolloutSettings(observation_change="blind")


def test_only_recorded_episodes_have_a_video_with_first_every_second_and_last_picture():
    results, _, _ = run([1, 2], settings=FOUR, film="large")
    for result in results.values():
        assert result.video is not None
        with av.open(io.BytesIO(result.video)) as container:
            frames = sum(1 for _ in container.decode(video=0))
        assert frames == 1 + result.steps // 2 + result.steps % 2
    silent, _, _ = run([1, 2])
    assert all(result.video is None for result in silent.values())
    assert verdicts(silent) == verdicts(results), "filming changes nothing"


def frames_of(result):
    with av.open(io.BytesIO(result.video)) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def test_failures_are_filmed_by_the_pictures_that_the_policy_saw_and_successes_only_where_asked():
    drawn = []

    class Drawn(PointEnvironment):
        def picture(self, height, width):
            drawn.append((self.resets[-1], height, width))
            return super().picture(height, width)

    def films(film):
        drawn.clear()
        batch = BatchedRollout(Drawn, PointPolicy(), FOUR, 3)
        return {result.seed: result for result in run_all([Episode("a", seed, film) for seed in range(12)], batch)}

    failures, every = films("failure"), films("always")
    lost = {seed for seed, result in failures.items() if result.outcome == "failure"}
    assert lost and len(lost) < 12
    assert {seed for seed, result in failures.items() if result.video} == lost
    assert all(result.video for result in every.values()) and sorted(drawn) == [(seed, 8, 8) for seed in range(12)], (
        "the end alone is drawn"
    )
    for seed in lost:
        assert len(frames_of(failures[seed])) == -(-failures[seed].steps // FOUR.execution_horizon) + 1
    assert {key: result.steps for key, result in failures.items()} == {seed: result.steps for seed, result in every.items()}


def test_a_long_or_large_film_is_thinned_evenly_to_a_bound_and_keeps_its_end():
    film = video.VideoFrames()
    for number in range(1000):
        film.add(np.full((240, 320, 3), number % 251, np.uint8))
    film.add(np.full((240, 320, 3), 255, np.uint8), last=True)
    assert video.LONGEST / 2 <= len(film.frames) <= video.LONGEST + 1 and film.every == 16
    assert [frame[0, 0, 0] for frame in film.frames] == [*(number % 251 for number in range(0, 1000, 16)), 255]
    assert film.frames[0].shape == (120, 160, 3) and len(video.encode(film.frames, 10)) < 100_000
