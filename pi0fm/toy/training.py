"""One training loop for every method: a budget of processor time, and the held-out NLL along it.

Owns: the clock, the learning rate, the averaged weights, the curve. Does not know: what a loss computes, how an NLL is computed.

    charged      fresh batch -> loss -> gradient -> Adam -> average            | until the seconds (or the steps) are spent
    not charged  held-out NLL of the averaged weights at each mark of the budget

    marks        1/64 . 1/45 . 1/32 . ... . 1/2 . 1/1.4 . 1      a factor sqrt(2) apart

All methods share the optimiser, the shape of the learning rate (a short warm-up, then a half cosine over the budget) and the average.
The clock is the process's processor time: another program on the machine changes wall time, not this. With one torch thread the two are
the same on an idle machine.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pi0fm.flow.checks import FlowError
from pi0fm.toy.datasets import Dataset
from pi0fm.toy.methods import Method
from pi0fm.toy.network import PlaneField
from pi0fm_client.errors import ConfigError

WARM_UP = 0.02
AVERAGE_POWER = 16.0
MARKS = tuple(2 ** (-k / 2) for k in range(12, -1, -1))
LARGEST_GRADIENT_NORM = 5.0


@final
@dataclass(frozen=True)
class Budget:
    """What a training may spend: processor seconds, or a number of steps (the same result on every machine)."""

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ConfigError("a budget is either seconds or steps; give one of the two")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds of training must be above 0, found {self.seconds}; try 20")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps of training must be at least 1, found {self.steps}; try 2000")

    def spent(self, seconds: float, steps: int) -> float:
        """The spent part, 1 or more at the end."""
        return seconds / self.seconds if self.seconds is not None else steps / (self.steps or 1)


@final
@dataclass(frozen=True)
class Mark:
    """Held-out NLL in nats of the averaged weights after so many seconds and steps of training."""

    seconds: float
    steps: int
    nll: float


@final
@dataclass(frozen=True)
class Trained:
    """A network with averaged weights, and how it came to be. `seconds` and `steps` are those of the last mark."""

    network: PlaneField
    curve: tuple[Mark, ...]

    @property
    def seconds(self) -> float:
        """Processor seconds of the whole training."""
        return self.curve[-1].seconds

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.curve[-1].steps


def train(
    method: Method,
    dataset: Dataset,
    budget: Budget,
    seed: int,
    held_out_nll: Callable[[PlaneField], float],
    watch: Callable[[float, str], None],
) -> Trained:
    """Train a new network by `method` until the budget is spent.

    held_out_nll: called off the clock at every mark. watch: called with the spent part in (0, 1] and a note after every step.
    Every batch is fresh; initial weights, data and noise are functions of `seed`.
    Raises FlowError when the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(seed)
    network = PlaneField(generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=method.learning_rate, betas=(0.9, 0.99), fused=True)
    average = _Average(network)
    curve: list[Mark] = []
    marks = iter(MARKS)
    due, steps, charged, spent = next(marks), 0, 0.0, 0.0
    began = time.process_time()
    while spent < 1:
        for group in optimizer.param_groups:
            group["lr"] = method.learning_rate * rate(spent)
        loss = method.loss(network, dataset.sample(method.global_batch_size, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT_NORM)
        optimizer.step()
        steps += 1
        average.update(network, steps)
        seconds = charged + time.process_time() - began
        spent = budget.spent(seconds, steps)
        if not math.isfinite(float(norm)):
            raise FlowError(
                f"{method.title}: the gradient must stay finite, found {float(norm)} at step {steps}; try another path or prediction"
            )
        if spent >= due:
            charged = seconds
            nll = held_out_nll(average.network)
            curve.append(Mark(seconds, steps, nll))
            due = next((mark for mark in marks if mark > spent), math.inf)
            began = time.process_time()
        watch(min(spent, 1.0), f"step {steps}, NLL {curve[-1].nll:.3f}" if curve else f"step {steps}")
    return Trained(average.network, tuple(curve))


def rate(spent: float) -> float:
    """The learning rate's factor when a part `spent` of the budget is used: linear warm-up, then half a cosine to 0."""
    if spent < WARM_UP:
        return (spent + WARM_UP / 10) / (1.1 * WARM_UP)
    return (1 + math.cos(math.pi * min(1.0, (spent - WARM_UP) / (1 - WARM_UP)))) / 2


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside: then processor seconds are seconds, and all methods have the same machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@final
class _Average:
    """The weights' average with weight k^16 for step k: about the last seventeenth of the training, however long it is."""

    def __init__(self, network: PlaneField) -> None:
        self._network = copy.deepcopy(network).requires_grad_(False).eval()
        self._vector: Tensor = parameters_to_vector(self._network.parameters())

    @torch.no_grad()
    def update(self, network: PlaneField, step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
        self._vector.lerp_(parameters_to_vector(network.parameters()), 1 - (1 - 1 / step) ** (AVERAGE_POWER + 1))

    @property
    def network(self) -> PlaneField:
        """The network with the averaged weights, as of now."""
        vector_to_parameters(self._vector.clone(), self._network.parameters())
        return self._network
