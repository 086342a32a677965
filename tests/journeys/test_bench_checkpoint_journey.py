"""`pi0fm bench checkpoint` to its last line on the tiny network: the shape of the result, not the speed."""

import json

import pytest

from pi0fm.cli.main import main

pytestmark = pytest.mark.journey


def test_the_last_line_has_every_figure(capsys, tmp_path):
    words = ("--rounds", "1", "--every", "3", "--batch_size", "1", "--precision", "float32", "--folder", str(tmp_path))
    assert main(["bench", "checkpoint", *words]) == 0
    out, err = capsys.readouterr()
    last = json.loads(out.strip().splitlines()[-1])
    low, high = last["interval"]
    assert low <= last["slowdown"] <= high
    assert last["bytes"] > 4 * 4 * 3_000_000  # weights, two moments and the average, float32
    assert last["blocking_seconds"] > 0 and last["step_seconds"] > 0 and 1 <= last["steps_until_written"] <= 3
    assert "slowdown every 1000" in err
    assert list(tmp_path.iterdir()) == []
