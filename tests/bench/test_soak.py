"""Test of a server under faults: right answers, no crash, recovery."""

import numpy as np
import pytest

from pi0fm.bench import soak
from pi0fm.bench.config import SoakOptions


def test_an_answer_says_what_it_answers() -> None:
    policy = soak.StepPolicy(0.0)
    first, second = policy.infer_batch([policy.observation(soak.message(*asked)) for asked in ((3.0, 1.0), (40.0, 2.0))])
    assert np.array_equal(first.actions, soak.expected(3.0, 1.0)) and first.actions[2].tolist() == [5.0, 1.0]
    assert np.array_equal(second.actions, soak.expected(40.0, 2.0)) and not np.array_equal(second.actions, first.actions)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_short_soak() -> None:
    """The ten minutes' figures are in docs/LOG.md."""
    found = soak.measure(SoakOptions(seconds=60, pause_seconds=12)).figures
    assert not found["crashed"] and found["wrong_answers"] == 0 and found["right_answers"] > 500
    assert found["recovery_seconds"] < 3 * found["chunk_seconds"], "on a machine of other work; a chunk is 1.6 s"
    assert found["memory_mb"]["end"] < found["memory_mb"]["begin"] + 10
    assert all(found["done_to_it"].values()), "a fault was not tried"
