"""A comparison's figures in the form of its last line.

Owns: the names of the figures and their rounding. Does not know: how they were measured, how a table looks.

    row of a mode and case --> like_for_like, as_shipped: case -> median ratio, LeRobot's time over ours
                               intervals: mode -> case -> [low, high], 95 %
                               gemm_ratio, max_abs_difference: case -> of like_for_like
                               figures: mode -> case -> everything, those two of as_shipped too
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pi0fm import machine
from pi0fm.bench.paired import Ratio
from pi0fm.bench.peer_config import MODES
from pi0fm.bench.products import Roofline, Work

Rows = Mapping[str, Mapping[str, dict[str, Any]]]


@dataclass(frozen=True)
class Speed:
    """One case under one mode.

    peer: LeRobot's time over ours. products: our time over that of the bare matrix products. difference: of the outputs, relative, and
    the bound that it kept. work: of one of our calls; peer_flops: of one of LeRobot's.
    """

    peer: Ratio
    products: Ratio
    difference: float
    bound: float
    work: Work
    peer_flops: int

    def row(self, roofline: Roofline) -> dict[str, Any]:
        """All of it by name, with what the machine's limits say of it."""
        seconds, least = self.peer.second_seconds, roofline.seconds(self.work)
        return {
            "ratio": rounded(self.peer.median),
            "interval": [rounded(self.peer.low), rounded(self.peer.high)],
            "seconds": rounded(seconds),
            "peer_seconds": rounded(self.peer.first_seconds),
            "gemm_ratio": rounded(self.products.median),
            "gemm_interval": [rounded(self.products.low), rounded(self.products.high)],
            "products_seconds": rounded(self.products.second_seconds),
            "max_abs_difference": rounded(self.difference),
            "difference_bound": self.bound,
            "gflop": rounded(self.work.total_flops / 1e9),
            "peer_gflop": rounded(self.peer_flops / 1e9),
            "weight_megabytes": rounded(self.work.weight_bytes / 1e6),
            "gflop_per_second": rounded(self.work.total_flops / seconds / 1e9),
            "roofline_seconds": rounded(least),
            "roofline_share": rounded(least / seconds),
        }


def summary(rows: Rows, roofline: Roofline) -> dict[str, Any]:
    """The figures that both commands print."""
    like_for_like = rows[MODES[0]]
    return {
        **{mode: {case: row["ratio"] for case, row in rows[mode].items()} for mode in MODES},
        "intervals": {mode: {case: row["interval"] for case, row in rows[mode].items()} for mode in MODES},
        **{name: {case: row[name] for case, row in like_for_like.items()} for name in ("gemm_ratio", "max_abs_difference")},
        "figures": rows,
        "roofline": {
            "gflop_per_second": {str(dtype).removeprefix("torch."): rounded(speed / 1e9) for dtype, speed in _speeds(roofline)},
            "gigabytes_per_second": rounded(roofline.bytes_per_second / 1e9),
        },
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _speeds(roofline: Roofline) -> list[tuple[Any, float]]:
    return sorted(roofline.flops_per_second.items(), key=lambda item: str(item[0]))
