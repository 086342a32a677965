"""Tests of held-out episodes: spread over tasks, a function of the seed, absent from training."""

from dataclasses import replace

import numpy as np
import pytest

from pi0fm.data.columns import held_out
from pi0fm.data.columns.norm_stats import compute_norm_stats
from pi0fm_client.errors import ConfigError

TASK_OF_EPISODE = np.array([0, 1, 2, 0, 0, 1, 2, 0, 2])  # four, two and three episodes
FRAMES = 3  # of each


@pytest.fixture
def source(memory_source):
    """Nine episodes of three tasks, of three frames each."""
    total = FRAMES * len(TASK_OF_EPISODE)
    episode = np.repeat(np.arange(len(TASK_OF_EPISODE)), FRAMES)
    random = np.random.default_rng(3)
    return replace(
        memory_source,
        state=random.normal(size=(total, 3)).astype(np.float32),
        action=random.normal(size=(total, 2)).astype(np.float32),
        episode=episode,
        task=TASK_OF_EPISODE[episode],
        end=(episode + 1) * FRAMES,
        frames=np.arange(total),
        tasks=("a", "b", "c"),
    )


@pytest.mark.parametrize("seed", range(5))
def test_tasks_give_in_turn_and_keep_one_episode(source, seed):
    for count, expected in ((0, [0, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (5, [2, 1, 2]), (6, [3, 1, 2])):
        chosen = held_out.choose_held_out(source, count, seed)
        assert np.bincount(TASK_OF_EPISODE[list(chosen)], minlength=3).tolist() == expected
        assert list(chosen) == sorted(set(chosen))


def test_a_function_of_the_seed_that_grows_with_the_number(source):
    choices = {seed: held_out.choose_held_out(source, 3, seed) for seed in range(8)}
    assert choices == {seed: held_out.choose_held_out(source, 3, seed) for seed in range(8)}
    assert len(set(choices.values())) > 3
    for count in range(6):
        assert set(held_out.choose_held_out(source, count, 1)) < set(held_out.choose_held_out(source, count + 1, 1))


@pytest.mark.parametrize("count", [7, 9, 100, -1])
def test_no_task_is_left_without_an_episode(source, count):
    with pytest.raises(ConfigError, match=f"0 to 6 of these 9 episodes of 3 tasks.*found {count}; type --validation.episodes 6"):
        held_out.choose_held_out(source, count, 0)


def test_only_what_the_run_would_train_on_is_held_out(source):
    chosen = replace(source, frames=np.flatnonzero(np.isin(source.episode, (0, 3, 4, 5))))
    for seed in range(6):
        assert set(held_out.choose_held_out(chosen, 2, seed)) <= {0, 3, 4}, "5 is the one episode of its task"
    with pytest.raises(ConfigError, match="0 to 2 of these 4 episodes of 2 tasks"):
        held_out.choose_held_out(chosen, 3, 0)


def test_the_two_halves_share_nothing_and_the_statistics_are_of_the_first(source):
    training, unseen = held_out.split(source, (1, 4))
    assert sorted([*training.frames, *unseen.frames]) == source.frames.tolist()
    assert set(source.episode[unseen.frames]) == {1, 4}
    kept = ~np.isin(source.episode, (1, 4))
    ends = np.repeat(np.arange(1, 8) * FRAMES, FRAMES)
    expected = compute_norm_stats(source.state[kept], source.action[kept], ends, (), 4)
    assert training.norm_stats(4).to_json() == expected.to_json()
    whole, nothing = held_out.split(source, ())
    assert whole.frames.tolist() == source.frames.tolist()
    assert len(nothing.frames) == 0
