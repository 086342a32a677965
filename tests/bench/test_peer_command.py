"""`pi0fm bench inference` and `pi0fm bench training`: wrong words and folders that are taken. Nothing is timed here."""

import pytest

from pi0fm.bench.peer_config import MODES, InferenceConfig, TrainingBenchConfig
from pi0fm.cli import bench_inference, bench_training
from pi0fm.cli.main import main
from pi0fm.processes import in_fresh_process


@pytest.mark.parametrize("command", ["inference", "training"])
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--cases", "tini"], "pi0fm: unknown word in cases, 'tini': did you mean 'tiny'?"),
        (["--cases", "tiny,tiny"], "pi0fm: cases must name one or more, each once, found tiny, tiny; type --cases tiny"),
        (["--rounds", "0"], "pi0fm: rounds must be 1 or more, found 0; type --rounds 1 or leave it out"),
        (["--threads", "0"], "pi0fm: threads must be 1 or more, found 0"),
        (["--seed", "-1"], "pi0fm: seed must be 0 or more, found -1"),
        (["--device", "cudo"], "pi0fm: unknown word in device, 'cudo': did you mean 'cuda'?"),
        (["--round", "3"], "pi0fm: unknown option round: did you mean 'rounds'?"),
    ],
)
def test_wrong_words_are_one_line(capsys, command, words, line):
    assert main(["bench", command, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def test_a_case_of_draws_is_no_case_of_peers(capsys):
    """LeRobot's side has no network of pi0's proportions; ours measures its draws there."""
    assert TrainingBenchConfig(flow_draws_cases=("pi0_proportions", "tiny")).flow_draws_cases == ("pi0_proportions", "tiny")
    assert main(["bench", "training", "--cases", "pi0_proportions"]) == 2
    assert "unknown word in cases, 'pi0_proportions'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [bench_inference, bench_training])
@pytest.mark.parametrize("taken", ["result", ""])
def test_a_folder_that_is_taken_is_left_alone(capsys, tmp_path, command, taken):
    place = tmp_path / "out"
    file = place / command.RESULT if taken else place
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    assert main(["bench", command.__name__.rsplit("_", 1)[-1], "--output_dir", str(place)]) == 1
    assert "type --output_dir ANOTHER" in capsys.readouterr().err
    assert file.read_text() == "{}"


@pytest.mark.parametrize("command", ["inference", "training"])
def test_help_lists_every_option(capsys, command):
    assert main(["bench", command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in ("cases", "rounds", "threads", "device", "seed", "output_dir"))


def row(ratio: float) -> dict:
    names = ("seconds", "peer_seconds", "gemm_ratio", "gflop", "gflop_per_second", "weight_megabytes", "roofline_share")
    return dict.fromkeys(names, 0.5) | {"ratio": ratio, "interval": [1.0, 2.0], "max_abs_difference": 1e-6}


def test_the_table_shows_both_modes_on_standard_error(capsys):
    result = {
        "figures": {mode: {"width_512": row(1.25 + number)} for number, mode in enumerate(MODES)},
        "roofline": {"gflop_per_second": {"float32": 90.0}, "gigabytes_per_second": 12.0},
        "machine": {"processor": "a processor"},
    }
    bench_inference.show(result, bench_inference.COLUMNS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(
        text in captured.err for text in ("like for like", "as shipped", "1.25", "2.25", "500.0 ms", "50 %", "90 GFLOP/s", "a processor")
    )


def loaded_by_the_commands() -> list[str]:
    """What a process holds that has only read the options."""
    import sys

    for module, config in ((bench_inference, InferenceConfig), (bench_training, TrainingBenchConfig)):
        assert module.Options is config
    return [name for name in ("torch", "lerobot", "transformers") if name in sys.modules]


def test_options_are_read_without_torch_or_lerobot():
    assert in_fresh_process(loaded_by_the_commands) == []
