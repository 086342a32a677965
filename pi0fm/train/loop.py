"""A run, from its configuration to a bundle; the same plain function under every launcher.

Owns: the order of things: data, network, state, steps, metrics, checkpoints, bundle. Does not know: Ray, torchrun, the terminal.

    data set or mixture (train/data.py) -> network, optimiser, average -> newest checkpoint
      -> [ step, log, checkpoint, validation ] x steps -> bundle

A validation follows the checkpoint of its step, so that nothing is lost with it; a run that was killed in between validates first when
it goes on.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pi0fm import progress
from pi0fm.data.loading.batch import Batch
from pi0fm.data.loading.loader import BatchMaker, micro_batches
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.policy import bundle
from pi0fm.policy.device import compute_dtype
from pi0fm.train import state as run_state
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import RunData, open_data
from pi0fm.train.ema import Ema
from pi0fm.train.optim import learning_rate, make_optimizer, set_learning_rate
from pi0fm.train.parallel.accelerate import Context, all_sum, barrier, make_accelerator
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.plan.memory import memory_line
from pi0fm.train.start.adaptation import adapt, plain_weights
from pi0fm.train.start.pretrained import starting_network
from pi0fm.train.step import train_step
from pi0fm.train.watch.faults import full_disk_named
from pi0fm.train.watch.guard import guarded
from pi0fm.train.watch.metrics import Metrics, read_last
from pi0fm.train.watch.schedule import Watch
from pi0fm.train.watch.validation import make_validators
from pi0fm_client.errors import BundleError


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves. loss: mean over the last logged steps; seconds: of this process's training loop."""

    bundle: Path
    steps: int
    loss: float
    seconds: float


