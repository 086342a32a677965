"""LeRobot's PI0 as a pi0fm Policy."""

import numpy as np
import pytest
import torch

from pi0fm.bench.budget import TrainingResult
from pi0fm.bench.lerobot_pi0 import RobotFeatures, ShrunkPI0, ShrunkSize, image_key, policy_config, processors
from pi0fm.bench.lerobot_policy import LeRobotPolicy
from pi0fm.bench.lerobot_training import TrainedPolicy
from pi0fm_client.errors import ObservationError
from pi0fm_client.types import Observation, Policy

SIZE = ShrunkSize(
    vision_width=32, vision_depth=1, vision_heads=2, vision_mlp=32, patch_size=12, image_size=24, width=32, mlp=48, expert_width=16,
    expert_mlp=32, depth=2, head_dim=4, prompt_tokens=16, action_dim=6, state_dim=5, action_horizon=4,
)  # fmt: skip
ROBOT = RobotFeatures(cameras=("front", "wrist"), state_dim=4, action_dim=3)
MEAN, STD = torch.tensor([100.0, 0, -100]), torch.tensor([1.0, 2, 3])
STATS = {"observation.state": {"mean": torch.zeros(4), "std": torch.ones(4)}, "action": {"mean": MEAN, "std": STD}}


@pytest.fixture(scope="module")
def trained() -> TrainedPolicy:
    torch.manual_seed(0)
    config = policy_config(SIZE, ROBOT)
    return TrainedPolicy(ShrunkPI0(config, SIZE), processors(config, STATS), ROBOT, TrainingResult(0, 0, 0, 0.0, (), ()))


@pytest.fixture
def policy(trained) -> Policy:
    return LeRobotPolicy(trained)


def observation(seed: int = 0, size: int = 24) -> Observation:
    generator = np.random.default_rng(seed)
    images = {name: generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in ROBOT.cameras}
    return Observation(images, generator.standard_normal(4).astype(np.float32), "press")


def test_chunk_is_lerobots_prediction_in_robot_units(policy, trained):
    seen = observation()
    chunk = policy.infer_batch([seen], noise_seeds=[9])[0]
    noise = torch.randn(1, SIZE.action_horizon, SIZE.action_dim, generator=torch.Generator().manual_seed(9))
    batch = {
        image_key(name): torch.tensor(picture / 255.0, dtype=torch.float32).permute(2, 0, 1)[None] for name, picture in seen.images.items()
    }
    batch |= {"observation.state": torch.tensor(seen.state)[None], "task": ["press"]}
    expected = trained.policy.predict_action_chunk(trained.processors[0](batch), noise=noise)[0] * STD + MEAN
    assert chunk.actions.dtype == np.float32
    assert chunk.actions.shape == (SIZE.action_horizon, ROBOT.action_dim)
    np.testing.assert_allclose(chunk.actions, expected.numpy(), rtol=1e-5)
    assert chunk.timings["infer_ms"] > 0


def test_seed_fixes_the_chunk_whatever_the_company(policy):
    alone = policy.infer_batch([observation(1)], noise_seeds=[4])[0].actions
    beside = policy.infer_batch([observation(2), observation(1)], noise_seeds=[3, 4])[1].actions
    other = policy.infer_batch([observation(1)], noise_seeds=[5])[0].actions
    np.testing.assert_allclose(alone, beside, rtol=1e-4, atol=1e-4)
    assert not np.allclose(alone, other, atol=1e-2)


def test_without_seeds_the_noise_is_fresh(policy):
    first, second = (policy.infer_batch([observation()])[0].actions for _ in range(2))
    assert not np.allclose(first, second, atol=1e-2)


def test_every_input_matters(policy):
    seen = observation()
    base = policy.infer_batch([seen], noise_seeds=[0])[0].actions
    dark = {**seen.images, "wrist": np.zeros((24, 24, 3), np.uint8)}
    for changed in (
        Observation(dark, seen.state, "press"),
        Observation(seen.images, seen.state + 1, "press"),
        Observation(seen.images, seen.state, "open"),
    ):
        assert not np.array_equal(policy.infer_batch([changed], noise_seeds=[0])[0].actions, base)


def test_pictures_of_another_size_are_resized_by_lerobot(policy):
    assert policy.infer_batch([observation(size=40)], noise_seeds=[0])[0].actions.shape == (4, 3)


def test_metadata_and_empty_batch(policy):
    assert policy.metadata["action_horizon"] == 4
    assert policy.metadata["robot_action_dim"] == 3
    assert policy.metadata["cameras"]["wrist"] == "observation.images.wrist"
    assert policy.infer_batch([]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": {"front": np.zeros((24, 24, 3), np.uint8)}}, "wrist"),
        ({"images": {name: np.zeros((24, 24), np.uint8) for name in ROBOT.cameras}}, "uint8"),
        ({"state": np.zeros(5, np.float32)}, "4 numbers"),
    ],
)
def test_wrong_observations_are_refused(policy, change, words):
    seen = observation()
    wrong = Observation(change.get("images", seen.images), change.get("state", seen.state), seen.prompt)
    with pytest.raises(ObservationError, match=words):
        policy.infer_batch([wrong])


def test_seeds_must_match(policy):
    with pytest.raises(ObservationError, match="2 for 1"):
        policy.infer_batch([observation()], noise_seeds=[1, 2])
