"""Two Ray workers against two torchrun workers; seconds of a start, a kill and a lost node; bytes of a state sharded over four workers.

Owns: the runs, each a command of pi0fm in separate processes, and their figures. Does not know: Ray, how a run recovers.

    ray_of_torchrun      steps per second after the start: two Ray Train workers / two torchrun workers, alternating      at least 0.97
    first_step_seconds   from the command on Ray to its first step, including imports and the start of Ray                at most 25
    kill_seconds         from SIGKILL of one of two workers to the next step                                              at most 30
    shrink_seconds       from the loss of one of two nodes, for good, to the next step of the other                       at most 30
    shard_bytes_ratio    weights, moments, gradients of the fullest of four workers under full sharding / one process's   at most 0.30

All but the last are wall times of many processes that start at once and are valid only on an idle machine: the report contains the load
average at the start and at the end.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from pi0fm import progress
from pi0fm.bench.config import ScalingOptions
from pi0fm.bench.harness.cases import make_batch
from pi0fm.bench.harness.measure import BenchReport
from pi0fm.bench.harness.sizes import CASES
from pi0fm.bench.loading import write_dataset
from pi0fm.processes import end_with_parent
from pi0fm_client.errors import Pi0fmError

PICTURE, FRAMES = 96, 1400
LINES_LEFT_OUT = 5  # of metrics, at the start of each run
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")


def measure(options: ScalingOptions) -> BenchReport:
    """Run the commands one after the other. Raises Pi0fmError with the last line of a failed one."""
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="pi0fm-bench-scaling-") as name:
        folder = Path(name)
        write_dataset(folder / "dataset", FRAMES, PICTURE)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(_run(folder, options)))
        _start_and_speed(folder, "cache", ("--num_workers", "0", "--steps", "2"))  # decodes the videos for all runs
        sides: dict[str, list[float]] = {"ray": [], "torchrun": []}
        starts: list[float] = []
        for number in range(options.rounds):
            for side in ("ray", "torchrun") if number % 2 == 0 else ("torchrun", "ray"):
                launcher, workers = ((), "2") if side == "ray" else (TORCHRUN, "0")
                first, speed = _start_and_speed(
                    folder, f"{side}-{number}", ("--num_workers", workers, "--steps", str(options.steps)), launcher
                )
                sides[side].append(speed / options.batch_size)
                starts += [first] if side == "ray" else []
                progress.say(f"{side}: {speed / options.batch_size:.2f} steps/s, first step after {first:.1f} s")
        kill = _chaos_figures(folder, "worker", "2", options)
        shrink = _chaos_figures(folder, "node", "1..2", options)
    alone, cut = held_bytes(1), held_bytes(4)
    load.append(os.getloadavg()[0])
    figures = {
        "ray_of_torchrun": median(ray / torchrun for ray, torchrun in zip(sides["ray"], sides["torchrun"], strict=True)),
        "kill_seconds": kill["median_seconds"]["worker"],
        "shrink_seconds": shrink["median_seconds"]["node"],
        "first_step_seconds": median(starts),
        "shard_bytes_ratio": max(cut) / max(alone),
    }
    more = {"steps_per_second": {side: median(each) for side, each in sides.items()}, "load_average": load, "rounds": options.rounds}
    return BenchReport(figures | more | {"steps_again": {"worker": kill["most_steps_again"], "node": shrink["most_steps_again"]}})


def _run(folder: Path, options: ScalingOptions) -> dict[str, Any]:
    """Configuration of the tiny preset on the generated data set: a line of metrics each step, one thread per worker."""
    return {
        "global_batch_size": options.batch_size,
        "dataset": {"root": str(folder / "dataset"), "cache_dir": str(folder / "frames")},
        "model": {"preset": "tiny"},
        "precision": "float32",
        "threads": 1,
        "log_every": 1,
        "checkpoint_every": 50,
        "cpus_per_worker": 1,
    }


def _start_and_speed(folder: Path, name: str, words: tuple[str, ...], launcher: tuple[str, ...] = ()) -> tuple[float, float]:
    """Seconds until the first step of a run, and its samples per second after the start."""
    run, command = folder / name, [sys.executable, *launcher, "-m", "pi0fm.cli.main", "train", str(folder / "config.yaml"), *words]
    with run.with_suffix(".log").open("wb") as log:
        began = time.perf_counter()
        process = subprocess.Popen([*command, "--output_dir", str(run)], stdout=log, stderr=log)
        first = None
        while process.poll() is None:
            if first is None and _lines(run):
                first = time.perf_counter() - began
            time.sleep(0.02)
    lines = _lines(run)
    if process.returncode or not lines:
        raise _failed(run.with_suffix(".log"))
    speeds = [line["samples_per_second"] for line in lines[LINES_LEFT_OUT:] or lines]
    return first or time.perf_counter() - began, median(speeds)


def _chaos_figures(folder: Path, kind: str, workers: str, options: ScalingOptions) -> dict[str, Any]:
    """Figures of `pi0fm chaos` with one kill; a lost node is not replaced."""
    place = folder / f"chaos-{kind}"
    words = ["--output_dir", str(place), "--num_workers", workers, "--steps", str(options.disturbed_steps)]
    words += ["--chaos.kinds", kind, "--chaos.kills", "1", "--chaos.nodes", "2", "--chaos.every", "5", "--chaos.back_seconds", "null"]
    with place.with_suffix(".log").open("wb") as log:
        command = [sys.executable, "-m", "pi0fm.cli.main", "chaos", str(folder / "config.yaml"), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=False)
    if done.returncode:
        raise _failed(place.with_suffix(".log"))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if kind not in found["median_seconds"]:
        more = 2 * options.disturbed_steps
        raise Pi0fmError(f"a disturbed run must last beyond its kill, found it ended before; type --disturbed_steps {more}")
    progress.say(f"{kind} killed: {found['median_seconds'][kind]:.1f} s to the next step, {found['most_steps_again']} steps again")
    return found


def _lines(run: Path) -> list[dict[str, float]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    except FileNotFoundError:
        return []


def _failed(log: Path) -> Pi0fmError:
    said = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return Pi0fmError(f"a run of the measurement must end by itself, found: {said[-1]}")


def held_bytes(workers: int) -> list[int]:
    """Bytes of weights, moments and gradients on each of `workers` gloo workers of a tiny state, fully sharded if they are several."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
            return list(pool.map(_held_bytes, range(workers), [workers] * workers, [folder] * workers))


