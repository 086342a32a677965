"""Tests of `pi0fm profile`: times, operations and advice of a small run on a CPU."""

import json
import time

import pytest
import recorded_curve
import tiny_dataset
import torch
import yaml

from pi0fm import options
from pi0fm.bench import profile
from pi0fm.bench.config import ProfileSteps
from pi0fm.bench.harness import steps
from pi0fm.bench.harness.steps import PARTS, StepClock
from pi0fm.bench.profile import advise, measure
from pi0fm.cli.main import main
from pi0fm.cli.training.profile import ProfiledRun
from pi0fm.data.loading.loader import Collator
from pi0fm.train.config import TrainConfig
from pi0fm_client.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def tree(tmp_path, tmp_path_factory):
    """A run as a file holds it."""
    found = recorded_curve.options_of(tiny_dataset.written(tmp_path_factory), tmp_path)
    return found | {"profile": {"warm_up": 1, "steps": 2}, "num_workers": 2}


@pytest.mark.usefixtures("shapes_unchecked")
def test_the_command_shows_every_part_and_writes_a_trace(tree, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["profile", str(path), "--output_dir", str(tmp_path / "found")]) == 0
    out, shown = capsys.readouterr()
    found = tmp_path / "found" / "profile"
    assert "the 4 samples of one of 2 workers" in shown
    figures = json.loads(out.splitlines()[-1])
    assert list(figures["parts"]) == list(PARTS)
    assert all(name in shown for name in PARTS)
    assert sum(part["share"] for part in figures["parts"].values()) == pytest.approx(1, rel=1e-3)
    assert figures["samples_per_second"] == pytest.approx(4e3 / figures["step_ms"], rel=1e-3)
    forward, backward = (figures["parts"][name]["tflop"] for name in ("forward", "backward"))
    assert forward > 0 and 1.7 < backward / forward < 2.1, "a product has two gradients, but pixels and the first words have none"
    assert figures["parts"]["data"]["tflop"] == figures["parts"]["optimizer"]["tflop"] == 0
    trace = json.loads((found / profile.TRACE).read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    assert json.loads((found / profile.RESULT).read_text())["parts"].keys() == figures["parts"].keys()
    assert sorted(place.name for place in found.iterdir()) == [profile.RESULT, profile.TRACE], "no checkpoint, no bundle"
    assert list((tmp_path / "found").iterdir()) == [found]


@pytest.mark.usefixtures("shapes_unchecked")
def test_time_that_is_spent_on_data_is_called_so(tree, tmp_path, monkeypatch):
    collate = Collator.collate

    def slow(self, positions):
        time.sleep(0.5)
        return collate(self, positions)

    monkeypatch.setattr(Collator, "collate", slow)
    run = options.decode(ProfiledRun, tree)
    found = measure(run, run.profile, tmp_path).figures
    assert found["parts"]["data"]["ms"] > 300
    assert found["advice"][0].endswith("--loader.threads 2")


def parts(**ms: float) -> dict[str, dict[str, float]]:
    """A tenth of a second each unless given, at half of the limit."""
    found = dict.fromkeys(PARTS, 100.0) | ms
    return {name: {"ms": value, "share": value / sum(found.values()), "limit_ms": value / 2} for name, value in found.items()}


def test_advice_names_the_option():
    quick = {"data": 0.0, "optimizer": 10.0, "average": 10.0}
    config = TrainConfig()
    assert advise(config, parts(**quick), torch.bfloat16, CPU) == []
    assert "--ema_decay null" in advise(config, parts(data=0.0), torch.bfloat16, CPU)[0]
    found = advise(config, parts(**quick), torch.float32, CUDA)
    assert "--precision bfloat16" in found[0]
    spared = TrainConfig(activation_checkpointing="full")
    assert any("--activation_checkpointing none" in line for line in advise(spared, parts(**quick), torch.bfloat16, CUDA, 10, 100))
    assert not any("checkpointing" in line for line in advise(spared, parts(**quick), torch.bfloat16, CUDA, 90, 100))


def test_a_step_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"profile\.steps must be 1 or more"):
        ProfileSteps(steps=0)
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        options.decode(ProfiledRun, {"stepz": 3})


def test_a_clock_sums_each_part_over_its_steps(monkeypatch):
    times = iter([0.0, 0.02, 0.03, 0.08, 0.10, 0.11])  # from 0.03 to 0.08, between two steps: nobody's
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(times))
    clock = StepClock(CPU)
    for ended in ("", "forward", "backward") * 2:
        clock.mark(ended)
    found = clock.seconds()
    assert (found["forward"], found["backward"], found["data"]) == (pytest.approx(0.04), pytest.approx(0.02), 0)
    assert sum(clock.seconds().values()) == 0
