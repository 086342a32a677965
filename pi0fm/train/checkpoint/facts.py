"""Facts about a run in its checkpoints, besides tensors.

Owns: step, position, schedule, data, configuration and versions as plain JSON. Does not know: tensors, files, what must agree on resume.
"""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np

from pi0fm.data.columns.lerobot_source import LeRobotSource, data_files
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.order.orders import Weighted
from pi0fm.train.components import OptimizerConfig
from pi0fm.train.optim import learning_rate


@dataclass(frozen=True)
class RunFacts:
    """Facts known before the first step. configuration: the run's options as a plain mapping; data: `data_facts` of its data sets."""

    configuration: Mapping[str, Any]
    data: Mapping[str, Any]
    steps: int
    global_batch_size: int
    optimizer: OptimizerConfig
    world_size: int

    def at(self, step: int) -> dict[str, Any]:
        """Return the facts to save with the tensors after `step` steps."""
        return {
            "step": step,
            "position": step * self.global_batch_size,
            "schedule": {"next_learning_rate": learning_rate(self.optimizer, step, self.steps), "steps": self.steps},
            "world_size": self.world_size,
            "data": dict(self.data),
            "configuration": dict(self.configuration),
            "versions": dict(versions()),
        }


def data_facts(source: LeRobotSource, stats: NormStats, order: Weighted | None = None) -> dict[str, Any]:
    """Describe the contents of a data set independently of its path: a copy has the same facts, one with another episode has not.

    order: of the samples, where they have weights.
    """
    files = {path.relative_to(source.root).as_posix(): path.stat().st_size for path in data_files(source.root)}
    return {
        "frames": len(source.frames),
        "episodes": len(np.unique(source.episode[source.frames])),
        "columns": columns_digest(source),
        "tasks": _digest(source.tasks),
        "files": _digest(sorted(files.items())),
        "norm_stats": _digest(stats.to_json()),
        **({} if order is None else {"sample_weights": _digest(order.cumulative.tolist())}),
    }


def columns_digest(source: LeRobotSource) -> str:
    """Hash the contents of a data set's columns; the same for a copy."""
    columns = hashlib.blake2b(digest_size=16)
    for column in (source.state, source.action, source.episode, source.task, source.end, source.frames):
        columns.update(np.ascontiguousarray(column))
    return columns.hexdigest()


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries, cached, since each is a file to read and training waits for a checkpoint's copy."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("torch", "numpy", "transformers", "accelerate")
    }


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
