"""Tests of resuming: exact after a stop; another data set or configuration is refused with the difference."""

import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import ALONE, differing, start

from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.train import data, loop
from pi0fm.train.checkpoint import checkpoints as checkpoint
from pi0fm.train.checkpoint.facts import data_facts
from pi0fm.train.loop import train
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.start.output import claim
from pi0fm.train.watch import signals
from pi0fm.train.watch.requests import RunRequest, write_request
from pi0fm_client.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def whole(configure, tmp_path_factory) -> loop.TrainResult:
    """Six steps without a break."""
    return start(configure(tmp_path_factory.mktemp("runs") / "whole", steps=6))


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGTERM, signals.TerminatedError, 143), (signal.SIGINT, signals.StoppedError, 130)]
)
def test_a_signal_saves_after_its_step_and_leaves(run, whole, number, error, code):
    before = signal.getsignal(number)
    with pytest.raises(error, match=r"after step 3 of 6, with a checkpoint; add --resume true to go on") as caught:
        with_signal(run, number)
    assert type(caught.value) is error
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert checkpoint.whole(run("run").output_dir / "checkpoints") == [3]
    assert differing(start(run("run", steps=6, resume="true")), whole) == []


def with_signal(run, number):
    real, calls = loop.train_step, iter(range(2))

    def acting(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), number)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", acting)
        start(run("run", steps=6))


def test_a_stop_file_asks_where_no_signal_arrives(run, whole, monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_BETWEEN_LOOKS", 0.0)
    config = run("run", steps=6)
    claim(config)
    write_request(config.output_dir, RunRequest.STOP)
    outcome = []

    def in_a_thread():
        try:
            train(ALONE, config)
        except signals.TerminatedError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join(30)
    assert len(outcome) == 1
    assert "after step 1 of 6" in outcome[0]
    assert differing(start(run("run", steps=6, resume="true")), whole) == []


def test_a_save_file_asks_for_a_checkpoint_and_nothing_else(run, whole, monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_BETWEEN_LOOKS", 0.0)
    config = run("run", steps=6, checkpoint_every=100)
    claim(config)
    asked = write_request(config.output_dir, RunRequest.SAVE)
    result = train(ALONE, config)
    assert not asked.exists()
    assert checkpoint.whole(config.checkpoint_place) == [1, 6]
    assert differing(result, whole) == []


def test_a_move_file_asks_to_leave_and_is_gone_with_the_run(run, whole, monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_BETWEEN_LOOKS", 0.0)
    config = run("run", steps=6)
    claim(config)
    asked = write_request(config.output_dir, RunRequest.MOVE)
    with pytest.raises(signals.MovedError, match="left after step 1 of 6 for a node that goes away, with a checkpoint"):
        train(ALONE, config)
    assert not asked.exists()
    assert differing(start(run("run", steps=6, resume="true")), whole) == []


def test_a_second_signal_interrupts_at_once(tmp_path):
    with signals.StopSignals(Parallel(ALONE), tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.after_step() is RunRequest.INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def copied(tiny_root: Path, place: Path) -> Path:
    return Path(shutil.copytree(tiny_root, place))


def test_a_data_set_that_moved_is_the_same_and_one_that_grew_is_not(run, tiny_root, tmp_path):
    def facts(root: Path, **change):
        config = run("any")
        source = open_source(replace(config.dataset, root=root, **change), config.embodiment)
        return data_facts(source, source.norm_stats(4))

    here = facts(tiny_root)
    assert facts(copied(tiny_root, tmp_path / "elsewhere")) == here
    fewer = facts(tiny_root, episodes=(0, 2))
    assert {name for name in here if here[name] != fewer[name]} >= {"frames", "episodes", "columns"}


def test_a_changed_data_set_is_refused_with_what_differs(run, tiny_root, tmp_path, monkeypatch, capsys):
    start(run("run", steps=2))
    real = data.open_source

    def changed(*arguments):
        source = real(*arguments)
        action = source.action.copy()
        action[3, 0] += np.float32(1e-3)
        return replace(source, action=action)

    monkeypatch.setattr(data, "open_source", changed)
    with pytest.raises(DatasetError, match=r"is not the one that .* was trained on: columns was \w+, now \w+; .* --resume_changed true"):
        start(run("run", steps=4, resume="true"))
    capsys.readouterr()
    start(run("run", steps=4, resume="true", resume_changed=True))
    assert "the run goes on with changes: columns was" in capsys.readouterr().err


def test_a_changed_option_is_refused_unless_told(run, capsys):
    start(run("run", steps=2))
    other = {"steps": 4, "resume": "true", "ema_decay": 0.8}
    with pytest.raises(ConfigError, match=r"ema_decay was 0.9, now 0.8; .* or add --resume_changed true"):
        start(run("run", **other))
    start(run("run", **other, resume_changed=True))
    assert "the run goes on with changes: ema_decay was 0.9, now 0.8" in capsys.readouterr().err


def test_checkpoints_elsewhere_hold_their_run_too(run, tmp_path, whole):
    """On a machine that has nothing of the run but its checkpoints, another configuration is refused and the same one goes on."""
    place = str(tmp_path / "far")
    with pytest.raises(signals.TerminatedError):
        with_signal(lambda name, **change: run(name, checkpoint_dir=place, **change), signal.SIGTERM)
    assert checkpoint.whole(place) == [3]
    assert not (run("run").output_dir / "checkpoints").exists()
    with pytest.raises(ConfigError, match="seed was 0, now 9"):
        start(run("new", steps=6, checkpoint_dir=place, resume="true", seed=9))
    with pytest.raises(Exception, match="holds checkpoints of a run; add --resume true"):
        start(run("newer", steps=6, checkpoint_dir=place))
    assert differing(start(run("newest", steps=6, checkpoint_dir=place, resume="true")), whole) == []
