"""Tests of the bench commands without measuring: wrong options, taken output folders, tables, files and rounding."""

import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from pi0fm.bench.harness.measure import BenchReport
from pi0fm.cli import bench
from pi0fm.cli.main import main
from pi0fm.options import option
from pi0fm.processes import in_fresh_process


@dataclass(frozen=True)
class Options:
    output_dir: Path | None = option(None, "where")


def asked(report: BenchReport, output_dir: Path | None = None) -> dict:
    module = ModuleType("pi0fm.bench.probe", doc="What is alike.")
    module.__dict__.update(RESULT="probe.json", measure=lambda options: report)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pi0fm.bench.probe", module)
        return bench.ask("pi0fm.bench.probe", Options(output_dir))


def test_figures_are_rounded_shown_kept_and_returned(tmp_path, capsys):
    rows = {"float32": {"tiny": {"ratio": 1.23456789, "interval": (1.1, 1.3)}, "large": {"ratio": 2, "interval": None}}}
    report = BenchReport({"ratio": 0.123456789, "figures": rows, "place": "here"}, background={"curve": [1.0000001]})
    found = asked(report, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (found["ratio"], found["figures"]["float32"]["tiny"]["ratio"]) == (0.123457, 1.23457)
    assert {"processor", "cores"} <= found["machine"].keys() and {"lerobot", "torch"} <= found["versions"].keys()
    written = json.loads((tmp_path / "probe.json").read_text())
    assert {name: written[name] for name in found} == json.loads(json.dumps(found))
    assert (written["curve"], written["notes"]) == ([1.0], "What is alike.") and written["command"]
    shown = [line.split() for line in captured.err.splitlines()]
    for line in (["figures", "float32"], ["ratio", "interval"], ["tiny", "1.235", "1.1,", "1.3"], ["place", "here"]):
        assert line in shown
    assert ["large", "2", "unknown"] in shown
    assert found["machine"]["processor"] in captured.err


def test_only_what_is_to_be_shown_is_and_nothing_is_written_without_a_folder(capsys):
    tables = {"loss": math.inf, "wide": {"tiny": {"seconds": 1, "bytes": 2}}}
    assert asked(BenchReport({"ratio": 1.0, "loss": math.inf}, shown=tables))["loss"] == math.inf
    shown = capsys.readouterr().err
    assert {("seconds", "1"), ("bytes", "2")} <= {tuple(line.split()) for line in shown.splitlines()}, "the longer side goes down"
    assert "loss" in shown and "ratio" not in shown and "written" not in shown


@pytest.mark.parametrize("command", ["bench inference", "bench training", "bench learning", "flow steps b"])
@pytest.mark.parametrize("taken", ["result", ""])
def test_a_folder_that_is_taken_is_left_alone(capsys, tmp_path, command, taken):
    place = tmp_path / "out"
    name = "steps.json" if command.startswith("flow") else f"{command.split()[1]}.json"
    file = place / name if taken else place
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    assert main([*command.split(), "--output_dir", str(place)]) == 1
    assert "type --output_dir ANOTHER" in capsys.readouterr().err
    assert file.read_text() == "{}"


WRONG = [
    ("bench inference", "--cases tini", "unknown word in cases, 'tini': did you mean 'tiny'?"),
    ("bench inference", "--cases tiny,tiny", "cases must name one or more, each once, found tiny, tiny; type --cases tiny"),
    ("bench inference", "--cases pi0_proportions", "unknown word in cases, 'pi0_proportions'"),
    ("bench inference", "--rounds 0", "rounds must be 1 or more, found 0; type --rounds 1 or leave it out"),
    ("bench inference", "--threads 0", "threads must be 1 or more, found 0"),
    ("bench inference", "--seed -1", "seed must be 0 or more, found -1"),
    ("bench inference", "--device cudo", "unknown word in device, 'cudo': did you mean 'cuda'?"),
    ("bench inference", "--round 3", "unknown option round: did you mean 'rounds'?"),
    ("bench inference", "--compile graph", "compile graph records CUDA graphs, found device cpu"),
    ("bench training", "--flow_draws_cases tini", "unknown word in flow_draws_cases"),
    ("bench", "lerning", "unknown command 'bench lerning': did you mean 'learning'?"),
    ("bench learning", "--seeds 0", "seeds must be 1 or more, found 0; type --seeds 1"),
    ("bench learning", "--cpu-seconds -1", "cpu_seconds must be above 0, found -1; type --cpu_seconds 240"),
    ("bench learning", "--cpu_seconds .nan", "option cpu_seconds must be a finite number, found nan"),
    ("bench learning", "--cpu_second 1", "unknown option cpu_second: did you mean 'cpu_seconds'?"),
    ("bench learning", "--lerobot_cpu_seconds -1", "lerobot_cpu_seconds must be 0 or more, found -1"),
    ("bench learning", "--steps 3 --cpu_seconds 7", "a training ends after steps or processor seconds, found --steps 3 with"),
    ("bench learning", "--steps 3 --lerobot_cpu_seconds 9", "a training ends after steps or processor seconds"),
    ("bench learning", "--task reech-v3", "unknown Meta-World task 'reech-v3': did you mean 'reach-v3'?"),
    ("bench loading", "--frames 10", "frames must be 1400 or more, found 10"),
    ("bench loading", "--lerobot_workers -1", "lerobot_workers must be 0 or more, found -1"),
    ("bench loading", "--size 129", "size must be even, as video codecs require, found 129; type --size 130"),
    ("bench checkpoint", "--every 1", "every must be 2 or more, found 1"),
    ("bench checkpoint", "--case tinny", "unknown word in case, 'tinny': did you mean 'tiny'?"),
    ("bench density", "--num_probes -1", "num_probes must be 0 or more, found -1"),
    ("bench density", "--solver dopri5", "unknown word in solver, 'dopri5'"),
    ("flow steps", "", "option bundle is required: folder of the policy"),
    ("flow steps", "b --tolerance 0", "tolerance must be above 0, found 0"),
    ("flow steps", "b --dopri5_tolerances 0.1,-1", "dopri5_tolerances must be above 0"),
    ("flow steps", "b --observations 0", "observations must be 1 or more, found 0"),
    ("flow steps", "b --evaluations 0,4", "evaluations must be numbers >= 1"),
    ("flow steps", "b --reference_steps 50", "reference_steps must be even and at least the largest of evaluations, 100"),
    ("flow steps", "b --reference_steps 129", "reference_steps must be even"),
    ("flow steps", "b c", "expected an option like --steps 100, found 'c'; one bundle may stand first"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "line"), WRONG)
def test_wrong_words_are_one_line(capsys, command, words, line):
    assert main([*command.split(), *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"pi0fm: {line}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", bench.SUBCOMMANDS)
def test_help_lists_every_option_of_every_question(capsys, name):
    assert main(["bench", name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"pi0fm bench {name} [FILE.yaml ...] [--option value ...]: {bench.SUBCOMMANDS[name]}" in " ".join(shown.split())
    assert all(f"--{field} " in shown or f"--{field}." in shown for field in bench.subcommand(name).Options.__dataclass_fields__)


def test_help_shows_where_the_bundle_stands(capsys):
    assert main(["flow", "steps", "--help"]) == 0
    assert capsys.readouterr().out.startswith("pi0fm flow steps BUNDLE [FILE.yaml ...] [--option value ...]: the error of a")


def loaded_by_options() -> list[str]:
    """What a process holds that has read the options of every question."""
    for name in bench.SUBCOMMANDS:
        bench.subcommand(name)
    return [name for name in ("lerobot", "matplotlib") if name in sys.modules]


def test_options_are_read_without_lerobot():
    assert in_fresh_process(loaded_by_options) == []


def loaded_by_training() -> list[str]:
    """Large libraries that a process of `bench training` holds before it builds a network: they would be part of the measured memory."""
    importlib.import_module("pi0fm.bench.training")
    return [name for name in ("lerobot", "sympy", "pyarrow", "ray", "matplotlib") if name in sys.modules]


def test_the_memory_of_training_is_measured_without_other_libraries():
    assert in_fresh_process(loaded_by_training) == []
