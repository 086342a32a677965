"""Tests that any number of workers continues from a checkpoint of any other, and that all agree on every fault and stop.

The workers are forks of this process that talk over gloo: they cost no imports.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_workers import workers
from safetensors import safe_open

from pi0fm.train.checkpoint import storage
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.storage import whole
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.watch import signals
from pi0fm.train.watch.requests import RunRequest, write_request
from pi0fm.train.watch.signals import StopSignals

pytestmark = [pytest.mark.journey, pytest.mark.long]

SHAPES = {"model/embedding": (40, 6), "model/head": (7, 5), "model/norm": (9,), "moments/step": (), "average/head": (7, 5)}
SHARDED = "model/sharded"  # 9 rows do not divide by 2 or 4: the last worker has fewer


def values(step: int, name: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(SHAPES.get(name, (9, 3)), generator=random)


def state(context: Context, step: int | None) -> dict[str, torch.Tensor]:
    """The tensors after `step`, or zeros; one of them is sharded over the workers, where there are several."""
    made = {name: values(step, name) if step else torch.zeros(shape) for name, shape in SHAPES.items()}
    whole_one = values(step, SHARDED) if step else torch.zeros(9, 3)
    if context.world_size == 1:
        return made | {SHARDED: whole_one}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return made | {SHARDED: distribute_tensor(whole_one, init_device_mesh("cpu", (context.world_size,)), [Shard(0)])}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_then_save(place: Path, expected: int | None, step: int) -> Callable[[Context], list[str]]:
    """Restore and hold against `expected`, then save `step` behind the back of this very test: the names of what differed."""

    def body(context: Context) -> list[str]:
        checkpoints = Checkpoints(place, Parallel(context), keep=9)
        found = state(context, None)
        index = checkpoints.restore(found, lambda index: None)
        assert (index is None) == (expected is None)
        wrong = [] if expected is None else [name for name in found if not torch.equal(full(found[name]), values(expected, name))]
        saved = state(context, step)
        checkpoints.save(step, saved, {"step": step})
        for tensor in saved.values():
            tensor.zero_()
        checkpoints.close()
        return wrong

    return body


def test_from_one_worker_to_two_to_one_to_four(tmp_path):
    place = tmp_path / "checkpoints"
    alone = Context(shown=False)
    assert check_then_save(place, None, 1)(alone) == []
    assert workers(2, tmp_path, check_then_save(place, 1, 2)) == [[], []]
    assert check_then_save(place, 2, 3)(alone) == []
    assert workers(4, tmp_path, check_then_save(place, 3, 4)) == [[]] * 4
    assert check_then_save(place, 4, 5)(alone) == []
    assert whole(place) == [1, 2, 3, 4, 5]


def test_each_worker_writes_its_part(tmp_path):
    place = tmp_path / "checkpoints"
    workers(2, tmp_path, check_then_save(place, None, 1))
    keys = []
    for path in sorted((place / "step-000000001").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys.append(set(file.keys()))
    assert keys == [
        {"model/embedding", SHARDED},
        {"model/head", "average/head", "model/norm", "moments/step", f"{SHARDED}@(5, 0)"},
    ]


def test_all_agree_that_a_checkpoint_is_torn(tmp_path):
    place = tmp_path / "checkpoints"
    workers(2, tmp_path, check_then_save(place, None, 1))
    workers(2, tmp_path, check_then_save(place, 1, 2))
    shard = place / "step-000000002/rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert workers(2, tmp_path, check_then_save(place, 1, 3)) == [[], []]


def test_a_full_disk_of_one_worker_is_known_to_all(tmp_path):
    place = tmp_path / "checkpoints"

    def body(context: Context) -> list[str | None]:
        checkpoints = Checkpoints(place, Parallel(context), keep=9)
        checkpoints.save(1, state(context, 1), {"step": 1})
        first = checkpoints.settle()
        real = storage.Folder.write

        def write(self, name, parts):
            raise OSError(errno.ENOSPC, "No space left on device")

        if context.rank == 1:
            storage.Folder.write = write
        checkpoints.save(2, state(context, 2), {"step": 2})
        second = checkpoints.settle()
        storage.Folder.write = real
        checkpoints.save(3, state(context, 3), {"step": 3})
        return [first, second, checkpoints.settle()]

    assert workers(2, tmp_path, body) == [[None, "[Errno 28] No space left on device", None]] * 2
    assert whole(place) == [1, 3]
    assert not (place / "step-000000002").exists()


def test_a_checkpoint_is_asked_for_and_all_make_it_once_after_the_same_step(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_BETWEEN_LOOKS", 0.0)

    def body(context: Context) -> list[int]:
        saved = []
        with StopSignals(Parallel(context), tmp_path / "run") as stop:
            for step in range(1, 12):
                if step == 5 and context.rank == 0:
                    write_request(tmp_path / "run", RunRequest.SAVE)
                if (asked := stop.after_step()) is RunRequest.SAVE:
                    saved.append(step)
                    stop.saved(asked)
                assert asked <= RunRequest.SAVE
        return saved

    assert workers(3, tmp_path, body) == [[6]] * 3
    assert not (tmp_path / "run" / "SAVE").exists()


@pytest.mark.parametrize("by", ["signal", "file"])
def test_one_worker_is_asked_and_all_leave_after_the_same_step(tmp_path, by, monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_BETWEEN_LOOKS", 0.0)

    def body(context: Context) -> int:
        with StopSignals(Parallel(context), tmp_path / "run") as stop:
            for step in range(1, 30):
                if step == 5 and context.rank == (1 if by == "signal" else 0):
                    os.kill(os.getpid(), signals.signal.SIGTERM) if by == "signal" else write_request(tmp_path / "run", RunRequest.STOP)
                if stop.after_step():
                    return step
        return 0

    assert workers(4, tmp_path, body) == [6] * 4
