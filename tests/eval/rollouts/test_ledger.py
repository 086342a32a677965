"""Tests of the assignment of episodes to workers, the second try, and the verdict."""

from pi0fm.eval.rollouts.episode import Episode, EpisodeResult
from pi0fm.eval.rollouts.ledger import Ledger

EPISODES = [Episode(task, seed) for task in ("a", "b") for seed in range(1, 7)]


def success(episode):
    return EpisodeResult(episode.task, episode.seed, "success", 1, 0.0)


def test_the_ledger_hands_out_each_episode_once_and_fills_workers():
    ledger = Ledger(EPISODES)
    first, second = ledger.assign(0, 5), ledger.assign(1, 5)
    assert first + second == EPISODES[:10]
    assert ledger.assign(0, 5) == []
    ledger.complete(0, [success(first[0])])
    assert ledger.assign(0, 5) == [EPISODES[10]]
    assert (ledger.assigned(0), ledger.assigned(1), ledger.assigned(2)) == (5, 5, 0)


def test_a_dead_workers_episodes_are_tried_once_more_alone_then_crash():
    ledger = Ledger(EPISODES[:4])
    ledger.assign(0, 2)
    ledger.assign(1, 1)
    assert ledger.worker_died(0, "gone") == []
    # The fresh one first; then one second try at a time, for a worker that holds nothing.
    assert ledger.assign(0, 2) == [EPISODES[3]]
    assert ledger.assign(1, 1) == []
    ledger.complete(0, [success(EPISODES[3])])
    assert ledger.assign(0, 2) == [EPISODES[0]]
    assert ledger.assign(0, 2) == []
    (crash,) = ledger.worker_died(0, "gone again")
    assert (crash.task, crash.seed, crash.outcome, crash.error) == ("a", 1, "crash", "its worker died twice: gone again")
    assert ledger.assign(0, 2) == [EPISODES[1]]
    ledger.complete(0, [success(EPISODES[1])])
    assert ledger.assign(0, 2) == []
    assert ledger.assigned(0) == 0
