"""Tests of faults during a run: the run reports the fault, keeps its cause, and loses no earlier result."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_runs import differing, start, weights

from pi0fm.data.loading.loader import Collator
from pi0fm.flow.matching import FlowMatching
from pi0fm.train.checkpoint import checkpoints as checkpoint
from pi0fm.train.watch import faults
from pi0fm.train.watch.faults import NonfiniteError
from pi0fm.train.watch.metrics import MetricsWriter
from pi0fm_client.errors import ConfigError, DatasetError, OutputError

BAD = 4  # the step whose batch is spoilt, counted from 1; the global batch is 8


@pytest.fixture
def spoilt(monkeypatch):
    """The state of one sample of step BAD is not a number."""
    real = Collator.__call__

    def collate(self, first, count):
        batch = real(self, first, count)
        if first // 8 == BAD - 1:
            state = batch.observation.state.clone()
            state[0, 0] = torch.nan
            batch = replace(batch, observation=replace(batch.observation, state=state))
        return batch

    monkeypatch.setattr(Collator, "__call__", collate)


@pytest.mark.usefixtures("spoilt")
def test_a_loss_that_is_not_finite_stops_the_run_with_its_batch_kept(run):
    config = run("run", checkpoint_every=3, micro_batch_size=4)
    with pytest.raises(NonfiniteError) as caught:
        start(config)
    line = str(caught.value)
    place = config.output_dir / f"faults/step-{BAD:09d}"
    assert f"step {BAD}: the loss or its gradient is not finite" in line
    assert "its observation.state are not finite" in line
    assert f"kept in {place}" in line
    assert "correct the data set, or add --resume true --on_nonfinite skip" in line
    assert sorted(path.name for path in place.iterdir()) == [
        "fault.json",
        "worker-00000-part-000.safetensors",
        "worker-00000-part-001.safetensors",
    ]
    kept = load_file(place / "worker-00000-part-000.safetensors")
    assert kept["observation.state"].isnan().nonzero().tolist() == [[0, 0]]
    assert {"actions", "action_mask", "noise", "uniform", "observation.images"} <= kept.keys()
    facts = json.loads((place / "fault.json").read_text())
    assert facts["stream_positions"] == [24, 31]
    assert len(facts["datasets"][0]["episodes"]) == len(facts["datasets"][0]["frames"]) == 8
    assert checkpoint.whole(config.output_dir / "checkpoints") == [3]


@pytest.mark.usefixtures("spoilt")
def test_a_step_that_is_skipped_leaves_a_run_that_is_exact(run, capsys, curve):
    whole = start(run("whole", on_nonfinite="skip", steps=6, checkpoint_every=6))
    assert f"step {BAD}: the loss" in (said := capsys.readouterr().err)
    assert "the step is skipped" in said
    assert all(tensor.isfinite().all() for tensor in weights(whole).values())
    lines = [json.loads(line) for line in (whole.bundle.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "grad_norm" not in line] == [BAD]
    with pytest.raises(NonfiniteError):
        start(run("other", steps=6, checkpoint_every=2))
    found = start(run("other", steps=6, checkpoint_every=2, resume="true", on_nonfinite="skip"))
    assert differing(found, whole) == []


def test_a_loss_that_overflows_while_its_gradient_does_not_is_refused_too(run, monkeypatch):
    real = FlowMatching.loss

    def overflow(self, *arguments):
        total, elements = real(self, *arguments)
        return total + torch.inf, elements

    monkeypatch.setattr(FlowMatching, "loss", overflow)
    with pytest.raises(NonfiniteError, match=r"step 1: .* the network's inputs are finite; .* lower optimizer.learning_rate"):
        start(run("run"))


def test_too_many_skips_in_a_row_stop_the_run(run, monkeypatch):
    monkeypatch.setattr(faults, "SKIPS_IN_A_ROW", 3)
    monkeypatch.setattr(FlowMatching, "loss", lambda self, predicted, *rest: (predicted.sum() * torch.nan, torch.zeros(())))
    with pytest.raises(NonfiniteError, match=r"step 3: .* 3 steps in a row are more than on_nonfinite skip allows"):
        start(run("run", on_nonfinite="skip"))


def test_another_policy_is_refused(run):
    with pytest.raises(ConfigError, match="on_nonfinite must be stop or skip, found 'ignore'"):
        run("run", on_nonfinite="ignore")


def test_an_unreadable_video_is_named_and_what_was_trained_is_kept(run, monkeypatch):
    whole = start(run("whole", steps=6))
    real = Collator.__call__

    def collate(self, first, count):
        if first >= 8 * 4:
            raise DatasetError("video /data/chunk-000/file-007.mp4 cannot be read (EOF); download or record it again")
        return real(self, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", collate)
        with pytest.raises(DatasetError) as caught:
            start(run("broken", steps=6))
    assert "file-007.mp4 cannot be read" in str(caught.value)
    assert "(in step 5; the checkpoint of step 4 holds what was trained; add --resume true)" in str(caught.value)
    found = start(run("broken", steps=6, resume="true"))
    assert differing(found, whole) == []


@pytest.mark.parametrize(
    ("number", "name", "words"),
    [
        (errno.ENOSPC, "metrics.jsonl", r"run/metrics.jsonl: No space left on device; make room on that disk, then add --resume true"),
        (errno.EROFS, "tensorboard", r"Read-only file system; choose a folder .*, then add --resume true"),
    ],
)
def test_a_disk_that_takes_no_more_metrics_is_named(run, monkeypatch, number, name, words):
    config = run("run", steps=2)

    def write(self, step, values):
        raise OSError(number, os.strerror(number), str(config.output_dir / name))

    monkeypatch.setattr(MetricsWriter, "write", write)
    with pytest.raises(OutputError, match=words):
        start(config)


def test_a_file_elsewhere_is_no_fault_of_the_output_folder(tmp_path):
    with pytest.raises(PermissionError), faults.write_faults(tmp_path / "run"):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/set/video.mp4")
