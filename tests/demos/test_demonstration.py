import numpy as np
import pytest
from eval_fakes import FakeEnvironment

from pi0fm.demos.demonstration import noise_at, record_demonstration


class Counting(FakeEnvironment):
    """Succeeds after `length` steps."""

    def __init__(self, length: int) -> None:
        super().__init__("count")
        self.length = length

    def succeeds(self) -> bool:
        return len(self.executed) == self.length

    def expert_action(self) -> np.ndarray:
        return np.array([0.9, -0.9, 0.0, 1.0], np.float32)


def test_the_clean_action_is_stored_and_the_noisy_one_executed() -> None:
    environment = Counting(6)
    episode = record_demonstration(environment, seed=4, noise=0.3)
    assert episode is not None
    assert (episode.action == environment.expert_action()).all()
    expected = [np.clip(environment.expert_action() + 0.3 * noise_at(4, step, 4), -1, 1) for step in range(6)]
    assert np.allclose(environment.executed, expected)
    assert np.abs(environment.executed).max() <= 1
    assert not np.allclose(environment.executed, episode.action)


def test_row_t_is_what_was_seen_before_step_t() -> None:
    episode = record_demonstration(Counting(6), seed=4, noise=0.0)
    assert episode is not None
    assert episode.state[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert episode.images["base"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert episode.images["base"].shape == (6, 8, 8, 3)


def test_a_failure_is_none() -> None:
    assert record_demonstration(Counting(11), seed=4, noise=0.3) is None


def test_noise_is_a_function_of_seed_and_step() -> None:
    draws = np.array([noise_at(seed, step, 4) for seed in range(50) for step in range(50)])
    assert np.array_equal(noise_at(7, 9, 4), draws[7 * 50 + 9])
    assert len(np.unique(draws.round(6), axis=0)) == 2500
    assert draws.mean() == pytest.approx(0, abs=4 / 100)  # four standard errors of 10 000 draws
    assert draws.std() == pytest.approx(1, abs=0.03)
