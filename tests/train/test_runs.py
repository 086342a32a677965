"""Tests of the list of runs below a folder: state, curves, differing options; read-only."""

import json
import os
import shlex
import socket
import time

import psutil
import pytest
from small_runs import start

from pi0fm import pages
from pi0fm.cli.main import main
from pi0fm.train import runs
from pi0fm.train.start import lease
from pi0fm_client.errors import ConfigError


def made(folder, steps=100, upto=0, every=20, bundle=False, **config):
    """A run's folder as its files would be after `upto` steps."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"steps": steps, "output_dir": str(folder), **config}))
    lines = [{"step": step, "loss": 4.0 / step, "samples_per_second": 50.0, "seconds_left": 9.0} for step in range(every, upto + 1, every)]
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    if bundle:
        (folder / "bundle").mkdir()
    return folder


def test_states(tmp_path):
    made(tmp_path / "a" / "new")
    made(tmp_path / "a" / "stopped", upto=40)
    made(tmp_path / "finished", upto=100, bundle=True)
    longer = made(tmp_path / "longer", steps=200, upto=100, bundle=True)
    alive = made(tmp_path / "alive", upto=60)
    made(tmp_path / ".hidden" / "run")
    made(tmp_path / "finished" / "inner", upto=20)
    with lease.hold_lease(alive):
        before = {path: path.stat().st_mtime_ns for path in alive.iterdir()}
        found = {run.name.removeprefix(f"{tmp_path}/"): (run.state, run.step) for run in runs.find_runs([tmp_path])}
        assert {path: path.stat().st_mtime_ns for path in alive.iterdir()} == before
    assert found == {
        "a/new": ("not started", 0),
        "a/stopped": ("stopped", 40),
        "alive": ("running", 60),
        "finished": ("finished", 100),
        "longer": ("stopped", 100),
    }
    assert runs.summarize(alive, "alive").state == "stopped", "its lease was given back"
    assert runs.summarize(longer, "longer").json()["loss"] == 0.04


def test_a_run_of_another_machine_lives_while_its_lease_is_beaten(tmp_path):
    folder = made(tmp_path / "far", upto=20)
    (folder / lease.NAME).write_text(json.dumps({"host": "another", "process": 1, "beat": 3}))
    assert lease.is_held(folder)
    long_ago = time.time() - 60
    os.utime(folder / lease.NAME, (long_ago, long_ago))
    assert not lease.is_held(folder)
    dead = {"host": socket.gethostname(), "process": os.getpid(), "created": psutil.Process().create_time() - 1, "beat": 1}
    (folder / lease.NAME).write_text(json.dumps(dead))
    assert not lease.is_held(folder), "another process has its number now"
    (folder / lease.NAME).write_text("{")
    assert not lease.is_held(folder)


def test_a_curve_falls_from_the_highest_block_to_the_lowest():
    assert runs.sparkline([2.0**-step for step in range(8)], 8) == "█▇▆▅▄▃▂▁"
    assert runs.sparkline([4.0] * 3 + [1.0] * 3, 2) == "█▁"
    assert runs.sparkline([-1.0, 1.0], 8) == "▁█"
    assert runs.sparkline([1.0], 8) == "▁"
    assert runs.sparkline([], 8) == ""
    assert len(runs.sparkline([float(step + 1) for step in range(1000)], 32)) == 32


def test_options_that_differ(tmp_path):
    first = made(tmp_path / "a", seed=1, optimizer={"learning_rate": 1e-3, "warmup_steps": 5})
    second = made(tmp_path / "b", seed=1, optimizer={"learning_rate": 2e-3, "warmup_steps": 5}, tracker=["wandb"])
    assert runs.differences([runs.summarize(first, "a"), runs.summarize(second, "b")]) == {
        "optimizer.learning_rate": ["0.001", "0.002"],
        "tracker": ["", "['wandb']"],
    }


def test_a_real_run_is_shown_and_compared_on_a_page(run, tmp_path, capsys):
    start(run("real"))
    made(tmp_path / "<b>", steps=30, upto=20)
    page = tmp_path / "new" / "runs.html"
    capsys.readouterr()
    assert main(shlex.split(f"runs '{tmp_path / 'real'}' '{tmp_path / '<b>'}' --page '{page}'")) == 0
    shown = capsys.readouterr()
    last = json.loads(shown.out)
    real = last[str(tmp_path / "real")]
    assert (real["state"], real["step"], real["steps"], real["seconds_left"]) == ("finished", 10, 10, 0.0)
    assert real["samples_per_second"] > 0 and 0 < real["memory_gib"] < 64 and "share_of_peak" not in real
    assert "finished" in shown.err and any(block in shown.err for block in runs.SPARK_BLOCKS)
    text = page.read_text()
    assert "&lt;b&gt;" in text and "<b>" not in text.replace("&lt;b&gt;", "")
    assert "data:image/png;base64," in text and "http" not in text.replace("http-equiv", "")
    assert "steps</td><td>30</td><td>10</td>" in text or "steps</td><td>10</td><td>30</td>" in text


def test_a_figure_of_several_charts_names_each_curve_once():
    figure, axes = pages.panels(2)
    for axis, name in ((axes[0], "a"), (axes[1], "a"), (axes[1], "b")):
        axis.plot([0, 1], [0, 1], label=name)
    pages.legend(figure, loc="outside lower left")
    pages.legend(axes[1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["a", "b"]


def test_a_run_that_is_not_readable_hides_no_other(tmp_path, capsys):
    for name, record in (("broken", ""), ("good", '{"steps": 5}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(record)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert list(json.loads(shown.out)) == [str(tmp_path / "good")]
    assert "broken/run.json must be what pi0fm train writes" in " ".join(shown.err.split())


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "run.json").write_text("[]")
    for words, line in (
        ([str(tmp_path / "none")], "runs are looked for in folders"),
        ([str(tmp_path)], "must be what pi0fm train writes"),
        ([str(tmp_path), "--page", "a.png"], "page must be an HTML file"),
    ):
        assert main(["runs", *words]) == 2
        assert line in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="found none in"):
        runs.find_runs([tmp_path / "empty"])
