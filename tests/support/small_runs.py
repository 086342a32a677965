"""Runs in the test's process: started, killed in a step, and their bundles compared bitwise."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi0fm.train import loop
from pi0fm.train.config import TrainConfig
from pi0fm.train.loop import TrainResult, train
from pi0fm.train.parallel.context import Context
from pi0fm.train.start.output import claim

ALONE = Context(shown=False)


def start(config: TrainConfig) -> TrainResult:
    """Claim the folder and train, as one worker."""
    claim(config)
    return train(ALONE, config)


def start_and_die(config: TrainConfig, steps: int) -> None:
    """`start`, killed in the step after `steps`."""
    real, calls = loop.train_step, iter(range(steps))

    def mortal(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", mortal)
        with pytest.raises(KeyboardInterrupt):
            start(config)


def weights(found: TrainResult | Path) -> dict[str, torch.Tensor]:
    """The tensors of a bundle."""
    return load_file((found if isinstance(found, Path) else found.bundle) / "model.safetensors")


def differing(found: TrainResult | Path, expected: TrainResult | Path) -> list[str]:
    """The names of the tensors that differ in any bit."""
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
