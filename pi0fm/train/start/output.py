"""Whose output folder it is.

Owns: the claim on a folder before any worker starts. Does not know: what is written there later, who else is at work in it (lease.py).

    run.json, and something trained       a run: resumed, or refused
    run.json alone                        a start that came to nothing: begun again with any options
    something else                        refused
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pi0fm import files, options, progress
from pi0fm.train.checkpoint.storage import whole
from pi0fm.train.config import TrainConfig, refuse_other_run
from pi0fm.train.start import lease
from pi0fm.train.watch.metrics import read_last
from pi0fm.train.watch.requests import withdraw
from pi0fm.train.watch.trackers import FOLDERS
from pi0fm_client.errors import OutputError

RAY_FOLDER = "ray"  # where Ray Train keeps its own notes of the run


def claim(config: TrainConfig) -> None:
    """Write `run.json` into an empty or new `output_dir`; under `resume` the run there must be the same, except for what may change.

    Raises OutputError or ConfigError otherwise, with nothing touched.
    """
    checkpoints = judge(config)
    with files.write_faults(config.output_dir):
        files.write_json(config.output_dir / "run.json", options.encode(config))
        withdraw(config.output_dir)
    if config.resume == "true" and not checkpoints:
        progress.say(f"no checkpoint in {config.checkpoint_place}: the run starts at step 0")


def judge(config: TrainConfig) -> list[int]:
    """Steps of the checkpoints that the run would go on from, with nothing touched. Raises what `claim` does."""
    directory = config.output_dir
    files.refuse_name(directory)
    with files.write_faults(directory):
        if not (directory / "run.json").exists():
            return _judge_new(config)
        checkpoints, recorded = whole(config.checkpoint_place), _read(config)
        if checkpoints or read_last(directory) is not None:
            if config.resume == "false":
                raise OutputError(f"{directory} holds a run; add --resume true to go on with it, or choose another --output_dir")
            refuse_other_run(recorded, options.encode(config), directory)
        return checkpoints


@contextmanager
def claimed(config: TrainConfig, *, restarted: bool = False) -> Iterator[None]:
    """Claim the folder for the block, and hold its lease; released at an error under which nothing was trained.

    An earlier run's record stands again after such an error. restarted: the launcher started the workers again, and an earlier attempt
    made the claim.
    """
    with lease.only_run_in(config.output_dir):
        record = config.output_dir / "run.json"
        before = record.read_bytes() if record.is_file() else None
        trained = read_last(config.output_dir)
        if not restarted or before is None:
            claim(config)
        try:
            yield
        except BaseException:
            if before is not None and trained is not None and read_last(config.output_dir) == trained:
                with suppress(OSError):  # a place that went away
                    files.write_bytes(record, before)
            release(config)
            raise


def release(config: TrainConfig) -> None:
    """Give up a claim under which nothing was trained: a corrected command may then use the folder."""
    directory = config.output_dir
    try:
        if (directory / "run.json").exists() and read_last(directory) is None and not (directory / "checkpoints").exists():
            (directory / "run.json").unlink()
            (directory / "metrics.jsonl").unlink(missing_ok=True)
            withdraw(directory)
            for name in (*FOLDERS, RAY_FOLDER):
                shutil.rmtree(directory / name, ignore_errors=True)
            if not any(directory.iterdir()):
                directory.rmdir()
    except OSError:
        return  # a place that went away; the next command judges what is there


def _judge_new(config: TrainConfig) -> list[int]:
    """Refuse a folder without `run.json` that cannot be this run's. Returns the steps of checkpoints elsewhere that it continues from."""
    directory = config.output_dir
    foreign = directory.exists() and (not directory.is_dir() or any(not _left_by_a_start(path.name) for path in directory.iterdir()))
    # another machine's run: what it was is held against this one when its checkpoint is read
    elsewhere = whole(config.checkpoint_dir) if not foreign and config.checkpoint_dir else []
    if elsewhere and config.resume == "false":
        raise OutputError(f"{config.checkpoint_dir} holds checkpoints of a run; add --resume true to go on, or choose another")
    if not elsewhere and config.resume == "true":
        raise OutputError(f"nothing to resume in {directory}: it has no run.json; leave --resume out, or correct --output_dir")
    if foreign:
        raise OutputError(f"{directory} exists and is not a run of pi0fm; choose another --output_dir")
    return elsewhere


def _left_by_a_start(name: str) -> bool:
    return name.startswith(".")  # a lease, what a killed start wrote aside, what file managers leave


def _read(config: TrainConfig) -> dict[str, Any]:
    record = config.output_dir / "run.json"
    try:
        found = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{record} is not readable ({error}); choose another --output_dir") from None
    if "global_batch_size" not in found:
        raise OutputError(f"{record} is not of a run of pi0fm; choose another --output_dir")
    return found
