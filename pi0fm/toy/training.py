"""Training loop of every method: a budget of processor time, and the held-out NLL along it.

Owns: the clock, the learning rate, the averaged weights, the curve. Does not know: losses, the computation of an NLL.

    charged      fresh batch -> loss -> gradient -> Adam -> average            | until the seconds (or the steps) are spent
    not charged  held-out NLL of the averaged weights at each mark of the budget

    marks        1/64 . 1/45 . 1/32 . ... . 1/2 . 1/1.4 . 1      a factor sqrt(2) apart

Processor time, unlike wall time, does not depend on other programs.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from pi0fm import progress
from pi0fm.flow.checks import FlowError
from pi0fm.toy.datasets import Dataset
from pi0fm.toy.methods import Method, PlaneField

LEARNING_RATE, WARM_UP, LARGEST_GRADIENT_NORM = 1e-2, 0.02, 5.0
AVERAGE_POWER = 16
MARKS = tuple(2 ** (-k / 2) for k in range(12, -1, -1))


class NllAtMark(NamedTuple):
    """Held-out NLL, in nats, of the averaged weights after a number of processor seconds and steps."""

    seconds: float
    steps: int
    nll: float


def train(
    method: Method,
    dataset: Dataset,
    seed: int,
    held_out_nll: Callable[[PlaneField], float],
    *,
    seconds: float | None = None,
    steps: int | None = None,
) -> tuple[PlaneField, tuple[NllAtMark, ...]]:
    """Train a new network by `method` for `seconds` of processor time or for `steps` (the same result at every run).

    Return it with averaged weights, and the marks; `held_out_nll` is called at each of them, off the clock. Initial weights, data and noise
    are functions of `seed`. The average has weight k^16 for step k: about the last seventeenth of the training.
    Raises FlowError for a gradient that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    network = PlaneField(generator)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99), fused=True)
    curve: list[NllAtMark] = []
    marks = iter(MARKS)
    due, step, charged, spent, shown = next(marks), 0, 0.0, 0.0, 0
    began = time.process_time()
    with progress.step(f"{method.title}: training", 100) as bar:
        while spent < 1:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_factor(spent)
            loss = method.loss(network, dataset.sample(method.global_batch_size, generator), generator)
            optimizer.zero_grad()
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT_NORM))
            if not math.isfinite(norm):
                raise FlowError(
                    f"{method.title}: the gradient must stay finite, found {norm} at step {step + 1}; try another path or prediction"
                )
            optimizer.step()
            step += 1
            with torch.no_grad():
                for mean, latest in zip(average.parameters(), network.parameters(), strict=True):
                    mean.lerp_(latest, 1 - (1 - 1 / step) ** (AVERAGE_POWER + 1))
            elapsed = charged + time.process_time() - began
            spent = elapsed / seconds if seconds is not None else step / (steps or 1)
            if spent >= due:
                curve.append(NllAtMark(elapsed, step, held_out_nll(average)))
                due = next((mark for mark in marks if mark > spent), math.inf)
                charged, began = elapsed, time.process_time()
            if (percent := int(100 * min(spent, 1))) > shown:
                bar.advance(percent - shown, f"step {step}, NLL {curve[-1].nll:.3f}" if curve else f"step {step}")
                shown = percent
    return average, tuple(curve)


def learning_rate_factor(spent: float) -> float:
    """Return the learning rate's factor after a part `spent` of the budget: linear warm-up, then half a cosine to 0."""
    if spent < WARM_UP:
        return (spent + WARM_UP / 10) / (1.1 * WARM_UP)
    return (1 + math.cos(math.pi * min(1.0, (spent - WARM_UP) / (1 - WARM_UP)))) / 2