def _held_bytes(rank: int, workers: int, folder: str) -> int:
    """Bytes on worker `rank`, called in a separate process."""
    import torch

    from pi0fm.bench.harness.steps import Trainer
    from pi0fm.train.components import FULL, NONE, ParallelConfig
    from pi0fm.train.parallel.accelerate import Parallel
    from pi0fm.train.parallel.context import Context
    from pi0fm.train.parallel.sharding import local
    from pi0fm.train.state import StateConfig, TrainState

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    case = replace(CASES["tiny"], training_batch=2)
    parallel = Parallel(Context(rank, workers, shown=False), allow_cuda=False)
    how = StateConfig(parallel=ParallelConfig(FULL if workers > 1 else NONE))
    trainer = Trainer(TrainState.build(case.config, how, None, parallel), parallel)
    held = sum(local(tensor).nbytes for name, tensor in trainer.state.tensors().items())
    batch, flow = make_batch(case, seed=0), trainer.flow
    t = flow.times(batch.uniform.flatten())
    pair = flow.training_pair(batch.actions, t, batch.noise.flatten(0, 1))
    parallel.accelerator.backward(trainer.state.trained(batch.observation, pair.x_t, t).square().sum())
    gradients = [parameter.grad for parameter in trainer.state.network.parameters() if parameter.grad is not None]
    return held + sum(local(gradient).nbytes for gradient in gradients)
