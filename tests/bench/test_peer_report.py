"""What the last line of a comparison of speed holds."""

import json

import pytest
import torch

from pi0fm.bench.paired import Ratio
from pi0fm.bench.peer_report import Speed, rounded, summary
from pi0fm.bench.products import Roofline, Work

ROOFLINE = Roofline({torch.float32: 100e9, torch.bfloat16: 400e9}, bytes_per_second=10e9)
SPEED = Speed(
    peer=Ratio(1.5, 1.4, 1.61234, first_seconds=0.3, second_seconds=0.2),
    products=Ratio(1.25, 1.2, 1.3, first_seconds=0.2, second_seconds=0.16),
    difference=1.23456e-6,
    bound=1e-4,
    work=Work({torch.float32: 10_000_000_000}, weight_bytes=500_000_000),
    peer_flops=15_000_000_000,
)


def test_a_row_holds_operations_bytes_and_the_machines_limit_beside_the_time():
    """10 GFLOP at 100 a second take 0.1 s, 0.5 GB at 10 a second half of it."""
    row = SPEED.row(ROOFLINE)
    assert row["gflop"] == 10
    assert row["peer_gflop"] == 15
    assert row["weight_megabytes"] == 500
    assert row["gflop_per_second"] == 50
    assert (row["roofline_seconds"], row["roofline_share"]) == (0.1, 0.5)
    assert row["interval"] == [1.4, 1.612]
    assert row["max_abs_difference"] == 1.235e-6


def test_the_summary_has_the_names_that_were_promised():
    row, other = SPEED.row(ROOFLINE), SPEED.row(ROOFLINE) | {"ratio": 3.0, "gemm_ratio": 2.0, "max_abs_difference": 0.01}
    found = json.loads(json.dumps(summary({"like_for_like": {"tiny": row}, "as_shipped": {"tiny": other}}, ROOFLINE)))
    assert (found["like_for_like"], found["as_shipped"]) == ({"tiny": 1.5}, {"tiny": 3.0})
    assert (found["gemm_ratio"], found["max_abs_difference"]) == ({"tiny": 1.25}, {"tiny": 1.235e-6})
    assert found["figures"]["as_shipped"]["tiny"]["max_abs_difference"] == 0.01
    assert found["intervals"]["like_for_like"] == {"tiny": [1.4, 1.612]}
    assert found["roofline"] == {"gflop_per_second": {"bfloat16": 400, "float32": 100}, "gigabytes_per_second": 10}
    assert {"processor", "cores"} <= found["machine"].keys()
    assert {"lerobot", "torch"} <= found["versions"].keys()


@pytest.mark.parametrize(("value", "expected"), [(1234.56, 1235.0), (0.000123456, 0.0001235), (0.0, 0.0)])
def test_four_digits(value, expected):
    assert rounded(value) == expected
