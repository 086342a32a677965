"""Trackers that receive a run's metrics besides metrics.jsonl: TensorBoard, trackio, Weights & Biases, MLflow.

Owns: the values of --tracker, their libraries, the name of a run in each. Does not know: the meaning of the numbers; accelerate's trackers
(parallel/accelerate.py), which call the libraries.

    tensorboard   OUTPUT_DIR/tensorboard                     trackio   TRACKIO_DIR, which `trackio show` reads
    wandb         OUTPUT_DIR/wandb; WANDB_MODE=offline       mlflow    MLFLOW_TRACKING_URI, else OUTPUT_DIR/mlflow/mlflow.db

A resumed run is the same run in wandb and trackio, and another of the same name in MLflow. A tracker that fails after its start is dropped
with a status line: it never ends a run.
"""

import hashlib
import importlib.util
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from pi0fm import files, options, progress
from pi0fm_client.errors import ConfigError

TENSORBOARD, PROJECT = "tensorboard", "pi0fm"
LIBRARIES = {TENSORBOARD: "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}
FOLDERS = (TENSORBOARD, "wandb", "mlflow")  # of an output folder


def refuse_unknown(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown or repeated tracker."""
    for name in names:
        if name not in LIBRARIES:
            raise ConfigError(f"unknown tracker {name!r}: {options.nearest(name, list(LIBRARIES))}")
    if len(set(names)) < len(names):
        raise ConfigError(f"tracker must name each once, found {', '.join(names)}")


def refuse_missing(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker whose library is not installed."""
    for name in names:
        if importlib.util.find_spec(LIBRARIES[name]) is None:
            typed = "'pi0fm[train]', or pi0fm[all]" if name == TENSORBOARD else f"'pi0fm[{name}]', or --tracker tensorboard"
            raise ConfigError(f"tracker {name} needs its library, found none; type pip install {typed}")


@final
class Tracker:
    """Tracker of trackio, wandb or mlflow, for the first worker of a run. Raises ConfigError where it cannot start."""

    def __init__(self, name: str, output_dir: Path, config: Mapping[str, Any]) -> None:
        from pi0fm.train.parallel.accelerate import open_tracker  # imports torch, which checking options does not need

        self._name = name
        try:
            self._inner: Any = open_tracker(name, str(config.get("tracker_project", PROJECT)), _arguments(name, output_dir))
            self._inner.store_init_configuration({key: _plain(value) for key, value in options.flat(config).items()})
        except Exception as error:
            more = "; type WANDB_MODE=offline in front, or wandb login" if name == "wandb" else ""
            raise ConfigError(f"tracker {name} must start with the run, found {type(error).__name__}: {error}{more}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        if self._inner is not None:
            self._guarded(lambda: self._inner.log(dict(values), step=step))

    def close(self) -> None:
        """Send what remains, and close the tracker."""
        if self._inner is not None:
            self._guarded(self._inner.finish)

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  errors of the library or its service; the run goes on
            self._inner = None
            progress.say(f"tracker {self._name} is dropped, the run goes on: {type(error).__name__}: {' '.join(str(error).split())}")


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _arguments(name: str, output_dir: Path) -> dict[str, Any]:
    run = output_dir.name
    if name == "mlflow":
        if "MLFLOW_TRACKING_URI" not in os.environ:
            import mlflow

            files.make_folder(output_dir / "mlflow")
            mlflow.set_tracking_uri(f"sqlite:///{output_dir.absolute()}/mlflow/mlflow.db")
        return {"run_name": run}
    if name == "trackio":
        return {"name": run, "resume": "allow", "embed": False}
    place = f"{socket.gethostname()}:{output_dir.absolute()}"
    return {"name": run, "dir": str(output_dir), "id": hashlib.sha256(place.encode()).hexdigest()[:16], "resume": "allow"}
