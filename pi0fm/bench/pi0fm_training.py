"""pi0fm's side of a comparison under a budget of processor time.

Owns: the parts of `train/loop` that learn, put together without its files: no metrics, no checkpoints, no bundle.
Does not know: how time is counted (bench/budget), how the policy is judged, what the other side does.

As shipped: `train.step.train_step` with accelerate, bfloat16 where the processor has it, AdamW, warm-up and cosine, the moving average
of the weights as the policy. Batches are made in the thread that trains: a loader's thread saves wall time, not processor time.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from pi0fm.bench.budget import TrainingPlan, TrainingResult, spend, steps_in_budget
from pi0fm.bench.shared_data import SharedData
from pi0fm.flow.matching import FlowMatching
from pi0fm.policy.device import compute_dtype
from pi0fm.policy.local import LocalPolicy
from pi0fm.train.config import TrainConfig
from pi0fm.train.ema import Ema
from pi0fm.train.optim import learning_rate, make_optimizer, set_learning_rate
from pi0fm.train.parallel.accelerate import make_accelerator
from pi0fm.train.start.adaptation import Adaptation
from pi0fm.train.start.network import starting_network
from pi0fm.train.step import train_step


@dataclass(frozen=True)
class TrainedHere:
    """A policy in memory, and what it cost."""

    policy: LocalPolicy
    result: TrainingResult


def train_pi0fm(run: TrainConfig, data: SharedData, plan: TrainingPlan) -> TrainedHere:
    """Train from scratch until `plan.cpu_seconds` are spent or `plan.max_steps` done; at most one step is over the budget.

    run: batch size, optimiser, average, precision; its seed, steps and peak learning rate give way to the plan's.
    The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        scheduled = plan.max_steps or steps_in_budget(_Updater(run, data, plan, plan.calibration_steps + 1).update, plan)
        updater = _Updater(run, data, plan, scheduled)
        result = spend("pi0fm", updater.update, plan, scheduled)
    return TrainedHere(updater.policy(), result)


class _Updater:
    """One run, all of it a function of the plan's seed: calibration uses one up, and the run builds the same anew."""

    def __init__(self, run: TrainConfig, data: SharedData, plan: TrainingPlan, scheduled_steps: int) -> None:
        self._run, self._data, self._scheduled_steps = run, data, scheduled_steps
        self._rates = replace(run.optimizer, learning_rate=plan.learning_rate)
        self._collator = data.collator(plan.seed, run.flow_draws_per_observation)
        micro = run.largest_micro_batch(world_size=1)
        self._batches = (self._collator(first, micro) for first in itertools.count(0, micro))
        self._flow = FlowMatching.from_config(run.flow)
        self._accelerator = make_accelerator(run.precision, run.global_batch_size // micro, allow_cuda=False)
        self._model = starting_network(data.policy.model, Adaptation(), plan.seed, None)
        self._optimizer = make_optimizer(self._rates, self._model)
        self._ema = Ema(self._model, run.ema_decay)
        self._prepared = self._accelerator.prepare(self._model.train(), self._optimizer)

    def update(self, step: int) -> tuple[float, int]:
        """One step, as in `train.loop`; returns the loss and the number of samples."""
        count = self._run.global_batch_size
        set_learning_rate(self._optimizer, learning_rate(self._rates, step, self._scheduled_steps))
        valid = self._collator.valid_elements(step * count, count) * self._run.flow_draws_per_observation
        model, optimizer = self._prepared
        loss, _ = train_step(model, self._flow, optimizer, self._accelerator, self._batches, valid, self._rates.clip_norm)
        self._ema.update(step)
        return float(loss), count

    def policy(self) -> LocalPolicy:
        """The averaged weights, as a bundle of this run would load on the CPU."""
        self._model.load_state_dict(self._ema.weights(), strict=False)  # the average holds parameters only
        device = torch.device("cpu")
        dtype = compute_dtype(self._run.precision, device)
        chain = self._data.policy.chain(self._data.stats)
        return LocalPolicy(self._model, self._flow, chain, self._data.policy.metadata(), device, dtype)
