"""A run, from its configuration to a bundle; the same plain function under every launcher.

Owns: the order of things: data, network, state, steps, metrics, checkpoints, bundle. Does not know: Ray, torchrun, the terminal.

    open data set -> held-out episodes -> statistics, frame cache -> network, optimiser, average -> newest checkpoint
      -> [ step, log, checkpoint, validation ] x steps -> bundle

A validation follows the checkpoint of its step, so that nothing is lost with it; a run that was killed in between validates first when
it goes on.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pi0fm import progress
from pi0fm.data import held_out
from pi0fm.data.lerobot_source import LeRobotSource, open_source
from pi0fm.data.loader import Batch, Collator, micro_batches
from pi0fm.data.norm_stats import NormStats
from pi0fm.data.streaming import open_pictures
from pi0fm.errors import BundleError, ConfigError
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.policy import bundle
from pi0fm.policy.precision import compute_dtype
from pi0fm.train import state as run_state
from pi0fm.train.adaptation import adapt, plain_weights
from pi0fm.train.allocator import keep_freed_memory
from pi0fm.train.checkpoint import Checkpoints
from pi0fm.train.config import TrainConfig
from pi0fm.train.ema import Ema
from pi0fm.train.faults import full_disk_named
from pi0fm.train.guard import guarded
from pi0fm.train.memory import memory_line
from pi0fm.train.metrics import Metrics, read_last
from pi0fm.train.optim import learning_rate, make_optimizer, set_learning_rate
from pi0fm.train.parallel import Context, all_sum, barrier, make_accelerator
from pi0fm.train.pretrained import Pretrained, chosen_tokenizer, open_pretrained, refuse_other_policy, refuse_other_widths, starting_network
from pi0fm.train.step import train_step
from pi0fm.train.validation import NLL, Validator, make_validator


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
    data = _open_data(config)
    policy, collator = data.policy, data.training

    torch.manual_seed(config.seed)  # initial weights only; data, noise and times have counters of their own
    model = starting_network(data.pretrained, policy.model)
    optimizer = make_optimizer(config.optimizer, adapt(model, config.adaptation(), compute_dtype(config.precision, accelerator.device)))
    ema = Ema(model.to(accelerator.device), config.ema_decay)
    state = partial(run_state.tensors, model, optimizer, ema)
    facts = partial(run_state.facts, config, run_state.data_facts(data.training.source, data.stats), context.world_size)
    checkpoints = Checkpoints(config.checkpoint_place, context, config.keep_checkpoints)
    first = run_state.restore(config, context, checkpoints, state(), optimizer, facts)
    model.train()
    wrapped, fast_optimizer = accelerator.prepare(model, optimizer)
    flow = FlowMatching.from_config(policy.flow)

    metrics = Metrics(config.output_dir, first) if context.is_first else None
    batches = _batches(config, context, collator, first, micro, accelerator.device)
    began = time.perf_counter()
    loss = float((read_last(config.output_dir) or {}).get("loss", "nan"))  # of a resumed run that has no step left
    log = _Log(context, metrics, config, first)
    validator = make_validator(config.validation, data.held_out, model, ema.weights(), flow, accelerator.device)
    watch = _Watch(context, metrics, config, validator, log)
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
            bundle.save(path, plain_weights(model.state_dict() | ema.weights(), config.adaptation()), policy, data.stats)
    barrier(context)
    return TrainResult(path, config.steps, loss, time.perf_counter() - began)


def _batches(config: TrainConfig, context: Context, collator: Collator, first: int, micro: int, device: torch.device) -> Iterator[Batch]:
    share = (config.global_batch_size, context.rank, context.world_size, micro)
    return micro_batches(collator, first, config.steps, *share, config.loader, device)


@dataclass(frozen=True)
class _Data:
    """What is trained on, and what is held out; statistics are those of the first alone."""

    policy: bundle.PolicyConfig
    stats: NormStats
    training: Collator
    held_out: Collator
    pretrained: Pretrained | None

    def described(self) -> str:
        """The line for the person who watches."""
        held = len(self.held_out.source.frames)
        return f"{len(self.training.source.frames)} frames" + (f" ({held} more are held out)" if held else "")


def _say_what_begins(config: TrainConfig, context: Context, data: _Data, model: Pi0, first: int, device: torch.device) -> None:
    progress.say(f"train {_parameters(model)} on {data.described()}, steps {first}..{config.steps}")
    progress.say(memory_line(config, len(data.policy.embodiment.cameras), context.world_size, device))


def _parameters(model: Pi0) -> str:
    total, trained = parameter_count(model), sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{trained / 1e6:.2f} M parameters" if trained == total else f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters"


def _open_data(config: TrainConfig) -> _Data:
    pretrained = open_pretrained(config.pretrained)
    config = replace(config, tokenizer=chosen_tokenizer(config.tokenizer, pretrained))
    recorded = open_source(config.dataset, config.embodiment)
    held = held_out.choose(recorded, config.validation.episodes, config.seed)
    source, unseen = held_out.split(recorded, held)
    policy = replace(policy_config(config, source, held), padded_noise=pretrained is not None and pretrained.policy.padded_noise)
    if pretrained is not None:
        refuse_other_policy(pretrained, policy)
    horizon, width = policy.model.action_horizon, policy.model.action_dim
    if pretrained is not None and config.pretrained_norm_stats:
        refuse_other_widths(pretrained, policy)
        stats = pretrained.stats
    else:
        stats = source.norm_stats(horizon)
    cache = open_pictures(
        source,
        config.dataset,
        policy.model.vision.image_size,
        config.global_batch_size,
        config.dataset.cache_format,
        config.dataset.stream_buffer_gib,
    )
    if held and cache.look_ahead:
        raise ConfigError("held-out episodes need every picture at hand, but this data set is streamed; raise --dataset.cache_limit_gib")
    collator = Collator(
        source,
        cache,
        policy.chain(stats),
        horizon,
        width,
        config.seed,
        config.flow_draws_per_observation,
        augmentation=config.augmentation if config.augment else None,
        padded_noise=policy.padded_noise,
    )
    return _Data(policy, stats, collator, replace(collator, source=unseen, augmentation=None), pretrained)


def policy_config(config: TrainConfig, source: LeRobotSource, held: tuple[int, ...] = ()) -> bundle.PolicyConfig:
    """What the bundle of this run will say, against the data set that it was resolved with. held: episodes that it never saw."""
    facts = {"repo_id": source.repo_id, "dataset": str(source.root), "dataset_fingerprint": source.fingerprint}
    if config.pretrained is not None:
        facts["pretrained"] = str(config.pretrained)
    if config.train_only != "full" or config.lora.rank:
        facts["trained"] = config.train_only + (f", lora of rank {config.lora.rank}" if config.lora.rank else "")
    if held:
        facts["held_out_episodes"] = ",".join(map(str, held))
    return bundle.PolicyConfig(
        model=config.network(),
        flow=config.flow,
        embodiment=source.embodiment,
        normalization=config.normalization,
        norm_floor=config.norm_floor,
        tokenizer=config.tokenizer,
        prompt_dialect=config.prompt_dialect,
        execution_horizon=config.execution_horizon,
        fps=source.fps,
        demonstration_seeds=source.demonstration_seeds,
        camera_sources=config.camera_sources or source.camera_sources,
        training={**facts, "steps": str(config.steps), "global_batch_size": str(config.global_batch_size), "seed": str(config.seed)},
    )


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


class _Watch:
    """Validations of a run, when they are due; silent in a run without."""

    def __init__(self, context: Context, metrics: Metrics | None, config: TrainConfig, validator: Validator | None, log: _Log) -> None:
        self._context, self._metrics, self._config, self._validator, self._log = context, metrics, config, validator, log

    def catch_up(self, first: int, bar: progress.Step | None) -> None:
        """The validation of the step that a resumed run starts from, where the run was killed before it was written."""
        if self._validator is not None and self._validator.due(first, self._config.steps):
            written = self._context.is_first and int((read_last(self._config.output_dir, NLL) or {}).get("step", 0)) == first
            # one worker looked, all must agree
            if not bool(all_sum(self._context, torch.tensor(float(written), device=self._validator.device))):
                self.after(first, bar)

    def after(self, step: int, bar: progress.Step | None) -> None:
        """Validate if it is time, and write what was found."""
        if self._validator is None or not self._validator.due(step, self._config.steps):
            return
        began = time.perf_counter()
        found = self._validator.validate(self._context, step, lambda text: bar.advance(0, note=text) if bar is not None else None)
        if self._metrics is not None and found:
            self._metrics.write(step, found)
        seconds = time.perf_counter() - began
        self._log.paused(seconds)
        if self._context.shown and found:
            said = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            progress.say(f"step {step}: {said} ({seconds:.1f} s)")


def _timed(batches: Iterator[Batch], log: _Log) -> Iterator[Batch]:
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        log.waited(time.perf_counter() - began)
        yield batch
