"""Resuming a run from its newest checkpoint.

Owns: what must agree between run and checkpoint, the status lines. Does not know: the files, the tensors.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pi0fm import progress
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.facts import RunFacts, versions
from pi0fm.train.config import changed_options
from pi0fm.train.optim import learning_rate
from pi0fm.train.parallel.context import Context
from pi0fm.train.state import TrainState
from pi0fm_client.errors import ConfigError, DatasetError, OutputError


def restore(state: TrainState, checkpoints: Checkpoints, run: RunFacts, context: Context, *, changed_allowed: bool) -> None:
    """Restore `state` from the newest whole checkpoint, if there is one.

    changed_allowed: differences from the checkpoint's run are printed instead of refused. Raises what `refuse_changed` and
    `Checkpoints.restore` raise.
    """

    def check(facts: Mapping[str, Any]) -> None:
        step = int(facts["step"])
        if step > run.steps:
            raise OutputError(f"{checkpoints.place} holds a checkpoint of step {step}, beyond steps {run.steps}; raise --steps")
        if not changed_allowed:
            refuse_changed(checkpoints.place, facts, run)

    found = checkpoints.restore(state.tensors(), lambda index: check(index.facts))
    if found is not None:
        state.step = int(found.facts["step"])
        if context.is_first:
            _say_resumed(found.facts, run, context)


def refuse_changed(place: Path | str, old: Mapping[str, Any], run: RunFacts) -> None:
    """Raise ConfigError or DatasetError that lists the differences between a checkpoint's facts and the run to resume from it."""
    data, settings = _changes(old, run)
    how = "resume it as it was, choose another output_dir, or add --resume_changed true"
    if settings:
        raise ConfigError(f"{place} holds a run with another configuration: {'; '.join(settings)}; {how}")
    if data:
        raise DatasetError(f"the data set is not the one that {place} was trained on: {'; '.join(data)}; {how}")


def _say_resumed(old: Mapping[str, Any], run: RunFacts, context: Context) -> None:
    data, settings = _changes(old, run)
    if other := _differences(old["versions"], versions()):
        progress.say(f"the checkpoint was written with other versions, so the run may differ in the last bits: {'; '.join(other)}")
    if data + settings:
        progress.say(f"the run goes on with changes: {'; '.join(data + settings)}")
    if context.is_first:
        workers = f", which {old['world_size']} workers wrote" if old["world_size"] != context.world_size else ""
        progress.say(f"resumed from step {old['step']}{workers}")
    step, before = int(old["step"]), old["schedule"]
    rate = learning_rate(run.optimizer, step, run.steps)
    if context.shown and before["steps"] != run.steps and not math.isclose(rate, before["next_learning_rate"], rel_tol=1e-6):
        progress.say(
            f"the learning rate now falls until step {run.optimizer.decay_steps or run.steps}, before until {before['steps']}: "
            f"{rate:.3g} now, {before['next_learning_rate']:.3g} then; --optimizer.decay_steps {before['steps']} keeps the old schedule, "
            "and its last rate from there on"
        )


def _changes(old: Mapping[str, Any], run: RunFacts) -> tuple[list[str], list[str]]:
    return _differences(old["data"], run.data), changed_options(old["configuration"], run.configuration)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Format `name was X, now Y` for every name whose value differs."""
    return [
        f"{name} was {old.get(name)}, now {new.get(name)}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
    ]
