"""Where the steps of any run go: a table by part, each part's share of the device's limit, what to change, and torch's trace.

Owns: the steps that are timed, counted and traced, the bounds of each part, the advice. Does not know: how a step is taken.

    steps      warm-up | timed: marks around each part | one counted: operations by part | one traced: torch.profiler
    limit      forward, backward    the longer of: operations of the products / product rate, weights read / copy rate
               optimizer, average   bytes of weights, gradients, moments and average / copy rate
               data                 nothing: a batch that is ready in time costs no time

The data set is read and decoded as in training, in this process alone; no checkpoint, metric or bundle is written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch.utils.flop_counter import FlopCounterMode

from pi0fm import files, progress
from pi0fm.bench.card.limits import Rates, forget_peak, measure_rates, peak_bytes, synchronize
from pi0fm.bench.step_clock import PARTS, StepClock, clocked_step
from pi0fm.data.loading.loader import micro_batches
from pi0fm.flow.matching import FlowMatching
from pi0fm.options import option
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import open_data
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.parallel.context import Context
from pi0fm.train.plan.memory import estimate_run
from pi0fm.train.state import TrainState
from pi0fm_client.errors import ConfigError

TRACE, RESULT = "trace.json", "profile.json"
WAITING, UPDATING, FAR = 0.05, 0.15, 0.4  # shares of a step, of a step, of the limit, beyond which advice is given


@dataclass(frozen=True)
class ProfileSteps:
    """How much of a run is looked at."""

    warm_up: int = option(3, "steps before the clock starts")
    steps: int = option(10, "steps that are timed; two more are counted and traced")

    def __post_init__(self) -> None:
        for name in ("warm_up", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"profile.{name} must be 1 or more, found {getattr(self, name)}; leave it out for the default")


@dataclass(frozen=True)
class PartOfStep:
    """seconds, limit_seconds: of one step; flops, moved: operations of products, bytes that must be read or written."""

    seconds: float
    limit_seconds: float
    flops: float
    moved: float


@dataclass(frozen=True)
class Profile:
    """What was found. rates: of the device in this run; peak, estimated: bytes of its memory, 0 on a CPU."""

    parts: dict[str, PartOfStep]
    samples: int
    rates: Rates
    peak: int
    estimated: int
    advice: tuple[str, ...]
    operations: tuple[tuple[str, float], ...]
    device: str

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(part.seconds for part in self.parts.values())


def measure(config: TrainConfig, shape: ProfileSteps, folder: Path) -> Profile:
    """Take some steps of the run in this process; TRACE goes to `folder`. Raises the errors of the data set and of the configuration."""
    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    parallel = Parallel(Context(shown=False), config.precision, config.micro_steps(1))
    device, data = parallel.device, open_data(config)
    state = TrainState.build(data.policy.model, config.state(), data.pretrained, parallel)
    state.prepare(parallel)
    forget_peak(device)
    total = shape.warm_up + shape.steps + 2
    split = (config.global_batch_size, 0, 1, config.micro_batch_size)
    batches = micro_batches(data.training, 0, total, *split, config.loader, device)
    flow, steps = FlowMatching.from_config(data.policy.flow), iter(range(total))

    def step(clock: Any) -> None:
        number = next(steps)
        state.schedule(config.steps)
        valid = data.training.valid_elements(number * config.global_batch_size, config.global_batch_size)
        valid *= config.flow_draws_per_observation
        given = (state.trained, flow, state.optimizer, parallel.accelerator, batches, valid, config.optimizer.clip_norm)
        clocked_step(clock, state.advance, *given)

    clock = StepClock(device)
    with progress.step("profile", total) as bar:
        for _ in range(shape.warm_up):
            step(clock)
            bar.advance()
        clock.seconds()
        for _ in range(shape.steps):
            step(clock)
            bar.advance()
        seconds = {part: value / shape.steps for part, value in clock.seconds().items()}
        flops = _counted(step)
        bar.advance()
        operations = _traced(step, device, folder / TRACE)
        bar.advance()
    peak = peak_bytes(device)
    del batches
    rates = measure_rates(device, whole=device.type == "cuda", dtype=parallel.compute_dtype)
    moved = _bytes_moved(state, config.micro_steps(1))
    parts = {
        part: PartOfStep(seconds[part], 0.0 if part == "data" else rates.seconds(flops[part], moved[part]), flops[part], moved[part])
        for part in PARTS
    }
    estimated = estimate_run(config, data.num_cameras, 1, device).total if device.type == "cuda" else 0
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    advice = advise(config, parts, parallel.compute_dtype, device, peak, room)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Profile(parts, config.global_batch_size, rates, peak, estimated, advice, operations, name)


def advise(
    config: TrainConfig, parts: dict[str, PartOfStep], computes: torch.dtype, device: torch.device, peak: int = 0, room: int = 0
) -> tuple[str, ...]:
    """What to type for a faster step, the largest gain first; peak, room: bytes that are used, and that there are."""
    total = sum(part.seconds for part in parts.values())
    share = {name: part.seconds / total for name, part in parts.items()}
    passes = parts["forward"].seconds + parts["backward"].seconds
    reached = (parts["forward"].limit_seconds + parts["backward"].limit_seconds) / passes
    found: list[tuple[float, str]] = []
    if share["data"] > WAITING:
        more = config.loader.threads + 1
        found.append((share["data"], f"steps wait for data {share['data']:.0%} of the time: --loader.threads {more}"))
    updating = share["optimizer"] + share["average"]
    if updating > UPDATING:
        text = f"clipping, optimiser and average take {updating:.0%}, whatever the batch: a larger --global_batch_size"
        if config.ema_decay is not None and share["average"] > UPDATING / 3:
            text += ", or --ema_decay null"
        found.append((updating, text))
    if computes == torch.float32 and device.type == "cuda":
        found.append((share["forward"] + share["backward"], "products are float32: --precision bfloat16"))
    if reached < FAR and device.type == "cuda":
        text = f"both passes reach {reached:.0%} of the device's limit: a larger --global_batch_size"
        if config.micro_batch_size is not None:
            text += " or --micro_batch_size"
        found.append(((1 - reached) * (share["forward"] + share["backward"]), text))
    if config.activation_checkpointing and room and peak < 0.6 * room:
        text = f"{peak / 2**30:.0f} of {room / 2**30:.0f} GiB are used: --activation_checkpointing false, or a larger batch"
        found.append((0.25 * share["backward"], text))
    return tuple(text for _, text in sorted(found, key=lambda item: -item[0]))


@final
class FlopClock:
    """`StepClock`'s marks on a counter of operations."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter, self._before = counter, 0
        self.found = dict.fromkeys(PARTS, 0.0)

    def mark(self, ended: str) -> None:
        """A part has ended."""
        now = self._counter.get_total_flops()
        if ended:
            self.found[ended] += now - self._before
        self._before = now


