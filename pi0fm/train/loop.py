"""A run, from its configuration to a bundle; the same plain function under every launcher.

Owns: the order of things: data, network, state, steps, metrics, checkpoints, bundle. Does not know: Ray, torchrun, the terminal.

    open data set -> statistics, frame cache -> network, optimiser, average -> newest checkpoint
      -> [ step, log, checkpoint ] x steps -> bundle
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pi0fm import progress
from pi0fm.data.frame_cache import open_cache
from pi0fm.data.lerobot_source import LeRobotSource, open_source
from pi0fm.data.loader import Batch, Collator, micro_batches
from pi0fm.errors import BundleError, OutputError
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.policy import bundle
from pi0fm.train import checkpoint
from pi0fm.train.allocator import keep_freed_memory
from pi0fm.train.config import TrainConfig
from pi0fm.train.ema import Ema
from pi0fm.train.metrics import Metrics, read_last
from pi0fm.train.optim import learning_rate, make_optimizer, set_learning_rate
from pi0fm.train.parallel import Context, all_sum, barrier, make_accelerator
from pi0fm.train.step import train_step


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
    source = open_source(config.dataset, config.embodiment)
    policy = policy_config(config, source)
    stats = source.norm_stats(policy.model.action_horizon)
    chain = policy.chain(stats)
    cache = open_cache(source, config.dataset, policy.model.vision.image_size)
    collator = Collator(
        source, cache, chain, policy.model.action_horizon, policy.model.action_dim, config.seed, config.flow_draws_per_observation
    )

    torch.manual_seed(config.seed)  # initial weights only; data, noise and times have counters of their own
    model = Pi0(policy.model)
    optimizer = make_optimizer(config.optimizer, model)
    ema = Ema(model.to(accelerator.device), config.ema_decay)
    first = _restore(config, context, model, optimizer, ema)
    model.train()
    wrapped, fast_optimizer = accelerator.prepare(model, optimizer)
    flow = FlowMatching.from_config(policy.flow)

    metrics = Metrics(config.output_dir, first) if context.is_first else None
    batches = micro_batches(collator, first, config.steps, config.global_batch_size, context.rank, context.world_size, micro)
    began = time.perf_counter()
    loss = float((read_last(config.output_dir) or {}).get("loss", "nan"))  # of a resumed run that has no step left
    log = _Log(context, metrics, config, first)
    if context.shown:
        progress.say(f"train {parameter_count(model) / 1e6:.2f} M parameters on {len(source.frames)} frames, steps {first}..{config.steps}")
    shown = progress.step("train", config.steps, start=first) if context.shown else nullcontext()
    with shown as bar:
        for step in range(first, config.steps):
            rate = learning_rate(config.optimizer, step, config.steps)
            set_learning_rate(optimizer, rate)
            valid = collator.valid_elements(step * config.global_batch_size, config.global_batch_size) * config.flow_draws_per_observation
            part, norm = train_step(wrapped, flow, fast_optimizer, accelerator, _timed(batches, log), valid, config.optimizer.clip_norm)
            ema.update(step)
            loss = log.after(step, part, norm, rate, loss)
            if bar is not None:
                bar.advance(note=f"loss {loss:.4f}")
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoint.save(config.output_dir / "checkpoints", done, _state(model, optimizer, ema), context, config.keep_checkpoints)
    path = config.output_dir / "bundle"
    if context.is_first:
        assert metrics is not None
        metrics.close()
        _keep_older(path)
        bundle.save(path, model.state_dict() | ema.weights(), policy, stats)
    barrier(context)
    return TrainResult(path, config.steps, loss, time.perf_counter() - began)


def policy_config(config: TrainConfig, source: LeRobotSource) -> bundle.PolicyConfig:
    """What the bundle of this run will say, against the data set that it was resolved with."""
    facts = {"repo_id": source.repo_id, "dataset": str(source.root), "dataset_fingerprint": source.fingerprint}
    return bundle.PolicyConfig(
        model=config.network(),
        flow=config.flow,
        embodiment=source.embodiment,
        normalization=config.normalization,
        norm_floor=config.norm_floor,
        tokenizer=config.tokenizer,
        execution_horizon=config.execution_horizon,
        fps=source.fps,
        demonstration_seeds=source.demonstration_seeds,
        camera_sources=config.camera_sources or source.camera_sources,
        training={**facts, "steps": str(config.steps), "global_batch_size": str(config.global_batch_size), "seed": str(config.seed)},
    )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Any]:
    """Every tensor of a run by name; moments are named by their parameter, so that no order is relied on."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = optimizer.state.get(parameter) or {
                "step": torch.zeros((), device=parameter.device),  # the fused kernel wants it beside its parameter
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            optimizer.state[parameter] = held
            moments.update({f"{names[id(parameter)]}/{name}": value for name, value in held.items()})
    return {"model": model.state_dict(), "moments": moments, "average": dict(ema.average)}


def _restore(config: TrainConfig, context: Context, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> int:
    directory = config.output_dir / "checkpoints"
    step = checkpoint.newest(directory)
    if step is None:
        return 0
    if step > config.steps:
        raise OutputError(f"{config.output_dir} holds a checkpoint of step {step}, beyond steps {config.steps}; raise --steps")
    checkpoint.load(directory, step, _state(model, optimizer, ema), context)
    if context.shown:
        progress.say(f"resumed from step {step}")
    return step


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

    def after(self, step: int, part: torch.Tensor, norm: torch.Tensor, rate: float, last: float) -> float:
        """Note one step; every `log_every` steps write a line and return its mean loss, else return `last`."""
        self._parts.append(part)
        if (step + 1) % self._config.log_every and step + 1 != self._config.steps:
            return last
        total = all_sum(self._context, torch.stack(self._parts))
        loss = float(total.mean())
        now = time.perf_counter()
        elapsed = now - self._since
        if self._metrics is not None:
            values = {"loss": loss, "grad_norm": float(norm), "learning_rate": rate}
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
