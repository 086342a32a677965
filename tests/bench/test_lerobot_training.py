"""LeRobot's training loop under a budget of processor time."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.random_utils import seeded_context

from pi0fm.bench import lerobot_training
from pi0fm.bench.budget import TrainingPlan
from pi0fm.bench.lerobot_pi0 import RobotFeatures, ShrunkPI0, ShrunkSize, image_key, policy_config, processors
from pi0fm.bench.lerobot_training import dataset_source, open_dataset, train_lerobot

SIZE = ShrunkSize(
    vision_width=32, vision_depth=1, vision_heads=2, vision_mlp=32, patch_size=12, image_size=24, width=32, mlp=48, expert_width=16,
    expert_mlp=32, depth=2, head_dim=4, prompt_tokens=16, action_dim=6, state_dim=5, action_horizon=4,
)  # fmt: skip
ROBOT = RobotFeatures(cameras=("front",), state_dim=4, action_dim=3)
STATS = {"observation.state": {"mean": torch.zeros(4), "std": torch.ones(4)}, "action": {"mean": torch.zeros(3), "std": torch.ones(3)}}


def source(step: int) -> dict:
    """Another batch at every step; the action is the state's first numbers, which can be learnt."""
    generator = torch.Generator().manual_seed(step)
    state = torch.randn(8, 4, generator=generator)
    return {
        image_key("front"): torch.randint(0, 256, (8, 3, 24, 24), dtype=torch.uint8, generator=generator),
        "observation.state": state,
        "action": state[:, None, :3].expand(8, 4, 3).clone(),
        "action_is_pad": torch.zeros(8, 4, dtype=torch.bool),
        "task": ["press"] * 8,
    }


class OneProcess:
    """What accelerate does on one process in float32."""

    def autocast(self):
        return nullcontext()

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, norm):
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def unwrap_model(self, model, keep_fp32_wrapper):
        return model


def lerobots_own_losses(plan: TrainingPlan) -> list[float]:
    """The same run with LeRobot's `update_policy` in the place of ours."""
    with seeded_context(plan.seed):
        config = policy_config(SIZE, ROBOT, plan.learning_rate)
        policy = ShrunkPI0(config, SIZE)
        before, _ = processors(config, STATS)
        optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
        scheduler = config.get_scheduler_preset().build(optimizer, plan.max_steps)
        meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
        losses = []
        for step in range(plan.max_steps):
            tracker = MetricsTracker(8, 8, 1, dict(meters))
            raw = source(step)
            raw[image_key("front")] = raw[image_key("front")].to(dtype=torch.float32) / 255.0
            _, parts = update_policy(tracker, policy, before(raw), optimizer, 1.0, OneProcess(), lr_scheduler=scheduler)
            losses.append(parts["loss"])
    return losses


def test_losses_are_those_of_lerobots_own_update():
    plan = TrainingPlan(cpu_seconds=600, seed=3, max_steps=35)  # 35 steps: LeRobot's scaled warm-up is one step long
    trained = train_lerobot(SIZE, ROBOT, STATS, source, plan)
    assert list(trained.result.losses) == lerobots_own_losses(plan)
    assert (trained.result.steps, trained.result.samples, trained.result.scheduled_steps) == (35, 280, 35)


def test_training_learns_and_leaves_the_callers_randomness_alone():
    """Every action is 2: the loss of a network that knows nothing is 1 + 4, of one that knows the mean about 1."""

    def constant(step: int) -> dict:
        return {**source(step), "action": torch.full((8, 4, 3), 2.0)}

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    result = train_lerobot(SIZE, ROBOT, STATS, constant, TrainingPlan(cpu_seconds=600, learning_rate=1e-2, max_steps=40)).result
    assert torch.equal(torch.rand(1), expected)
    assert np.mean(result.losses[:2]) > 4
    assert np.mean(result.losses[-5:]) < 2


def test_calibration_does_not_change_the_run(monkeypatch):
    monkeypatch.setattr(lerobot_training, "steps_in_budget", lambda *_: torch.randn(7).numel())
    drawn = train_lerobot(SIZE, ROBOT, STATS, source, TrainingPlan(cpu_seconds=1e-9, seed=4)).result
    plain = train_lerobot(SIZE, ROBOT, STATS, source, TrainingPlan(cpu_seconds=600, seed=4, max_steps=1)).result
    assert drawn.losses == plain.losses


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two episodes of five frames with pictures in parquet, the fastest to write."""
    features = {
        image_key("front"): {"dtype": "image", "shape": (24, 24, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (3,), "names": None},
    }
    root = tmp_path_factory.mktemp("lerobot") / "data"
    dataset = LeRobotDataset.create("local/tiny", fps=10, features=features, root=root, use_videos=False)
    generator = np.random.default_rng(0)
    for episode in range(2):
        for frame in range(5):
            picture = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            state = np.full(4, episode, dtype=np.float32)
            dataset.add_frame(
                {image_key("front"): picture, "observation.state": state, "action": np.full(3, frame, dtype=np.float32), "task": "press"}
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def test_dataset_source_gives_every_frame_once_an_epoch_with_its_chunk(recorded):
    dataset = open_dataset("local/tiny", recorded, policy_config(SIZE, ROBOT))
    next_batch = dataset_source(dataset, batch_size=5, seed=0, num_workers=0)
    epoch = [next_batch(0), next_batch(1)]
    assert sorted(torch.cat([batch["index"] for batch in epoch]).tolist()) == list(range(10))
    assert (
        torch.cat([batch["index"] for batch in (next_batch(2), next_batch(3))]).tolist()
        != torch.cat([batch["index"] for batch in epoch]).tolist()
    )
    for batch in epoch:
        frames = batch["frame_index"][:, None] + torch.arange(SIZE.action_horizon)
        assert torch.equal(batch["action"][:, :, 0], frames.clamp(max=4).float())  # the last action is repeated past the end
        assert torch.equal(batch["action_is_pad"], frames > 4)


def test_training_runs_on_a_lerobot_dataset(recorded):
    dataset = open_dataset("local/tiny", recorded, policy_config(SIZE, ROBOT))
    next_batch = dataset_source(dataset, batch_size=5, seed=0, num_workers=0)
    result = train_lerobot(SIZE, ROBOT, dataset.meta.stats, next_batch, TrainingPlan(cpu_seconds=600, max_steps=2)).result
    assert result.samples == 10
    assert np.isfinite(result.losses).all()
