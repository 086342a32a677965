"""Tests of torch.compile of a sampler: the same chunks, and few compilations once a server is warm."""

import json

import programs
import pytest

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(900)]  # a compiler runs for minutes


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_compiled_chunks_are_the_plain_ones(name):
    found = json.loads(programs.last_line("compiled_chunks", name))
    rows = found["shapes"]
    assert max(row["difference"] for row in rows) < 1e-5 and found["held"] < 1e-5
    warm = rows[1]["graphs"]
    assert warm > 0
    # of four more shapes at most one for a single row and one for several: sizes that were equal at first turn out to differ
    assert rows[-1]["graphs"] <= warm + 2
