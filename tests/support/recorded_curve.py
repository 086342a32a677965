"""Recorded loss curve of a small run: a change that should not alter numbers reproduces it.

    .venv/bin/python tests/support/recorded_curve.py          records it anew, when numbers are meant to change: say so in the commit

The pictures are those that the data set keeps without loss, so that no video codec has a say.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

RECORD = Path(__file__).parents[1] / "train" / "recorded_curve.json"
COLUMNS = ("step", "loss", "grad_norm", "learning_rate")
OPTIONS: dict[str, Any] = {
    "steps": 12,
    "global_batch_size": 8,
    "flow_draws_per_observation": 2,
    "embodiment": {"cameras": {"wrist": "observation.images.wrist"}},
    # with what the preset's file would say on a command line
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 1, "final_learning_rate_ratio": 0.1, "weight_decay": 1e-10},
    "ema_decay": 0.9,
    "precision": "float32",
    "execution_horizon": 2,
    "log_every": 1,
    "checkpoint_every": 5,
    "threads": 1,
    "seed": 3,
}


def recorded() -> list[dict[str, float]]:
    """The curve as it was committed."""
    return json.loads(RECORD.read_text())["curve"]


def options_of(root: Path, folder: Path) -> dict[str, Any]:
    """The run as a configuration file would hold it."""
    import tiny_dataset

    places = {"output_dir": str(folder / "run"), "dataset": {"root": str(root), "cache_dir": str(folder / "frames")}}
    return OPTIONS | places | {"model": tiny_dataset.NETWORK}


def curve(output_dir: Path) -> list[dict[str, float]]:
    """A run's lines, without what depends on the machine."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in COLUMNS} for line in lines]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Within 1e-5 of each loss: what another order of adding leaves in float32."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-12)


def trained(root: Path, folder: Path, micro_batch_size: int | None = None) -> list[dict[str, float]]:
    """The curve of the run as this code makes it."""
    from pi0fm import options
    from pi0fm.train.config import TrainConfig
    from pi0fm.train.loop import train
    from pi0fm.train.parallel.context import Context
    from pi0fm.train.start.output import claim

    config = options.decode(TrainConfig, options_of(root, folder) | {"micro_batch_size": micro_batch_size})
    claim(config)
    train(Context(shown=False), config)
    return curve(config.output_dir)


if __name__ == "__main__":
    import torch

    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    import tiny_dataset

    with TemporaryDirectory() as place:
        lines = trained(tiny_dataset.write(Path(place) / "set"), Path(place))
    RECORD.write_text(json.dumps({"torch": torch.__version__, "curve": lines}, indent=1) + "\n")
