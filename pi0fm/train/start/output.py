"""Whose output folder it is.

Owns: the claim on a folder before any worker starts. Does not know: what is written there later.
"""

import json
import shutil
from typing import Any

from pi0fm import files, options
from pi0fm.train.checkpoint.checkpoints import whole
from pi0fm.train.config import TrainConfig, refuse_other_run
from pi0fm.train.watch.signals import withdraw
from pi0fm_client.errors import OutputError

RAY_FOLDER = "ray"  # where Ray Train keeps its own notes of the run


def claim(config: TrainConfig) -> None:
    """Write `run.json` into an empty or new `output_dir`; under `resume` it must be there and say the same, but for what may change.

    Raises OutputError or ConfigError otherwise, with nothing touched.
    """
    directory = config.output_dir
    record = directory / "run.json"
    if record.exists():
        if config.resume == "false":
            raise OutputError(f"{directory} holds a run; add --resume true to go on with it, or choose another --output_dir")
        refuse_other_run(_read(config), options.encode(config), directory)
    else:
        foreign = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
        # another machine's run: what it was is held against this one when its checkpoint is read
        elsewhere = not foreign and bool(config.checkpoint_dir) and bool(whole(config.checkpoint_dir))
        if elsewhere and config.resume == "false":
            raise OutputError(f"{config.checkpoint_dir} holds checkpoints of a run; add --resume true to go on, or choose another")
        if not elsewhere and config.resume == "true":
            raise OutputError(f"nothing to resume in {directory}: it has no run.json; leave --resume out, or correct --output_dir")
        if foreign:
            raise OutputError(f"{directory} exists and is not a run of pi0fm; choose another --output_dir")
    files.write_json(record, options.encode(config))
    withdraw(directory)


def release(config: TrainConfig) -> None:
    """Give up a claim under which nothing was trained: a corrected command may then use the folder. Called after a fault of the input."""
    directory = config.output_dir
    if not (directory / "metrics.jsonl").exists() and not (directory / "checkpoints").exists():
        (directory / "run.json").unlink(missing_ok=True)
        shutil.rmtree(directory / RAY_FOLDER, ignore_errors=True)
        if not any(directory.iterdir()):
            directory.rmdir()


def _read(config: TrainConfig) -> dict[str, Any]:
    record = config.output_dir / "run.json"
    try:
        return dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{record} is not readable ({error}); choose another --output_dir") from None
