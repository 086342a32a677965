"""Tests of training with --compile: the same result, and no compilation for another prompt length."""

import json

import programs
import pytest

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(1200)]  # a compiler runs for minutes


@pytest.mark.parametrize(("name", "how"), [("pi0", "none"), ("pi0", "selective"), ("pi05", "full")])
def test_compiled_layers_train_as_the_plain_ones(name, how):
    rows = json.loads(programs.last_line("compiled_training", name, how))
    assert max(row["velocity"] for row in rows) < 1e-5
    assert max(row["gradient"] for row in rows) < 1e-4
    assert rows[0]["graphs"] == rows[-1]["graphs"] > 0
