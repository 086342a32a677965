"""Tests of statistics against numpy on chunks cut out one by one."""

import dataclasses

import numpy as np
import pytest

from pi0fm.data.columns.norm_stats import ColumnStats, column_stats, compute_norm_stats, norm_stats_from_json
from pi0fm_client.errors import BundleError, DatasetError

RANDOM = np.random.default_rng(0)
LENGTHS = (5, 2, 9)
END = np.repeat(np.cumsum(LENGTHS), LENGTHS)
STATE = RANDOM.normal(3, 2, (16, 3)).astype(np.float32)
ACTION = RANDOM.normal(-1, 4, (16, 2)).astype(np.float32)


def assert_stats(found: ColumnStats, values: np.ndarray) -> None:
    wide = values.astype(np.float64)
    expected = (wide.mean(0), wide.std(0), *np.quantile(wide, (0.01, 0.99), axis=0), wide.min(0), wide.max(0))
    for field, value in zip(dataclasses.fields(ColumnStats), expected, strict=True):
        array = getattr(found, field.name)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, value, rtol=1e-5, atol=1e-6, err_msg=field.name)


def test_without_deltas_they_are_the_columns():
    found = compute_norm_stats(STATE, ACTION, END, (), 4)
    assert_stats(found.state, STATE)
    assert_stats(found.action, ACTION)
    assert found.num_frames == 16


@pytest.mark.parametrize("horizon", [1, 4, 12])
def test_with_deltas_they_are_those_of_every_valid_step_of_every_chunk(horizon):
    rows = []
    for start in range(16):
        for step in range(start, min(start + horizon, END[start])):
            rows.append([ACTION[step, 0], ACTION[step, 1] - STATE[start, 1]])
    found = compute_norm_stats(STATE, ACTION, END, (1,), horizon)
    assert_stats(found.state, STATE)
    assert_stats(found.action, np.array(rows, dtype=np.float32))


def test_a_large_offset_does_not_lose_the_spread():
    values = (1e4 + RANDOM.normal(size=(10_000, 1))).astype(np.float32)
    assert column_stats(values, "x").std == pytest.approx(1.0, abs=0.02)


def test_a_non_finite_row_is_named():
    bad = ACTION.copy()
    bad[7, 1] = np.nan
    with pytest.raises(DatasetError, match=r"'action' must be finite.*row 7"):
        compute_norm_stats(STATE, bad, END, (), 4)


def test_no_rows():
    with pytest.raises(DatasetError, match="no rows"):
        column_stats(ACTION[:0], "action")


def test_json_round_trip_is_exact():
    stats = compute_norm_stats(STATE, ACTION, END, (), 4)
    back = norm_stats_from_json(stats.to_json(), "here")
    for name in ("state", "action"):
        for field in dataclasses.fields(ColumnStats):
            assert np.array_equal(getattr(getattr(back, name), field.name), getattr(getattr(stats, name), field.name))
    assert back.num_frames == 16


def test_a_missing_or_misshaped_statistic_is_named():
    tree = compute_norm_stats(STATE, ACTION, END, (), 4).to_json()
    with pytest.raises(BundleError, match=r"lacks action\.q99"):
        norm_stats_from_json(tree | {"action": {name: row for name, row in tree["action"].items() if name != "q99"}}, "here")
    with pytest.raises(BundleError, match="statistics of 'state'"):
        norm_stats_from_json({"action": tree["action"]}, "here")
    with pytest.raises(BundleError, match="differ in shape"):
        norm_stats_from_json(tree | {"state": tree["state"] | {"std": [1.0]}}, "here")
