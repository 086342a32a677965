"""Time of a run's steps by part, the device's limit for each part, options to change, and torch's trace.

Owns: the steps that are timed, counted and traced, the bounds of each part, the advice. Does not know: how a step works.

    steps      warm-up | timed: marks around each part | 1 counted: operations by part | 1 traced: torch.profiler
    limit      forward, backward    the longer of: operations of the products / product rate, weights read / copy rate
               optimizer, average   bytes of weights, gradients, moments and average / copy rate
               data                 nothing: a batch that is ready in time costs no time

The data set is read and decoded as in training, in this process only; no checkpoint, metric or bundle is written.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from pi0fm import progress
from pi0fm.bench.config import ProfileSteps
from pi0fm.bench.harness.limits import flop_counter, forget_peak, measure_rates, peak_bytes, synchronize
from pi0fm.bench.harness.measure import BenchReport
from pi0fm.bench.harness.steps import PARTS, StepClock, Trainer
from pi0fm.data.loading.loader import micro_batches
from pi0fm.flow.matching import FlowMatching
from pi0fm.policy.device import choose_device, set_threads
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import open_data
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.parallel.context import Context
from pi0fm.train.state import TrainState

TRACE, RESULT = "trace.json", "profile.json"
WAITING, UPDATING, FAR = 0.05, 0.15, 0.4  # thresholds of advice: shares of a step, of a step, of the limit


def measure(config: TrainConfig, shape: ProfileSteps, folder: Path) -> BenchReport:
    """Take some steps of the run in this process and write TRACE to `folder`. Raises the errors of data set and configuration."""
    keep_freed_memory()
    set_threads(config.threads)
    on_cuda = choose_device(config.device).type == "cuda"
    parallel = Parallel(Context(shown=False), config.precision, config.micro_steps(1), on_cuda)
    device, data = parallel.device, open_data(config)
    on_card = device.type == "cuda"
    state = TrainState.build(data.policy.model, config.state(), data.pretrained, parallel)
    trainer = Trainer(state, parallel, FlowMatching.from_config(data.policy.flow))
    forget_peak(device)
    total = shape.warm_up + shape.steps + 2
    split = (config.global_batch_size, 0, 1, config.micro_batch_size)
    batches = micro_batches(data.training, 0, total, *split, config.loader, device)

    def step(mark: Callable[[str], object] | None = None) -> None:
        state.schedule(config.steps)
        valid = data.training.valid_elements(state.step * config.global_batch_size, config.global_batch_size)
        trainer.step(batches, valid, mark)  # noqa: F821  it is deleted after the last step
        bar.advance()

    clock = StepClock(device)
    with progress.step("profile", total) as bar:
        for _ in range(shape.warm_up):
            step()
        for _ in range(shape.steps):
            step(clock.mark)
        seconds = {part: value / shape.steps for part, value in clock.seconds().items()}
        flops, longest = _count_operations(step), _trace_step(step, device, folder / TRACE)
    peak = peak_bytes(device)
    del batches
    rates, moved = measure_rates(device, [parallel.compute_dtype], whole=on_card), _bytes_moved(state, config.micro_steps(1))
    whole = sum(seconds.values())
    parts = {
        part: {
            "ms": 1e3 * seconds[part],
            "share": seconds[part] / whole,
            "limit_ms": 0.0 if part == "data" else 1e3 * rates.seconds({parallel.compute_dtype: flops[part]}, moved[part]),
            "tflop": flops[part] / 1e12,
            "gigabytes": moved[part] / 1e9,
        }
        for part in PARTS
    }
    found = {
        "device": torch.cuda.get_device_name(device) if on_card else "CPU",
        "step_ms": 1e3 * whole,
        "samples_per_second": config.global_batch_size / whole,
        "product_tflops_per_second": rates.flops_per_second[parallel.compute_dtype] / 1e12,
        "copy_gigabytes_per_second": rates.bytes_per_second / 1e9,
        "peak_gib": peak / 2**30,
        "estimated_gib": config.memory(data.num_cameras, 1, device).total / 2**30 if on_card else 0.0,
    }
    memory = torch.cuda.get_device_properties(device).total_memory if on_card else 0
    advice = advise(config, parts, parallel.compute_dtype, device, peak, memory)
    for line in advice or ["nothing stands out"]:
        progress.say(line)
    return BenchReport({**found, "parts": parts, "advice": advice, "longest_operations_ms": longest}, shown={"parts": parts, **found})


def advise(
    config: TrainConfig, parts: dict[str, dict[str, float]], computes: torch.dtype, device: torch.device, peak: int = 0, memory: int = 0
) -> list[str]:
    """Options for a faster step, the largest gain first. peak: bytes used; memory: bytes of the device."""
    share = {name: part["share"] for name, part in parts.items()}
    passes = share["forward"] + share["backward"]
    reached = sum(parts[name]["limit_ms"] for name in ("forward", "backward")) / sum(parts[name]["ms"] for name in ("forward", "backward"))
    on_card = device.type == "cuda"
    found: list[tuple[float, str]] = []
    if share["data"] > WAITING:
        more = config.loader.threads + 1
        found.append((share["data"], f"steps wait for data {share['data']:.0%} of the time: --loader.threads {more}"))
    updating = share["optimizer"] + share["average"]
    if updating > UPDATING:
        text = f"clipping, optimiser and average take {updating:.0%}, independent of the batch: a larger --global_batch_size"
        if config.ema_decay is not None and share["average"] > UPDATING / 3:
            text += ", or --ema_decay null"
        found.append((updating, text))
    if computes == torch.float32 and on_card:
        found.append((passes, "products are float32: --precision bfloat16"))
    if reached < FAR and on_card:
        text = f"both passes reach {reached:.0%} of the device's limit: a larger --global_batch_size"
        found.append(((1 - reached) * passes, text + (" or --micro_batch_size" if config.micro_batch_size is not None else "")))
    if config.activation_checkpointing != "none" and peak < 0.6 * memory:
        text = f"{peak / 2**30:.0f} of {memory / 2**30:.0f} GiB are used: --activation_checkpointing none or selective, or a larger batch"
        found.append((0.25 * share["backward"], text))
    return [text for _, text in sorted(found, key=lambda item: -item[0])]


def _count_operations(step: Callable[[Callable[[str], object]], None]) -> dict[str, float]:
    """Operations of a step by part, including those repeated by checkpointing."""
    found, before = dict.fromkeys(PARTS, 0.0), 0
    with flop_counter() as counter:

        def mark(ended: str) -> None:
            nonlocal before
            now = counter.get_total_flops()
            if ended:
                found[ended] += now - before
            before = now

        step(mark)
    return found


def _trace_step(step: Callable[[], None], device: torch.device, path: Path) -> dict[str, float]:
    """Trace a step with torch.profiler to `path`; returns the milliseconds of the ten longest operations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        synchronize(device)
    profiler.export_chrome_trace(str(path))
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    longest = sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))[:10]
    return {event.key: getattr(event, spent) / 1e3 for event in longest}


def _bytes_moved(state: TrainState, micro_steps: int) -> dict[str, float]:
    """Least number of bytes that a step must read and write, by part."""
    parameters = list(state.network.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    averaged = sum(value.numel() for value in state.average.average.values())
    return {
        "data": 0.0,
        "forward": float(micro_steps * weights),
        "backward": float(micro_steps * (weights + 4 * trained)),
        # the norm reads gradients; AdamW reads weights, gradients and two moments, and writes all but gradients
        "optimizer": float(4 * trained * (1 + 4 + 3)),
        "average": float(4 * averaged * 3),
    }
