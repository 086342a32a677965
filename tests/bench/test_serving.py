"""Tests of the comparisons in `pi0fm bench serving`, independent of this machine's speed."""

import pytest

from pi0fm.bench import serving
from pi0fm.bench.config import ServingOptions


@pytest.mark.long
@pytest.mark.timeout(600)
def test_eight_robots_are_answered_faster_together_than_one_at_a_time() -> None:
    """A minute on an idle machine of two cores."""
    found = serving.measure(ServingOptions(seconds=5, rounds=2)).figures
    assert found["throughput_ratio_8"] > 1.2 and found["fairness_8"] > 0.8
    assert 0 < found["server_overhead_ms"]["p50"] < found["overhead_ms"]["p50"]


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_loop_of_50_hz_applies_nothing_expired_and_stands_still_when_the_server_dies() -> None:
    found = serving._control_loop(5)
    assert found["expired_applied"] == 0 and found["hold_after_steps"] > 0.5
    if found["bare_loop_rate_ratio"] > 0.99:  # a machine that leaves 50 Hz to a loop that only sleeps
        assert found["loop_rate_ratio"] > 0.9 and found["hold_after_steps"] < 2.5
