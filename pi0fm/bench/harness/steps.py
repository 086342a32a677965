"""A chunk and an optimiser step of LeRobot's PI0 and of ours on given tensors, and the time of our step by part.

Owns: each side's call, the time marks around the parts of `train_step`. Does not know: LeRobot's library, data sets, limits.

    ours       train.step.train_step, the function of `pi0fm train`, with accelerate's precision; then the moving average, if any
    LeRobot    its model's forward with noise and time given -> mean -> backward -> clip -> AdamW, as its `update_policy` does

    next(batches)    forward, loss    accelerator.backward    clip, optimizer.step    the average
    | data           | forward        | backward              | optimizer             | average      |

On CUDA a mark is an event in the stream, so the host does not wait; on a CPU it is the clock.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from pi0fm.bench.harness.cases import FLOW_STEPS
from pi0fm.data.loading.batch import Batch
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.pi0 import Pi0
from pi0fm.train.parallel.accelerate import Accelerator, Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.state import StateConfig, TrainState
from pi0fm.train.step import train_step

PARTS = ("data", "forward", "backward", "optimizer", "average")


@final
class StepClock:
    """Clock of the parts of several steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, ended: str) -> None:
        """Mark the end of a part; an empty name starts a step."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((ended, event))
        else:
            self._marks.append((ended, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Wait for the device; returns the sum over the steps since the last call, by part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (ended, after) in itertools.pairwise(self._marks):
            if ended:
                found[ended] += before.elapsed_time(after) / 1e3 if self._device.type == "cuda" else after - before
        self._marks.clear()
        return found


@final
@dataclass(frozen=True)
class Trainer:
    """Training in one worker, as `pi0fm train` sets it up."""

    state: TrainState
    parallel: Parallel
    flow: FlowMatching = field(default_factory=lambda: FlowMatching.from_config(FlowConfig()))

    def __post_init__(self) -> None:
        self.state.prepare(self.parallel)

    @classmethod
    def for_network(cls, model: Pi0, precision: str, device: torch.device, config: StateConfig | None = None) -> "Trainer":
        """Build the training of `model`. precision: as `pi0fm train --precision`."""
        parallel = Parallel(Context(), precision, allow_cuda=device.type == "cuda")
        return cls(TrainState(model.to(parallel.device), config or StateConfig()), parallel)

    def step(self, batches: Iterator[Batch], valid: int, mark: Callable[[str], object] | None = None) -> Tensor:
        """Take a step and return its loss, on the device. valid: as `train_step` takes it. mark: called at the end of each part."""
        ended = mark or (lambda _: None)
        accelerator: Any = self.parallel.accelerator if mark is None else _MarkedAccelerator(self.parallel.accelerator, mark)
        state, clip_norm = self.state, self.state.config.optimizer.clip_norm
        ended("")
        loss, _ = train_step(state.trained, self.flow, state.optimizer, accelerator, _mark_data(batches, ended), valid, clip_norm)
        ended("optimizer")
        state.advance()
        ended("average")
        return loss

    def step_on(self, batch: Batch) -> Callable[[], float]:
        """Build a step on `batch`, which it trims each time as the chain does."""
        batches = (replace(batch, observation=batch.observation.trimmed()) for _ in itertools.count())
        valid = int(batch.action_mask.sum()) * batch.uniform.shape[1]
        return lambda: float(self.step(batches, valid))


def _mark_data(batches: Iterator[Batch], mark: Callable[[str], object]) -> Iterator[Batch]:
    for batch in batches:
        mark("data")
        yield batch


class _MarkedAccelerator:
    """accelerate's Accelerator, with a mark before and after the backward pass."""

    def __init__(self, inner: Accelerator, mark: Callable[[str], object]) -> None:
        self._inner, self._mark = inner, mark

    def backward(self, loss: Tensor) -> None:
        self._mark("forward")
        self._inner.backward(loss)
        self._mark("backward")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def their_prefix(observation: ModelObservation, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Pictures in [-1, 1], their masks, tokens and mask, as LeRobot's `predict_action_chunk` and `forward` pass them to its model."""
    seen = observation.to(device)
    cameras = range(seen.images.shape[1])
    pictures, masks = [pixels(seen.images[:, camera]) for camera in cameras], [seen.image_mask[:, camera] for camera in cameras]
    return pictures, masks, seen.prompt_tokens, seen.prompt_mask


def their_sampler(model: Any, observation: ModelObservation, noise: Tensor) -> Callable[[], Tensor]:
    """Build the sampling of a chunk by LeRobot's `PI0Pytorch`, from tensors on the device of `noise`."""
    prefix, state = their_prefix(observation, noise.device), observation.state.to(noise.device)
    model.eval()
    return lambda: model.sample_actions(*prefix, state, noise=noise, num_steps=FLOW_STEPS)


def their_loss(model: nn.Module, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """Build the mean loss of LeRobot's `PI0Pytorch` with one draw per observation, its tensors prepared now; its time is 1 - t."""
    prefix, state = their_prefix(batch.observation, device), batch.observation.state.to(device)
    actions, noise = batch.actions.to(device), batch.noise[:, 0].to(device)
    time = (1.0 - FlowMatching.from_config(FlowConfig()).times(batch.uniform[:, 0])).to(device)
    return lambda: model(*prefix, state, actions, noise, time).mean()


def their_step(
    loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, clip_norm: float, autocast: torch.device | None = None
) -> Callable[[], float]:
    """Build a step of the parameters in `optimizer`. autocast: the device on which the forward pass is in bfloat16."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> float:
        with torch.autocast("cpu" if autocast is None else autocast.type, torch.bfloat16, enabled=autocast is not None):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step
