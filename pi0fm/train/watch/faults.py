"""Faults during a run: a loss that is not finite, and a disk that cannot be written.

Owns: the record of the batch behind a loss that is not finite, whether that loss ends the run, the status lines.
Does not know: the network. The step was already refused on the device (train/optim.py); here the host reads the norm.

    <output_dir>/faults/step-000000038/fault.json                       place in the stream, episodes, norm of the gradient
                                       worker-00000-part-000.safetensors  inputs of the network, noise and times included

    device   | step k | step k+1 |            the norm of step k is copied while step k+1 runs: no host sync
    host              | norm of k? -> keep the batch, skip or stop
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from pi0fm import files, progress
from pi0fm.data.loading.loader import BatchMaker, Collator
from pi0fm.data.loading.mixture import MixtureCollator
from pi0fm.data.order.orders import deal
from pi0fm.data.order.split import split
from pi0fm.train.parallel.context import Context
from pi0fm_client.errors import OutputError, Pi0fmError

SKIPS_IN_A_ROW = 10


class NonfiniteError(Pi0fmError):
    """A loss or gradient that is not finite under on_nonfinite stop, or too many of them in a row under skip."""


@dataclass(frozen=True)
class _PendingNorm:
    """Gradient norm that is being copied to the host. event: recorded after the copy, None on a CPU."""

    step: int
    norm: Tensor
    event: torch.cuda.Event | None


@dataclass(frozen=True)
class FaultConfig:
    """Policy for a loss that is not finite. folder: of the kept batches; skip: continue without the step, else stop."""

    folder: Path
    skip: bool
    global_batch_size: int
    micro_batch_size: int | None


@final
class NonfiniteWatch:
    """Watch the gradient norms, which are the same on all workers, so that all decide alike without communication."""

    def __init__(self, config: FaultConfig, context: Context, collator: BatchMaker) -> None:
        self._config, self._context, self._collator = config, context, collator
        self._pending: deque[_PendingNorm] = deque()
        self._in_a_row = 0

    def after_step(self, step: int, norm: Tensor) -> None:
        """Record the norm of step `step`, counted from 1, and judge those that have arrived. Raises NonfiniteError by policy."""
        event = None
        norm = norm.detach()
        if norm.is_cuda:
            norm = torch.empty_like(norm, device="cpu", pin_memory=True).copy_(norm, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append(_PendingNorm(step, norm, event))
        while len(self._pending) > (0 if event is None else 1):
            self._check(self._pending.popleft())

    def settle(self) -> None:
        """Judge every recorded norm; called before a checkpoint and at the end."""
        while self._pending:
            self._check(self._pending.popleft())

    def _check(self, noted: _PendingNorm) -> None:
        if noted.event is not None:
            noted.event.synchronize()
        norm = float(noted.norm)
        if np.isfinite(norm):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        place = self._config.folder / f"step-{noted.step:09d}"
        culprits = self._keep_batch(place, noted.step, norm)
        inputs = f"its {culprits} are not finite" if culprits else "the network's inputs are finite"
        line = f"step {noted.step}: the loss or its gradient is not finite (norm {norm}); {inputs}; the batch is kept in {place}"
        if not self._config.skip:
            hint = "correct the data set" if culprits else "lower optimizer.learning_rate"
            raise NonfiniteError(f"{line}; {hint}, or add --resume true --on_nonfinite skip")
        if self._in_a_row >= SKIPS_IN_A_ROW:
            raise NonfiniteError(f"{line}; {SKIPS_IN_A_ROW} steps in a row are more than on_nonfinite skip allows; resume an earlier run")
        if self._context.is_first:
            progress.say(f"{line}; the step is skipped")

    def _keep_batch(self, place: Path, step: int, norm: float) -> str:
        """Write this worker's part of the batch, collated again from its place in the stream. Returns the names of non-finite inputs."""
        first = (step - 1) * self._config.global_batch_size
        culprits: set[str] = set()
        parts = split(self._config.global_batch_size, self._context.rank, self._context.world_size, self._config.micro_batch_size)
        for part, (offset, count) in enumerate(parts):
            tensors = self._collator(first + offset, count).named()
            culprits |= {name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())}
            name = f"worker-{self._context.rank:05d}-part-{part:03d}.safetensors"
            files.write_bytes(place / name, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        if self._context.is_first:
            files.write_json(place / "fault.json", self._facts(step, first, norm))
        return " and ".join(sorted(culprits))

    def _facts(self, step: int, first: int, norm: float) -> dict[str, Any]:
        positions = np.arange(first, first + self._config.global_batch_size)
        return {
            "step": step,
            "gradient_norm": str(norm),
            "stream_positions": [first, int(positions[-1])],
            "workers": self._context.world_size,
            "datasets": [_located(part, at) for part, at in _parts(self._collator, positions)],
        }


@contextmanager
def write_faults(output_dir: Path) -> Iterator[None]:
    """Raise OutputError for a write fault as `files.write_faults` does, adding how to resume. Faults outside `output_dir` pass."""
    try:
        with files.write_faults(output_dir):
            yield
    except OutputError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        if cause.filename is not None and not Path(cause.filename).absolute().is_relative_to(output_dir.absolute()):
            raise cause from None
        raise OutputError(f"{error}, then add --resume true") from cause


def _parts(maker: BatchMaker, positions: NDArray[np.int64]) -> list[tuple[Collator, NDArray[np.int64]]]:
    """List the data sets behind positions of the stream, each with the positions in that data set's stream."""
    if isinstance(maker, MixtureCollator):
        part, position = deal(maker.weights, positions)
        return [(collator, position[part == number]) for number, collator in enumerate(maker.parts)]
    assert isinstance(maker, Collator)
    return [(maker, positions)]


def _located(collator: Collator, positions: NDArray[np.int64]) -> dict[str, Any]:
    source, at = collator.source, collator.samples_at(positions)
    frames = source.frames[at.index]
    episodes = source.episode[frames].tolist()
    return {"root": str(source.root), "epochs": at.epoch.tolist(), "frames": frames.tolist(), "episodes": episodes}
