"""Where a run's numbers go beside metrics.jsonl: TensorBoard, trackio, Weights & Biases, MLflow.

Owns: the words of --tracker, their libraries, the name that a run has there. Does not know: what the numbers mean; accelerate's trackers
(parallel/accelerate.py), which talk to the libraries.

    tensorboard   OUTPUT_DIR/tensorboard                     trackio   its own folder, TRACKIO_DIR, where `trackio show` looks
    wandb         OUTPUT_DIR/wandb; WANDB_MODE=offline       mlflow    MLFLOW_TRACKING_URI, else OUTPUT_DIR/mlflow/mlflow.db

A run that goes on is the same run for wandb and trackio, and another one of the same name for MLflow. A tracker that fails later than at
its start is dropped with a line: no run ends for its charts.
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
    """Raise ConfigError for a word that names no tracker, or one twice."""
    for name in names:
        if name not in LIBRARIES:
            raise ConfigError(f"unknown tracker {name!r}: {options.nearest(name, list(LIBRARIES))}")
    if len(set(names)) < len(names):
        raise ConfigError(f"tracker must name each once, found {', '.join(names)}")


def refuse_missing(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker whose library is not installed here."""
    for name in names:
        if importlib.util.find_spec(LIBRARIES[name]) is None:
            typed = "'pi0fm[train]', or pi0fm[all]" if name == TENSORBOARD else f"'pi0fm[{name}]', or --tracker tensorboard"
            raise ConfigError(f"tracker {name} needs its library, found none; type pip install {typed}")


@final
class Tracker:
    """One of trackio, wandb and mlflow, for the first worker of a run. Raises ConfigError where it cannot start."""

    def __init__(self, name: str, output_dir: Path, config: Mapping[str, Any]) -> None:
        from pi0fm.train.parallel.accelerate import open_tracker  # torch, which no check of options needs

        self._name = name
        try:
            self._inner: Any = open_tracker(name, PROJECT, _arguments(name, output_dir))
            self._inner.store_init_configuration({key: _plain(value) for key, value in options.flat(config).items()})
        except Exception as error:
            more = "; type WANDB_MODE=offline in front, or wandb login" if name == "wandb" else ""
            raise ConfigError(f"tracker {name} must start with the run, found {type(error).__name__}: {error}{more}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step."""
        if self._inner is not None:
            self._guarded(lambda: self._inner.log(dict(values), step=step))

    def close(self) -> None:
        """Hand over what is left."""
        if self._inner is not None:
            self._guarded(self._inner.finish)

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  the library's and its service's; the run goes on
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