def _counted(step: Any) -> dict[str, float]:
    """Operations of a step by part, those that checkpointing repeats included."""
    with FlopCounterMode(display=False) as counter:
        clock = FlopClock(counter)
        step(clock)
    return clock.found


def _traced(step: Any, device: torch.device, path: Path) -> tuple[tuple[str, float], ...]:
    """A step under torch.profiler: its trace to `path`, and the ten operations that take longest, in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    clock = StepClock(torch.device("cpu"))
    with torch.profiler.profile(activities=kinds) as profiler:
        step(clock)
        synchronize(device)
    profiler.export_chrome_trace(str(path))
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    longest = sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))[:10]
    return tuple((event.key, getattr(event, spent) / 1e6) for event in longest)


def _bytes_moved(state: TrainState, micro_steps: int) -> dict[str, float]:
    """Bytes that a step cannot do without, by part."""
    numbers = [parameter.numel() for parameter in state.network.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in state.network.parameters())
    trained = sum(numbers)
    averaged = sum(value.numel() for value in state.average.average.values())
    return {
        "data": 0.0,
        "forward": float(micro_steps * weights),
        "backward": float(micro_steps * (weights + 4 * trained)),
        # the norm reads gradients; AdamW reads weights, gradients and two moments, and writes all but gradients
        "optimizer": float(4 * trained * (1 + 4 + 3)),
        "average": float(4 * averaged * 3),
    }


def write(profile: Profile, path: Path) -> dict[str, Any]:
    """The figures as JSON, to a file too."""
    tree = {
        "device": profile.device,
        "step_ms": 1e3 * profile.seconds,
        "samples_per_second": profile.samples / profile.seconds,
        "product_tflops_per_second": profile.rates.flops_per_second / 1e12,
        "copy_gigabytes_per_second": profile.rates.bytes_per_second / 1e9,
        "peak_gib": profile.peak / 2**30,
        "estimated_gib": profile.estimated / 2**30,
        "parts": {
            name: {
                "ms": 1e3 * part.seconds,
                "share": part.seconds / profile.seconds,
                "limit_ms": 1e3 * part.limit_seconds,
                "tflop": part.flops / 1e12,
                "gigabytes": part.moved / 1e9,
            }
            for name, part in profile.parts.items()
        },
        "advice": list(profile.advice),
        "longest_operations_ms": {name: 1e3 * seconds for name, seconds in profile.operations},
    }
    files.write_json(path, tree)
    return tree
