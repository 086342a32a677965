"""Tests of whole runs: resumed = uninterrupted, the same curve for any micro batch, and a decreasing loss."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_dataset
import torch
from small_runs import differing, start, start_and_die, weights

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.policy.load_options import HARD_PREFIX
from pi0fm.policy.saved import bundle, reference
from pi0fm.train import loop
from pi0fm.train.checkpoint import checkpoints as checkpoint
from pi0fm.train.components import RtcConfig
from pi0fm.train.watch.metrics import read_last
from pi0fm_client.errors import OutputError
from pi0fm_client.types import ActionPrefix, Observation


@pytest.fixture(scope="module")
def whole(configure, tmp_path_factory) -> loop.TrainResult:
    """Ten steps without a break; its folder is not to be changed."""
    return start(configure(tmp_path_factory.mktemp("runs") / "whole"))


def test_a_resumed_run_is_the_uninterrupted_one(run, curve, whole):
    """Bit by bit: weights, average and curve. It died after two steps that no checkpoint holds."""
    broken = run("broken")
    start_and_die(broken, 7)
    assert len(curve(broken.output_dir)) == 7
    found = start(run("broken", resume="true"))
    assert differing(found, whole) == []
    assert curve(broken.output_dir) == curve(whole.bundle.parent)
    assert found.loss == whole.loss
    assert checkpoint.whole(broken.output_dir / "checkpoints") == [5, 10]


def test_a_torn_checkpoint_costs_its_steps_only(run, curve, whole, capsys):
    broken = run("broken", checkpoint_every=3)
    start_and_die(broken, 8)
    (broken.output_dir / "checkpoints/step-000000006" / checkpoint.COMMIT).unlink()
    found = start(run("broken", checkpoint_every=3, resume="true"))
    assert "is torn" in capsys.readouterr().err
    assert differing(found, whole) == []
    assert curve(broken.output_dir) == curve(whole.bundle.parent)


def test_the_same_seed_is_the_same_run_and_another_is_not(run):
    first, second, third = (start(run(name, steps=3, seed=seed)) for name, seed in (("a", 4), ("b", 4), ("c", 5)))
    assert differing(second, first) == []
    assert first.loss == second.loss != third.loss


def test_micro_batches_change_nothing(run, curve, whole):
    start(run("split", micro_batch_size=2))
    for ours, theirs in zip(curve(run("split").output_dir), curve(whole.bundle.parent), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_a_run_for_real_time_chunking_leaves_a_policy_that_holds_rows(run, curve):
    """Its curve is the same for any micro batch; its bundle replays its recorded chunk and serves hard_prefix."""
    found = start(run("held", steps=3, rtc=RtcConfig(2)))
    start(run("split", steps=3, rtc=RtcConfig(2), micro_batch_size=2))
    for ours, theirs in zip(curve(run("split").output_dir), curve(found.bundle.parent), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    policy, recorded = bundle.load(found.bundle, device="cpu", guidance=HARD_PREFIX), reference.read(found.bundle)
    assert reference.compare(policy, recorded).agrees and policy.metadata["rtc_max_delay"] == 2
    rows = recorded.actions[:3] + 1
    assert np.array_equal(policy.infer_batch([recorded.observation], [1], prefixes=[ActionPrefix(rows, 2)])[0].actions[:2], rows[:2])


@pytest.mark.usefixtures("shapes_unchecked")
def test_the_loss_of_a_small_data_set_goes_down(run, curve):
    config = run(
        "learns",
        steps=80,
        checkpoint_every=80,
        dataset=replace(run("learns").dataset, episodes=(2,)),
    )
    start(config)
    lines = curve(config.output_dir)
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    assert np.isfinite([line["grad_norm"] for line in lines]).all()
    assert max(line["learning_rate"] for line in lines) == pytest.approx(2e-3)


def test_the_bundle_holds_the_average_and_the_facts(run, tiny_root):
    config = run("facts", steps=2)
    result = start(config)
    policy, stats = bundle.read(result.bundle)
    assert policy.training["steps"] == "2"
    assert policy.demonstration_seeds == {"press the button": [100, 102], "open_the drawer ": [101, 101]}
    assert policy.embodiment.dims() == (4, 3)
    assert policy.fps == 10
    assert stats.num_frames == 28
    without = start(run("live", steps=2, ema_decay=None))
    different = [name for name, tensor in weights(without).items() if not torch.equal(weights(result)[name], tensor)]
    assert "action_out.weight" in different
    assert bundle.load(result.bundle, device="cpu").infer_batch([]) == []


def test_a_pi05_with_two_cameras_trains_too(run):
    """State in the prompt, time in the norms, quantiles, differences: from the data set to a chunk."""
    network = tiny_dataset.NETWORK | {"state_input": "prompt", "time_conditioning": "adaptive_norm", "max_prompt_tokens": 80}
    result = start(run("pi05", steps=2, model=network, normalization="quantile", embodiment=Embodiment(delta_actions=(2,))))
    assert np.isfinite(result.loss)
    policy = bundle.load(result.bundle, device="cpu")
    images = {"base": np.zeros((48, 64, 3), np.uint8), "wrist": np.zeros((32, 32, 3), np.uint8)}
    assert policy.infer_batch([Observation(images, np.zeros(4, np.float32), "press the button")])[0].actions.shape == (4, 3)


def test_a_finished_run_goes_on_for_more_steps_and_keeps_its_bundle(run):
    first = start(run("run", steps=2))
    old = first.bundle.with_name("old")
    shutil.copytree(first.bundle, old)
    second = start(run("run", steps=4, resume="true"))
    assert second.steps == 4
    assert bundle.read(second.bundle)[0].training["steps"] == "4"
    assert differing(second.bundle.with_name("bundle-2"), old) == []


def test_an_older_bundle_that_is_damaged_does_not_stop_a_run(run):
    first = start(run("run", steps=2))
    (first.bundle / "norm_stats.json").unlink()
    second = start(run("run", steps=3, resume="true"))
    assert bundle.read(second.bundle)[0].training["steps"] == "3"
    assert (second.bundle.with_name("bundle-unreadable") / "model.safetensors").is_file()


def test_a_finished_run_resumed_says_its_last_loss(run):
    first = start(run("run", steps=2))
    again = start(run("run", steps=2, resume="true"))
    assert again.loss == first.loss
    json.dumps({"loss": again.loss}, allow_nan=False)


def test_a_checkpoint_beyond_the_steps_is_refused(run):
    start(run("run", steps=3))
    with pytest.raises(OutputError, match="checkpoint of step 3, beyond steps 2; raise --steps"):
        start(run("run", steps=2, resume="true"))


def test_metrics_are_whole_lines(run, tmp_path):
    config = run("run", steps=5, log_every=2)
    start(config)
    path = config.output_dir / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]
    assert list((config.output_dir / "tensorboard").iterdir())
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert read_last(config.output_dir)["step"] == 5
    assert read_last(tmp_path / "missing") is None


@pytest.mark.parametrize("broken", [b"\xff\xfe{", b'{"step": Infinity, "loss": 1.0}', b"[" * 100_000, b'{"step": 3, "lo'])
def test_a_broken_line_of_metrics_is_dropped_at_a_resume(run, curve, whole, broken):
    config = run("broken", steps=10)
    start_and_die(config, 7)
    with (config.output_dir / "metrics.jsonl").open("ab") as file:
        file.write(broken)
    start(run("broken", resume="true"))
    assert curve(config.output_dir) == curve(whole.bundle.parent)


def test_tensorboard_shows_the_steps_that_count(
    run,
):
    """Those of a resumed run, once each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start_and_die(run("run", steps=6, checkpoint_every=3), 5)
    config = run("run", steps=6, checkpoint_every=3, resume="true")
    start(config)
    board = EventAccumulator(str(config.output_dir / "tensorboard"))
    board.Reload()
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
