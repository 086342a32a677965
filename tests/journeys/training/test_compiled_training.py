"""Tests of training with --compile: the same result, and no compilation for another prompt length."""

import json

import programs
import pytest

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(1200)]  # a compiler runs for minutes


@pytest.mark.parametrize(("name", "how", "rank"), [("pi0", "none", 0), ("pi0", "selective", 0), ("pi05", "full", 0), ("pi0", "full", 4)])
def test_compiled_layers_train_as_the_plain_ones(name, how, rank):
    rows = json.loads(programs.last_line("compiled_training", name, how, str(rank)))
    assert max(row["velocity"] for row in rows) < 1e-5
    assert max(row["gradient"] for row in rows) < 1e-4
    assert rows[0]["graphs"] == rows[-1]["graphs"] > 0
    assert not rank or rows[0]["graphs"] == 3, "the tower's layer, the decoder's and its last, as without adapters"
