"""All that a run is made of at one step: tensors by name, and facts that say whose they are.

Owns: the one tree that is saved, what is compared at a resume. Does not know: files, workers that share the writing.

    model/NAME                  weights and buffers
    moments/NAME/exp_avg(_sq)   AdamW's, by the parameter's name, so that no order is relied on
    moments/step                its count, one for all parameters
    average/NAME                the moving average, where one is kept
    facts                       step, position, schedule, data, configuration, versions
"""

import hashlib
import platform
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor, nn

from pi0fm import options, progress
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.order.orders import Weighted
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.index import Index
from pi0fm.train.config import TrainConfig, changed_options
from pi0fm.train.ema import Ema
from pi0fm.train.optim import ClippedAdamW, learning_rate
from pi0fm.train.parallel.accelerate import Context
from pi0fm_client.errors import ConfigError, DatasetError, OutputError

_COUNT = "moments/step"


def tensors(model: nn.Module, optimizer: ClippedAdamW, ema: Ema) -> dict[str, Tensor]:
    """Every tensor of a run by name, the very ones that train; an optimiser that has not stepped is given room for its moments."""
    optimizer.make_room()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {f"model/{name}": value for name, value in model.state_dict().items()}
    for parameter, held in optimizer.state.items():
        name = names[id(parameter)]
        found |= {f"moments/{name}/{moment}": held[moment] for moment in ("exp_avg", "exp_avg_sq")}
        found[_COUNT] = held["step"]
    return found | {f"average/{name}": value for name, value in ema.average.items()}


def data_facts(source: LeRobotSource, stats: NormStats, order: Weighted | None = None) -> dict[str, Any]:
    """What a data set holds, wherever it lies: copied to another disk it is the same, with one more episode it is another.

    order: that of its samples, where they have weights.
    """
    columns = hashlib.blake2b(digest_size=16)
    for column in (source.state, source.action, source.episode, source.task, source.end, source.frames):
        columns.update(np.ascontiguousarray(column))
    files = {
        path.relative_to(source.root).as_posix(): path.stat().st_size
        for path in source.root.rglob("*")
        if path.suffix in (".mp4", ".parquet")
    }
    return {
        "frames": len(source.frames),
        "episodes": len(np.unique(source.episode[source.frames])),
        "columns": columns.hexdigest(),
        "tasks": _digest(source.tasks),
        "files": _digest(sorted(files.items())),
        "norm_stats": _digest(stats.to_json()),
        **({} if order is None else {"sample_weights": _digest(order.cumulative.tolist())}),
    }


def facts(config: TrainConfig, data: Mapping[str, Any], world_size: int, step: int) -> dict[str, Any]:
    """What is saved beside the tensors after `step` steps; plain JSON."""
    rate = learning_rate(config.optimizer, step, config.steps)
    return {
        "step": step,
        "position": step * config.global_batch_size,
        "schedule": {"next_learning_rate": rate, "steps": config.steps},
        "world_size": world_size,
        "data": dict(data),
        "configuration": options.encode(config),
        "versions": dict(_versions()),
    }


@cache
def _versions() -> dict[str, str]:
    """Read once: each is a file, and a checkpoint is waited for."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("torch", "numpy", "transformers", "accelerate")
    }


def restore(
    config: TrainConfig,
    context: Context,
    checkpoints: Checkpoints,
    state: dict[str, Tensor],
    make_facts: Callable[[int], dict[str, Any]],
) -> int:
    """Go on from the newest whole checkpoint: its step, or 0 where there is none.

    Raises ConfigError or DatasetError with what differs between that run and this one, unless `resume_changed`; OutputError for a
    checkpoint beyond `config.steps`.
    """

    def check(index: Index) -> None:
        step = int(index.facts["step"])
        if step > config.steps:
            raise OutputError(f"{config.checkpoint_place} holds a checkpoint of step {step}, beyond steps {config.steps}; raise --steps")
        refuse_changed(config, index.facts, make_facts(step), shown=context.is_first)

    found = checkpoints.restore(state, check)
    if found is None:
        return 0
    step, workers = int(found.facts["step"]), int(found.facts["world_size"])
    if context.shown:
        other = f", which {workers} workers wrote" if workers != context.world_size else ""
        progress.say(f"resumed from step {step}{other}")
    return step


def refuse_changed(config: TrainConfig, old: Mapping[str, Any], new: Mapping[str, Any], *, shown: bool) -> None:
    """Hold the facts of a checkpoint against those of the run that would go on from it. Other versions are said, and go on."""
    data = differences(old["data"], new["data"])
    settings = changed_options(old["configuration"], new["configuration"])
    versions = differences(old["versions"], new["versions"])
    if shown and versions:
        progress.say(f"the checkpoint is of other versions, so the run may differ in the last bits: {'; '.join(versions)}")
    if config.resume_changed:
        if shown and data + settings:
            progress.say(f"the run goes on with changes: {'; '.join(data + settings)}")
        return
    how = "resume it as it was, choose another output_dir, or add --resume_changed true"
    if settings:
        raise ConfigError(f"{config.checkpoint_place} holds a run with another configuration: {'; '.join(settings)}; {how}")
    if data:
        raise DatasetError(f"the data set is not the one that {config.checkpoint_place} was trained on: {'; '.join(data)}; {how}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name was X, now Y` for every name whose value differs."""
    return [
        f"{name} was {old.get(name)}, now {new.get(name)}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
    ]


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
