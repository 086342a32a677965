"""Checkpoints: whole or passed over, never more than were asked for."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pi0fm.errors import OutputError
from pi0fm.train import checkpoint
from pi0fm.train.ema import Ema
from pi0fm.train.loop import _state
from pi0fm.train.optim import OptimizerConfig, make_optimizer
from pi0fm.train.parallel import Context

ALONE = Context()


def state(value: float) -> dict:
    return {"model": {"weight": torch.full((3,), value)}, "step": torch.tensor(value)}


def save(directory: Path, step: int, keep: int = 9) -> None:
    checkpoint.save(directory, step, state(float(step)), ALONE, keep)


def test_round_trip_in_place(tmp_path):
    save(tmp_path, 7)
    target = state(0.0)
    weight = target["model"]["weight"]
    checkpoint.load(tmp_path, 7, target, ALONE)
    assert weight.tolist() == [7.0] * 3
    assert float(target["step"]) == 7.0


def test_one_process_saves_and_loads_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 1)
        checkpoint.load(tmp_path, 1, state(0.0), ALONE)


def test_retention_keeps_the_newest(tmp_path):
    for step in (5, 10, 15, 1000):
        save(tmp_path, step, keep=2)
    assert checkpoint.whole(tmp_path) == [15, 1000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000015", "step-000001000"]


def test_a_torn_checkpoint_is_passed_over_with_a_word(tmp_path, capsys):
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "step-000000010" / checkpoint.COMMIT).unlink()
    (tmp_path / ".step-000000015").mkdir()
    assert checkpoint.newest(tmp_path) == 5
    said = capsys.readouterr().err.splitlines()
    assert [line.split("checkpoints/")[-1].split("/")[-1].split(" ")[0] for line in said] == [".step-000000015", "step-000000010"]
    assert all("is torn" in line for line in said)


def test_a_torn_one_is_written_anew(tmp_path):
    (tmp_path / ".step-000000005").mkdir()
    (tmp_path / ".step-000000005/half").write_text("x")
    (tmp_path / "step-000000005").mkdir()
    save(tmp_path, 5)
    assert checkpoint.newest(tmp_path) == 5
    assert not (tmp_path / ".step-000000005").exists()


def test_nothing_there(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None


@pytest.mark.parametrize("damage", ["cut", "missing", "metadata"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    save(tmp_path, 5)
    shard = next((tmp_path / "step-000000005").glob("*.distcp"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:20])
    elif damage == "missing":
        shard.unlink()
    else:
        (tmp_path / "step-000000005/.metadata").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot be read.*go on from an older one") as caught:
        checkpoint.load(tmp_path, 5, state(0.0), ALONE)
    assert "\n" not in str(caught.value)


def test_another_network_is_refused(tmp_path):
    save(tmp_path, 5)
    for other in (
        {"model": {"weight": torch.zeros(4)}, "step": torch.zeros(())},
        {"model": {"bias": torch.zeros(3)}, "step": torch.zeros(())},
    ):
        with pytest.raises(OutputError, match="cannot be read"):
            checkpoint.load(tmp_path, 5, other, ALONE)


def test_a_run_that_has_not_stepped_has_room_for_its_moments():
    """On the parameter's device, where a fused optimiser wants them."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    held = _state(model, make_optimizer(OptimizerConfig(), model), Ema(model, 0.9))
    assert sorted(held["moments"]) == sorted(
        f"{name}/{moment}" for name in ("weight", "bias") for moment in ("step", "exp_avg", "exp_avg_sq")
    )
    assert all(tensor.is_meta for tensor in held["moments"].values())
    assert sorted(held["average"]) == ["bias", "weight"]
