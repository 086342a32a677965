"""Test that the small run's loss curve is the committed one (recorded by tests/support/recorded_curve.py)."""

import pytest
import recorded_curve


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_the_curve_is_the_recorded_one(tiny_root, tmp_path, micro_batch_size):
    recorded_curve.assert_same(recorded_curve.trained(tiny_root, tmp_path, micro_batch_size), recorded_curve.recorded())
