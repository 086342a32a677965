import numpy as np
import pytest
from numpy.typing import NDArray

from pi0fm.demos.demonstration import noise_at, record_demonstration
from pi0fm.sim.environment import CameraSpec, Environment, StepResult
from pi0fm_client.types import Observation


class Counting(Environment):
    """Succeeds after `length` steps; keeps what was executed."""

    task, prompt, fps, action_dim, state_dim, max_steps = "count", "count", 80, 4, 4, 10
    cameras = (CameraSpec("base", "any", 8, 8),)

    def __init__(self, length: int) -> None:
        self.length = length
        self.executed: list[NDArray[np.float32]] = []

    def reset(self, seed: int) -> None:
        self.executed = []

    def step(self, action: NDArray[np.float32]) -> StepResult:
        self.executed.append(action)
        success = len(self.executed) == self.length
        return StepResult(success, success or len(self.executed) == self.max_steps)

    def observe(self) -> Observation:
        return Observation({"base": self.picture(8, 8)}, np.full(4, len(self.executed), np.float32), self.prompt)

    def picture(self, height: int, width: int) -> NDArray[np.uint8]:
        return np.full((height, width, 3), len(self.executed), np.uint8)

    def expert_action(self) -> NDArray[np.float32]:
        return np.array([0.9, -0.9, 0.0, 1.0], np.float32)

    def close(self) -> None:
        pass


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