def train(context: Context, config: TrainConfig) -> TrainResult:
    """Train until `config.steps`, going on from the newest checkpoint in `config.output_dir` if there is one.

    Called by every worker. Raises the errors of the data set, of the configuration, and OutputError for an unreadable checkpoint.
    """
    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    micro = config.micro_batch(context.world_size)
    accelerator = make_accelerator(config.precision, config.global_batch_size // context.world_size // micro)
    data = open_data(config)
    policy, collator = data.policy, data.training

    torch.manual_seed(config.seed)  # initial weights only; data, noise and times have counters of their own
    model = starting_network(data.pretrained, policy.model)
    optimizer = make_optimizer(config.optimizer, adapt(model, config.adaptation(), compute_dtype(config.precision, accelerator.device)))
    ema = Ema(model.to(accelerator.device), config.ema_decay)
    state = partial(run_state.tensors, model, optimizer, ema)
    facts = partial(run_state.facts, config, data.facts(), context.world_size)
    checkpoints = Checkpoints(config.checkpoint_place, context, config.keep_checkpoints)
    first = run_state.restore(config, context, checkpoints, state(), facts)
    model.train()
    wrapped, fast_optimizer = accelerator.prepare(model, optimizer)
    flow = FlowMatching.from_config(policy.flow)

    metrics = Metrics(config.output_dir, first) if context.is_first else None
    batches = _batches(config, context, collator, first, micro, accelerator.device)
    began = time.perf_counter()
    loss = float((read_last(config.output_dir) or {}).get("loss", "nan"))  # of a resumed run that has no step left
    log = _Log(context, metrics, config, first)
    validators = make_validators(config.validation, data.held_out(), model, ema.weights(), flow, accelerator.device)
    watch = Watch(context, metrics, config, validators, log.paused)
    if context.shown:
        _say_what_begins(config, context, data, model, first, accelerator.device)
    shown = progress.step("train", config.steps, start=first) if context.shown else nullcontext()
    with guarded(config, context, checkpoints, collator, first, state, facts) as guard, shown as bar:
        watch.catch_up(first, bar)
        for step in range(first, config.steps):
            rate = learning_rate(config.optimizer, step, config.steps)
            set_learning_rate(optimizer, rate)
            valid = collator.valid_elements(step * config.global_batch_size, config.global_batch_size) * config.flow_draws_per_observation
            part, norm = train_step(wrapped, flow, fast_optimizer, accelerator, _timed(batches, log), valid, config.optimizer.clip_norm)
            ema.update(step)
            loss = log.after(step, part, norm, rate, loss)
            if bar is not None:
                bar.advance(note=f"loss {loss:.4f}")
            guard.after(step + 1, norm)
            watch.after(step + 1, bar)
    path = config.output_dir / "bundle"
    if context.is_first:
        assert metrics is not None
        metrics.close()
        _keep_older(path)
        with full_disk_named(path):
            weights = plain_weights(model.state_dict() | ema.weights(), config.adaptation())
            bundle.save(path, weights, policy, data.parts[0].stats, data.robots())
    barrier(context)
    return TrainResult(path, config.steps, loss, time.perf_counter() - began)


def _batches(config: TrainConfig, context: Context, maker: BatchMaker, first: int, micro: int, device: torch.device) -> Iterator[Batch]:
    share = (config.global_batch_size, context.rank, context.world_size, micro)
    return micro_batches(maker, first, config.steps, *share, config.loader, device)


def _say_what_begins(config: TrainConfig, context: Context, data: RunData, model: Pi0, first: int, device: torch.device) -> None:
    progress.say(f"train {_parameters(model)} on {data.described()}, steps {first}..{config.steps}")
    progress.say(memory_line(config, data.num_cameras, context.world_size, device))


def _parameters(model: Pi0) -> str:
    total, trained = parameter_count(model), sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{trained / 1e6:.2f} M parameters" if trained == total else f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters"


def _keep_older(path: Path) -> None:
    """A bundle of fewer steps stays, under its number of steps."""
    if path.exists():
        try:
            steps = bundle.read(path)[0].training["steps"]
        except BundleError:
            steps = "unreadable"  # kept all the same: the run that just ended must not fail for it
        aside = path.with_name(f"{path.name}-{steps}")
        count = 1
        while aside.exists():
            aside, count = path.with_name(f"{path.name}-{steps}.{count}"), count + 1
        path.rename(aside)


class _Log:
    """Losses stay on the device until a line is due: a look at each would stall it."""

    def __init__(self, context: Context, metrics: Metrics | None, config: TrainConfig, first: int) -> None:
        self._context, self._metrics, self._config = context, metrics, config
        self._parts: list[torch.Tensor] = []
        self._since, self._waited, self._first = time.perf_counter(), 0.0, first

    def waited(self, seconds: float) -> None:
        """Time that the step stood still for data."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Time that was no training: samples a second leave it out."""
        self._since += seconds

    def after(self, step: int, part: torch.Tensor, norm: torch.Tensor, rate: float, last: float) -> float:
        """Note one step; every `log_every` steps write a line and return its mean loss, else return `last`."""
        self._parts.append(part)
        if (step + 1) % self._config.log_every and step + 1 != self._config.steps:
            return last
        total = all_sum(self._context, torch.stack(self._parts))
        finite = total[total.isfinite()]
        loss = float(finite.mean()) if len(finite) else last  # steps that were skipped count for nothing
        now = time.perf_counter()
        elapsed = now - self._since
        if self._metrics is not None:
            values = {"loss": loss, "grad_norm": float(norm), "learning_rate": rate}
            values = {name: value for name, value in values.items() if math.isfinite(value)}
            speed = {
                "samples_per_second": len(self._parts) * self._config.global_batch_size / elapsed,
                "waiting_for_data": self._waited / elapsed,
            }
            self._metrics.write(step + 1, values | speed)
            if self._waited > 0.2 * elapsed and step + 1 > self._first + self._config.log_every:
                progress.say(f"step {step + 1}: {100 * self._waited / elapsed:.0f} % of the time went on waiting for data")
        self._parts, self._since, self._waited = [], now, 0.0
        return loss


def _timed(batches: Iterator[Batch], log: _Log) -> Iterator[Batch]:
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        log.waited(time.perf_counter() - began)
        yield batch
