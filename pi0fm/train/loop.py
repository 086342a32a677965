"""A training run from its configuration to a bundle: one plain function under every launcher.

Owns: the order of data, state, steps, metrics, checkpoints and bundle. Does not know: Ray, torchrun, the terminal.

    data set or mixture (train/data.py) -> network, optimiser, average (train/state.py) -> newest checkpoint
      -> [ step, log, checkpoint, validation ] x steps -> bundle

A step is validated after its checkpoint, so that a failed validation loses no training; a run killed in between validates first when it
resumes.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pi0fm import files, options, progress
from pi0fm.data.loading.loader import micro_batches
from pi0fm.flow.matching import FlowMatching
from pi0fm.policy.device import choose_device, set_threads
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.weights import network_shapes
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.facts import RunFacts
from pi0fm.train.components import ParallelConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import RunData, check_data, open_data
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.parallel.context import Context
from pi0fm.train.plan.memory import resolve_sharding
from pi0fm.train.plan.planner import full_speed
from pi0fm.train.start.resume import restore
from pi0fm.train.state import TrainState
from pi0fm.train.step import train_step
from pi0fm.train.watch.faults import write_faults
from pi0fm.train.watch.guard import guarded
from pi0fm.train.watch.hangs import HangWatch
from pi0fm.train.watch.log import TrainLog
from pi0fm.train.watch.metrics import MetricsWriter, read_last
from pi0fm.train.watch.out_of_memory import memory_faults, refuse_too_large
from pi0fm.train.watch.schedule import ValidationSchedule
from pi0fm.train.watch.stragglers import ForwardTimer
from pi0fm.train.watch.trackers import refuse_missing
from pi0fm.train.watch.validation import make_validators
from pi0fm_client.types import Observation


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished run. loss: mean over the last logged steps; seconds: duration of this process's training loop."""

    bundle: Path
    steps: int
    loss: float
    seconds: float


def train(context: Context, config: TrainConfig) -> TrainResult:
    """Train until `config.steps`, from the newest checkpoint in `config.output_dir` if there is one.

    Called by every worker. Raises the errors of the data set, of the configuration, and OutputError for an unreadable checkpoint.
    """
    keep_freed_memory()
    refuse_missing(config.tracker)
    set_threads(config.threads)
    on_cuda = choose_device(config.device).type == "cuda"
    parallel = Parallel(context, config.precision, config.micro_steps(context.world_size), on_cuda)
    checked = check_data(config)
    cameras, workers = checked.num_cameras, context.world_size

    def needed(how: ParallelConfig) -> int:
        return replace(config, parallel=how).memory(cameras, workers, parallel.device).total

    sharding, why = resolve_sharding(config.parallel, needed, workers, parallel.room())
    if why is not None and context.is_first:
        progress.say(why)
    config = replace(config, parallel=sharding)
    refuse_too_large(config, cameras, parallel)  # before pictures are decoded, which may take an hour
    with memory_faults(config, cameras, parallel):
        return _run(context, config, parallel, open_data(config, checked))


def _run(context: Context, config: TrainConfig, parallel: Parallel, data: RunData) -> TrainResult:
    state = TrainState.build(data.policy.model, config.state(), data.pretrained, parallel)
    checkpoints = Checkpoints(config.checkpoint_place, parallel, config.keep_checkpoints)
    run = RunFacts(options.encode(config), data.facts(), config.steps, config.global_batch_size, config.optimizer, context.world_size)
    restore(state, checkpoints, run, context, changed_allowed=config.resume_changed)
    state.prepare(parallel)
    first, flow = state.step, FlowMatching.from_config(data.policy.flow)

    if context.is_first and data.left_out():
        files.write_json(config.output_dir / "left_out.json", data.left_out())
    metrics = MetricsWriter(config.output_dir, first, config.tracker, options.encode(config)) if context.is_first else None
    recorded = data.recorded() if context.is_first else None  # now, while a stream of pictures is at its start
    speed = full_speed(config, data.num_cameras, context.world_size, parallel.device) if context.is_first else None
    own, nodes = ForwardTimer(state.network, parallel.device, whole=not state.is_sharded), parallel.nodes()
    log = TrainLog(config.log(speed), parallel, metrics, own, nodes, first, (read_last(config.output_dir) or {}).get("loss", math.nan))
    split = (config.global_batch_size, context.rank, context.world_size, config.micro_batch_size)
    batches = log.timed(micro_batches(data.training, first, config.steps, *split, config.loader, parallel.device))
    validators = make_validators(config.validation, data.held_out(), state, flow, parallel.device)
    watch = HangWatch(config.output_dir, context, nodes, config.hang_seconds)
    validation = ValidationSchedule(parallel, metrics, validators, config.steps, config.output_dir, log.paused, watch.beat)
    if context.is_first:
        progress.say(f"train {state.size()} on {data.describe()}, steps {first}..{config.steps}")
    shown = progress.step("train", config.steps, start=first) if context.shown else nullcontext()

    began = time.perf_counter()
    with watch, guarded(config.guard(), parallel, checkpoints, state, run, data.training) as guard, shown as bar:
        validation.validate_missed(first, bar)
        for step in range(first, config.steps):
            rate = state.schedule(config.steps)
            valid = data.training.valid_elements(step * config.global_batch_size, config.global_batch_size)
            part, norm = train_step(state.trained, flow, state.optimizer, parallel.accelerator, batches, valid, config.optimizer.clip_norm)
            state.advance()
            log.after_step(state.step, part, norm, rate)
            if bar is not None:
                bar.advance(note=log.note)
            guard.after_step(norm)
            if config.bundle_every and state.step % config.bundle_every == 0 and state.step < config.steps:
                with write_faults(config.output_dir):
                    _write_bundle(config.output_dir / f"bundles/step-{state.step:09d}", state, data, recorded, context)
            watch.beat(state.step)
            validation.after_step(state.step, bar)
    path = config.output_dir / "bundle"
    with write_faults(config.output_dir):
        if metrics is not None:
            metrics.close()
        _write_bundle(path, state, data, recorded, context)
    parallel.barrier()
    return TrainResult(path, config.steps, log.loss, time.perf_counter() - began)


def _write_bundle(path: Path, state: TrainState, data: RunData, recorded: Observation | None, context: Context) -> None:
    """Write the bundle tensor by tensor; a tensor of a sharded state is gathered on the first worker only while it is written.

    Called by every worker. A step's bundle from an earlier start of this run is kept.
    """
    if not context.is_first or (path.name != "bundle" and path.exists()):
        for _ in state.bundle_weights() if state.is_sharded else ():  # send this worker's rows of each
            pass
        return
    entries = {name: (shape, torch.float32) for name, shape in network_shapes(data.policy.model).items()}
    policy = replace(data.policy, training={**data.policy.training, "steps": str(state.step)})
    with bundle.new_bundle(path, entries, policy, data.parts[0].stats, data.robots(), True, recorded) as put:
        for name, tensor in state.bundle_weights():
            put(name, 0, tensor)
