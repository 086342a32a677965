"""Tests of a run's metrics in each tracker's storage, without a network, and of trackers that fail at start or end."""

import importlib.util
import json
import sqlite3

import pytest
from small_runs import start

from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.watch import trackers
from pi0fm.train.watch.metrics import MetricsWriter
from pi0fm_client.errors import ConfigError

CONFIG = {"steps": 40, "flow": {"path": "linear"}, "ema_decay": None}


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No service: what wandb sends it keeps, and both others write to a database."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Parallel(Context(shown=False), allow_cuda=False)  # accelerate's state, which its trackers ask who is first
    return tmp_path / "run"


def logged(output_dir, name: str, first: int = 0) -> None:
    metrics = MetricsWriter(output_dir, first, (name,), CONFIG)
    metrics.write(first + 20, {"loss": 0.5})
    metrics.write(first + 40, {"loss": 0.25})
    metrics.close()


@needs("wandb")
@pytest.mark.timeout(120)
def test_wandb_keeps_an_offline_run_under_one_identity(offline):
    offline.mkdir()
    logged(offline, "wandb")
    logged(offline, "wandb", first=40)
    runs = [path.name.rpartition("-")[2] for path in (offline / "wandb").glob("offline-run-*")]
    assert len(set(runs)) == 1, "a run that goes on is the same run"
    assert all(path.stat().st_size for path in (offline / "wandb").glob("offline-run-*/run-*.wandb"))
    assert not (offline / "tensorboard").exists()


@needs("mlflow")
@pytest.mark.journey
@pytest.mark.timeout(120)
def test_mlflow_has_metrics_and_configuration_in_its_database(offline):
    offline.mkdir()
    logged(offline, "mlflow")
    with sqlite3.connect(offline / "mlflow" / "mlflow.db") as database:
        assert database.execute("select step, value from metrics where key = 'loss' order by step").fetchall() == [(20, 0.5), (40, 0.25)]
        assert dict(database.execute("select key, value from params").fetchall())["flow.path"] == "linear"
        assert database.execute("select name, status from runs").fetchall() == [("run", "FINISHED")]


@needs("trackio")
@pytest.mark.timeout(120)
def test_trackio_has_the_metrics(offline):
    import trackio.utils

    offline.mkdir()
    logged(offline, "trackio")
    (database,) = trackio.utils.TRACKIO_DIR.glob("pi0fm*.db")
    with sqlite3.connect(database) as found:
        rows = [json.loads(row[0]) for row in found.execute("select metrics from metrics where run_name = 'run' order by step").fetchall()]
    assert [row["loss"] for row in rows][-2:] == [0.5, 0.25]


def test_a_word_that_is_no_tracker_is_refused():
    with pytest.raises(ConfigError, match="unknown tracker 'wandbb': did you mean 'wandb'"):
        TrainConfig(tracker=("wandbb",))
    with pytest.raises(ConfigError, match="each once"):
        TrainConfig(tracker=("mlflow", "mlflow"))


def test_a_library_that_is_missing_is_named_before_anything_is_opened(run, monkeypatch):
    monkeypatch.setitem(trackers.LIBRARIES, "mlflow", "no_such_library")
    config = run("missing", tracker=("mlflow",))
    with pytest.raises(ConfigError, match=r"pip install 'pi0fm\[mlflow\]'"):
        start(config)


class Broken:
    """A tracker whose service went away."""

    def __init__(self) -> None:
        self.calls = 0

    def store_init_configuration(self, values) -> None:
        self.told = values

    def log(self, values, step) -> None:
        self.calls += 1
        raise OSError("no route\nto host")

    def finish(self) -> None:
        raise AssertionError("it was dropped")


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    broken = Broken()
    monkeypatch.setattr("pi0fm.train.parallel.accelerate.open_tracker", lambda name, project, arguments: broken)
    metrics = MetricsWriter(tmp_path, 0, ("trackio", "tensorboard"), CONFIG)
    for step in (1, 2):
        metrics.write(step, {"loss": 0.5})
    metrics.close()
    assert broken.calls == 1 and broken.told["flow.path"] == "linear" and broken.told["ema_decay"] == "None"
    assert capsys.readouterr().err == "tracker trackio is dropped, the run goes on: OSError: no route to host\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_cannot_start_is_one_line(monkeypatch, tmp_path):
    def fail(name, project, arguments):
        raise RuntimeError("no API key")

    monkeypatch.setattr("pi0fm.train.parallel.accelerate.open_tracker", fail)
    with pytest.raises(ConfigError, match="RuntimeError: no API key; type WANDB_MODE=offline"):
        MetricsWriter(tmp_path, 0, ("wandb",), CONFIG)


def test_no_tracker_leaves_the_lines_alone(tmp_path):
    metrics = MetricsWriter(tmp_path, 0, ())
    metrics.write(1, {"loss": 0.5})
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
