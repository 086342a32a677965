"""The state of a run on disk, so that a killed run goes on where it was.

Owns: the directory's layout, the newest whole checkpoint, retention. Does not know: what trains.

    <output_dir>/checkpoints/step-000001000/     torch.distributed.checkpoint's shards
                                     COMMIT      written last, by the first worker, when every worker has written
                             .step-000002000     being written, or torn: never read

The position in the data needs no file of its own: it is the step (data/sampler.py).
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from pi0fm import files, progress
from pi0fm.errors import OutputError
from pi0fm.train.parallel import Context, barrier

COMMIT = "COMMIT"


def save(directory: Path, step: int, state: dict[str, Any], context: Context, keep: int) -> Path:
    """Write `state` after `step` optimiser steps; called by every worker. Older checkpoints beyond `keep` are removed."""
    aside, final = directory / f".step-{step:09d}", directory / f"step-{step:09d}"
    if context.is_first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier(context)
    with _alone_without_warning():
        state_dict_saver.save(state, checkpoint_id=aside, no_dist=context.world_size == 1)
    barrier(context)
    if context.is_first:
        files.write_text(aside / COMMIT, f"{step}\n")
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        files.fsync_directory(directory)
        for old in whole(directory)[:-keep]:
            shutil.rmtree(directory / f"step-{old:09d}")
    barrier(context)
    return final


def whole(directory: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*") if (path / COMMIT).is_file())


def newest(directory: Path) -> int | None:
    """The step of the newest whole checkpoint, or None; a torn one is named in a warning and passed over."""
    if directory.is_dir():
        for path in sorted((*directory.glob(".step-*"), *directory.glob("step-*"))):
            if not (path / COMMIT).is_file():
                progress.say(f"checkpoint {path} is torn (it has no {COMMIT}); it is passed over")
    steps = whole(directory)
    return steps[-1] if steps else None


def load(directory: Path, step: int, state: dict[str, Any], context: Context) -> dict[str, Any]:
    """Read the checkpoint of `step` into the tensors of `state`, in place, and return it."""
    path = directory / f"step-{step:09d}"
    try:
        with _alone_without_warning():
            state_dict_loader.load(state, checkpoint_id=path, no_dist=context.world_size == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(f"checkpoint {path} cannot be read ({reason:.160}); remove it to go on from an older one") from error
    return state


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    """One process is what `no_dist` asks for; torch warns of it at every call all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)", category=UserWarning)
        yield
