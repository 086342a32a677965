"""Planned against measured time of a training step: one, two and four processes on this machine, with every sharding.

Owns: the rates of N simultaneous processes, the steps that are timed. Does not know: the plan's model (train/plan/planner.py).

    alone       all processes train at the same time, without exchange, on a small and a large batch: seconds per sample, per pass and
                of the optimiser while N processes share the cores
    exchange    the same units with fewer and with more weights and no computation (harness/exchange.py): seconds per unit, bytes per second
    together    a batch of medium size, by DDP and by each sharding: planned from the rates above, and measured

A figure is the mean over the steps of a turn, of the slowest process; of all turns the fastest counts, since other programs can only slow
a turn down. Each process is pinned to one core: where two wait for each other at every unit, the system moves them to the same core for
milliseconds at a time, which the plan does not model.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

from pi0fm import progress
from pi0fm.bench.config import PlanningOptions
from pi0fm.bench.harness.cases import make_batch
from pi0fm.bench.harness.exchange import exchange_seconds
from pi0fm.bench.harness.measure import BenchReport
from pi0fm.bench.harness.sizes import Case
from pi0fm.bench.harness.steps import StepClock, Trainer
from pi0fm.models.config import TINY
from pi0fm.models.pi0 import Pi0
from pi0fm.processes import end_with_parent
from pi0fm.train.components import FULL, GRADIENTS, NONE, Adaptation, ParallelConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.parallel.context import Context
from pi0fm.train.plan.flops import training_work
from pi0fm.train.plan.memory import count_network
from pi0fm.train.plan.network import Network
from pi0fm.train.plan.planner import UPDATE_BYTES, Card, plan
from pi0fm.train.state import StateConfig, TrainState

SMALL, BETWEEN, LARGE = 2, 6, 10  # samples per process
WARM_UP = 2  # steps
FEW, MANY = 0.25, 2.0  # weights of the exchange, relative to the network's
CPU = torch.device("cpu")
DEAD_AFTER = timedelta(seconds=120)  # until a process counts as dead
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
Seconds = dict[str, float]  # by the name of the timed part


def measure(config: PlanningOptions) -> BenchReport:
    """Measure and plan each number of processes, and compare."""
    rows: dict[str, dict[str, Any]] = {}
    with progress.step("processes", len(config.processes)) as bar, tempfile.TemporaryDirectory() as place:
        for count in config.processes:
            with ProcessPoolExecutor(count, get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
                store = str(Path(place) / f"store-{count}")
                answers = pool.map(_worker, range(count), repeat(count), repeat(store), repeat(config))
                turns = [_slowest(each) for each in zip(*answers, strict=True)]
            rows |= compare_planned({key: min(turn[key] for turn in turns) for key in turns[0]}, count)
            bar.advance()
    errors = {name: row["planned_over_measured"] for name, row in rows.items()}
    worst = max(errors, key=lambda name: abs(errors[name] - 1))
    return BenchReport({"steps": rows, "worst": {"step": worst, "planned_over_measured": errors[worst]}})


def compare_planned(found: Seconds, count: int) -> dict[str, dict[str, Any]]:
    """Rows of `count` processes: planned and measured milliseconds per step, and their ratio."""
    card, network = rates(found, count)
    rows = {}
    for shard in _shards(count):
        run = TrainConfig(
            global_batch_size=BETWEEN * count, precision="float32", ema_decay=None, parallel=ParallelConfig(shard), model={"preset": "tiny"}
        )
        expected, measured = plan(run, card, network, count, cameras=1, device="cpu"), found[f"together {shard}"]
        parts = {f"{part}_ms": 1e3 * seconds for part, seconds in expected.parts.items()}
        whole = {"planned_ms": 1e3 * expected.seconds, "measured_ms": 1e3 * measured, "planned_over_measured": expected.seconds / measured}
        rows[f"{count} x {shard}"] = whole | parts
    return rows


def rates(found: Seconds, count: int) -> tuple[Card, Network]:
    """Rates of products, memory and network that one of `count` simultaneous processes reaches."""
    work = training_work(TINY, Adaptation(), cameras=1)
    trained = count_network(TINY, Adaptation(), torch.float32).trained // 4
    a_sample = (found[f"pass {LARGE}"] - found[f"pass {SMALL}"]) / (LARGE - SMALL)
    a_pass = max(1e-9, found[f"pass {SMALL}"] - SMALL * a_sample)
    bandwidth = trained / a_pass  # with one byte per number
    update = UPDATE_BYTES * trained / (bandwidth * found["optimizer"])
    flops = (work.forward + work.backward) / a_sample
    card = Card(
        memory_gib=1.0,
        flops_per_second=flops,
        bytes_per_second=bandwidth,
        forward_efficiency=1.0,
        backward_efficiency=1.0,
        adapter_bytes=0.0,
        pass_bytes=1.0,
        update_share=update,
        inside=1.0,
        latency=0.0,
        overlap=0.0,
        price=0.0,
    )
    if count == 1:
        return card, Network(1.0, 1.0, 0.0, 1)
    sizes = [found[f"bytes {times}"] for times in (FEW, MANY)]
    reduced, once, twice = ([found[f"{shard} {times}"] for times in (FEW, MANY)] for shard in (NONE, GRADIENTS, FULL))
    gathers = [full - gradients for full, gradients in zip(twice, once, strict=True)]
    scatters = [gradients - gather for gradients, gather in zip(once, gathers, strict=True)]
    units = len(count_network(TINY, Adaptation(), torch.float32).units)
    inside = (count - 1) / count * (sizes[1] - sizes[0]) / max(1e-9, gathers[1] - gathers[0])
    moved = (count - 1) / count * sizes[0] / inside
    latency = max(0.0, gathers[0] - moved) / (units * math.log2(count))
    network = Network(inside, inside, latency, count)
    group = network.group(count)
    one_bucket = sum(network.gather(group, size) for size in sizes)
    network = replace(network, scatter_times=sum(scatters) / sum(gathers), reduce_times=sum(reduced) / one_bucket)
    return replace(card, inside=inside), network


def _shards(count: int) -> tuple[str, ...]:
    return (NONE,) if count == 1 else (NONE, GRADIENTS, FULL)


def _worker(rank: int, count: int, store: str, config: PlanningOptions) -> list[Seconds]:
    """Figures of one process by turn. Called in `count` processes at once."""
    torch.set_num_threads(1)
    keep_freed_memory()
    this = psutil.Process()
    if hasattr(this, "cpu_affinity"):
        cores = this.cpu_affinity()
        this.cpu_affinity([cores[rank % len(cores)]])
    where = FileStore(store, count)
    return [_measure_turn(rank, count, where, f"{turn}", config.steps) for turn in range(config.turns)]


def _measure_turn(rank: int, count: int, store: FileStore, turn: str, steps: int) -> Seconds:
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)  # accelerate reads from them whether there are other processes
    found: Seconds = {}
    for samples in (SMALL, LARGE):
        parallel = Parallel(Context(), "float32", allow_cuda=False)
        trainer = Trainer(TrainState.build(TINY, StateConfig(), None, parallel), parallel)
        _step_seconds(trainer, samples, 1, WARM_UP)
        _wait_for_all(store, f"{turn} alone {samples}", count)
        parts = _step_seconds(trainer, samples, 1, steps)
        found |= {f"pass {samples}": parts["forward"] + parts["backward"], "optimizer": parts["optimizer"]}
        parallel.close()
    if count > 1:
        os.environ |= dict(zip(RANK_VARIABLES, (str(rank), str(count), str(rank), "127.0.0.1", "1"), strict=True))
        distributed.init_process_group("gloo", store=PrefixStore(turn, store), rank=rank, world_size=count, timeout=DEAD_AFTER)
        parallel = Parallel(Context(rank, count, shown=False), "float32", allow_cuda=False)
        with torch.device("meta"):
            network = Pi0(TINY)
        for times in (FEW, MANY):
            found |= {f"{what} {times}": figure for what, figure in exchange_seconds(network, parallel, times, steps).items()}
    for shard in _shards(count):
        parallel = Parallel(Context(rank, count, shown=False), "float32", allow_cuda=False)
        trainer = Trainer(TrainState.build(TINY, StateConfig(parallel=ParallelConfig(shard)), None, parallel), parallel)
        _step_seconds(trainer, BETWEEN, count, WARM_UP)
        parallel.barrier()
        found[f"together {shard}"] = sum(_step_seconds(trainer, BETWEEN, count, steps).values())
    parallel.close()
    return found


def _step_seconds(trainer: Trainer, samples: int, count: int, steps: int) -> Seconds:
    """Seconds per step by part, the mean over `steps` steps."""
    batch, clock = make_batch(Case(TINY, (True,), TINY.max_prompt_tokens, samples), seed=0), StepClock(CPU)
    for _ in range(steps):
        trainer.step(repeat(batch), batch.action_mask.numel() * count, clock.mark)
    return {part: seconds / steps for part, seconds in clock.seconds().items()}


def _slowest(processes: Sequence[Seconds]) -> Seconds:
    return {key: max(each[key] for each in processes) for key in processes[0]}


def _wait_for_all(store: FileStore, name: str, count: int) -> None:
    if store.add(name, 1) == count:
        store.set(f"{name} all", "")
    store.wait([f"{name} all"], DEAD_AFTER)
