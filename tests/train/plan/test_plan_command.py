"""Tests of `pi0fm plan`: its options, last line, picture, and the figures of docs/scaling.md."""

import json
import re
import shlex

import pytest
from PIL import Image

from pi0fm.cli.main import main
from pi0fm.train.plan.planner import PARTS


def asked(capsys, command: str) -> dict:
    assert main(shlex.split(command)[1:]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_recipe_is_planned_and_drawn(capsys, tmp_path):
    place = tmp_path / "new" / "scaling.png"
    found = asked(capsys, f"pi0fm plan tiny --cameras 1 --gpus 4 --samples_per_gpu 8 --price 2 --picture {place}")
    assert found["workers"] == 4 and found["fits"] and found["shard"] == "none"
    assert found["cost"] == pytest.approx(2 * 4 * found["hours"])
    assert Image.open(place).width > 1000


def test_the_sharding_that_is_asked_for_is_planned(capsys):
    found = asked(capsys, "pi0fm plan tiny --cameras 1 --gpus 16 --parallel.shard full --parallel.replicas 2")
    assert (found["shard"], found["replicas"], found["workers"]) == ("full", 2, 16)


def test_what_is_said_of_a_card_that_nobody_measured(capsys):
    assert main(["plan", "tiny", "--cameras", "1", "--gpu", "a100", "--compile", "true"]) == 0
    said = capsys.readouterr().err
    assert "no a100 was measured" in said and "compile is not in the plan" in said


def test_what_does_not_fit_is_said(capsys):
    assert main(["plan", "pi0", "libero", "full", "--gpu", "rtx4090", "--gpus", "1"]) == 0
    assert "no sharding fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("tiny", "found no embodiment.cameras; type --cameras 2"),
        ("pi0 libero --gpus 0", "gpus must be 1 or more, found 0"),
        ("pi0 libero --gbits 0", "gbits must be above 0"),
        ("pi0 libero --price -1", "price must be 0 or more"),
        ("pi0 libero --gpus 1000000", "gpus must be 1 to 4096"),
        ("pi0 libero --gpu h200", "unknown gpu 'h200': did you mean 'h100'?"),
        ("pi0 libero --precision float32", "type --precision bfloat16"),
        ("pi0 libero --picture scaling.svg", "picture must be a PNG file"),
        ("pi0 libero --gpus 64", "global_batch_size must be at least the number of workers, found 32 for 64"),
        ("pi0 libero --gpus 6 --parallel.shard full --parallel.replicas 4", "the workers must be shared out evenly"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, words, line):
    assert main(["plan", *words.split()]) == 2
    assert line in " ".join(capsys.readouterr().err.split())


def test_the_page_says_what_the_command_says(capsys, repository):
    """Every row `| command | step s | samples/s | GiB | held back by |`, and every picture's command."""
    page = (repository / "docs" / "scaling.md").read_text()
    rows = re.findall(r"^\| `(pi0fm plan [^`]+)` \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\w ]+) \|$", page, re.MULTILINE)
    assert len(rows) >= 8
    for command, shard, *figures, held_back in rows:
        found = asked(capsys, command)
        expected = (f"{found['step_seconds']:.2f}", f"{found['samples_per_second']:.0f}", f"{found['memory_gib']:.1f}")
        assert (shard, tuple(figures), held_back) == (found["shard"], expected, found["stopped_by"]), command
    pictures = re.findall(r"--picture (docs/[\w/]+.png)", page)
    assert pictures and all(f"]({name.removeprefix('docs/')})" in page and (repository / name).exists() for name in pictures)


@pytest.mark.journey
def test_the_check_against_real_steps_runs(capsys):
    """With few steps: what is measured is no figure, but everything is called."""
    found = asked(capsys, "pi0fm bench planning --processes [1,2] --turns 1 --steps 1")
    assert set(found["steps"]) == {"1 x none", "2 x none", "2 x gradients", "2 x full"}
    for row in found["steps"].values():
        assert row["planned_ms"] == pytest.approx(sum(row[f"{part}_ms"] for part in PARTS), rel=1e-4) and row["measured_ms"] > 0
    assert found["worst"]["step"] in found["steps"]
    assert main(["bench", "planning", "--processes", "0"]) == 2
