"""The claim of a run on its output folder.

Owns: the claim before any worker starts. Does not know: what is written there later, other live runs in the folder (lease.py).

    run.json, and a step trained          a run: resumed, or refused
    run.json alone                        a failed start: started again with any options
    other contents                        refused
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
from pi0fm.train.watch.requests import remove_requests
from pi0fm.train.watch.trackers import FOLDERS
from pi0fm_client.errors import OutputError

RAY_FOLDER = "ray"  # Ray Train's records of the run


def claim(config: TrainConfig) -> None:
    """Write `run.json` into an empty or new `output_dir`; under `resume` the run there must be the same, except for what may change.

    Raises OutputError or ConfigError otherwise, with nothing touched.
    """
    checkpoints = checkpoints_to_resume(config)
    with files.write_faults(config.output_dir):
        files.write_json(config.output_dir / "run.json", options.encode(config))
        remove_requests(config.output_dir)
    if config.resume == "true" and not checkpoints:
        progress.say(f"no checkpoint in {config.checkpoint_place}: the run starts at step 0")


def checkpoints_to_resume(config: TrainConfig) -> list[int]:
    """Return the steps of the checkpoints that the run would resume from, without writing. Raises what `claim` raises."""
    directory = config.output_dir
    files.refuse_name(directory)
    with files.write_faults(directory):
        if not (directory / "run.json").exists():
            return _checkpoints_elsewhere(config)
        checkpoints, recorded = whole(config.checkpoint_place), _read(config)
        if checkpoints or read_last(directory) is not None:
            if config.resume == "false":
                raise OutputError(f"{directory} holds a run; add --resume true to go on with it, or choose another --output_dir")
            refuse_other_run(recorded, options.encode(config), directory)
        return checkpoints


@contextmanager
def claimed(config: TrainConfig, *, restarted: bool = False) -> Iterator[None]:
    """Claim the folder for the block, and hold its lease; an error before anything was trained releases the claim.

    Such an error also restores an earlier run's record. restarted: the launcher restarted the workers, and an earlier attempt made the
    claim.
    """
    with lease.hold_lease(config.output_dir):
        record = config.output_dir / "run.json"
        before = record.read_bytes() if record.is_file() else None
        trained = read_last(config.output_dir)
        if not restarted or before is None:
            claim(config)
        try:
            yield
        except BaseException:
            if before is not None and trained is not None and read_last(config.output_dir) == trained:
                with suppress(OSError):  # the folder has become unreachable
                    files.write_bytes(record, before)
            release(config)
            raise


def release(config: TrainConfig) -> None:
    """Release a claim under which nothing was trained, so that a corrected command may use the folder."""
    directory = config.output_dir
    try:
        if (directory / "run.json").exists() and read_last(directory) is None and not (directory / "checkpoints").exists():
            (directory / "run.json").unlink()
            (directory / "metrics.jsonl").unlink(missing_ok=True)
            remove_requests(directory)
            for name in (*FOLDERS, RAY_FOLDER):
                shutil.rmtree(directory / name, ignore_errors=True)
            if not any(directory.iterdir()):
                directory.rmdir()
    except OSError:
        return  # the folder has become unreachable; the next command judges its contents


def _checkpoints_elsewhere(config: TrainConfig) -> list[int]:
    """Refuse a folder without `run.json` that cannot be this run's. Returns the steps of checkpoints elsewhere to resume from."""
    directory = config.output_dir
    foreign = directory.exists() and (not directory.is_dir() or any(not _left_by_a_start(path.name) for path in directory.iterdir()))
    # another machine's run: its options are compared with this run's when the checkpoint is read
    elsewhere = whole(config.checkpoint_dir) if not foreign and config.checkpoint_dir else []
    if elsewhere and config.resume == "false":
        raise OutputError(f"{config.checkpoint_dir} holds checkpoints of a run; add --resume true to go on, or choose another")
    if not elsewhere and config.resume == "true":
        raise OutputError(f"nothing to resume in {directory}: it has no run.json; leave --resume out, or correct --output_dir")
    if foreign:
        raise OutputError(f"{directory} exists and is not a run of pi0fm; choose another --output_dir")
    return elsewhere


def _left_by_a_start(name: str) -> bool:
    return name.startswith(".")  # a lease, temporary files of a killed start, files of file managers


def _read(config: TrainConfig) -> dict[str, Any]:
    record = config.output_dir / "run.json"
    try:
        found = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{record} is not readable ({error}); choose another --output_dir") from None
    if "global_batch_size" not in found:
        raise OutputError(f"{record} is not of a run of pi0fm; choose another --output_dir")
    return found
