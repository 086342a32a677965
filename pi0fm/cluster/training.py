"""A training run on Ray workers, in this process, or under torchrun: three ways to call `train.loop.train`.

Owns: the start of the workers and their arguments; drawing their progress from metrics.jsonl. Does not know: training.

    num_workers 0              train() here                     (under torchrun, which sets RANK and WORLD_SIZE: in each of its processes)
    num_workers N    driver -> TorchTrainer -> N x train()      gloo on CPUs, nccl on GPUs; N..M: as many as the cluster has room for
                       `---- reads metrics.jsonl, draws the bar
"""

import math
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi0fm import files, options, progress
from pi0fm.cluster import status_lines
from pi0fm.cluster.caching import cache_everywhere
from pi0fm.cluster.nodes.preflight import nodes_with, refuse_nodes
from pi0fm.cluster.runtime import RayHead, local_ray_processes, ray_session, refuse_ended, require_resources
from pi0fm.cluster.training_run import TrainingRun, refuse_at_once
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.resizing import ANTIALIAS
from pi0fm.processes import end_with_parent
from pi0fm.train.parallel.context import Context, context_from_environment, restarts
from pi0fm.train.start.output import RAY_FOLDER, claimed
from pi0fm.train.watch.log import format_progress
from pi0fm.train.watch.metrics import read_last
from pi0fm.train.watch.requests import RunRequest, remove_requests, write_request
from pi0fm.train.watch.signals import MovedError, RecordedSignals, StoppedError, stopped_error, terminated_outside_steps
from pi0fm_client.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from pi0fm.train.loop import TrainResult

SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LOOKS_FOR_ROOM = 0.2, 5.0  # at signals and Ray's processes; at the cluster's nodes


def train(context: Context, run: TrainingRun) -> "TrainResult":
    """Call `pi0fm.train.loop.train`, imported here since a driver of Ray workers does not need its libraries."""
    from pi0fm.train import loop

    return loop.train(context, run)


def run_training(run: TrainingRun) -> "TrainResult":
    """Claim the output folder, train on the workers that `run` asks for, and return the result."""
    refuse_at_once(run)

    def ended() -> str:
        return _unfinished(run)

    with terminated_outside_steps(ended):
        if run.workers == (0, 0):
            return _in_this_process(run)
        # again inside: Ray installs a signal handler when it starts
        with claimed(run), ray_session(run.ray_address, ship_code=run.ship_code), terminated_outside_steps(ended):
            return _on_ray(run)


def _in_this_process(run: TrainingRun) -> "TrainResult":
    context = context_from_environment()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # when torchrun's agent is killed, its workers would train on during the next run
        end_with_parent(os.getppid())
    if not context.is_first:
        return train(context, run)
    with claimed(run, restarted=restarts() > 0):
        return train(context, run)


def _unfinished(run: TrainingRun) -> str:
    if read_last(run.output_dir) is None:
        return "stopped by SIGTERM before the first step: nothing was trained; type the same command again"
    return f"stopped by SIGTERM outside a step; the newest checkpoint in {run.checkpoint_place} stays: add --resume true to go on"


def _on_ray(run: TrainingRun) -> "TrainResult":
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pi0fm.cluster.elastic import CheckpointRequester, shorten_ray_intervals
    from pi0fm.cluster.ray_faults import EndAtFaults

    (fewest, most), cluster = run.workers, ray.cluster_resources()
    usual = 1.0 if cluster.get("GPU", 0) and run.device != "cpu" else 0.0
    gpus = usual if run.gpus_per_worker is None else run.gpus_per_worker
    each = {"CPU": float(run.cpus_per_worker or _share_of_cpus(most, gpus)), **({"GPU": gpus} if gpus else {})}
    require_resources(each, fewest)
    _report_held_resources(each, fewest)
    placed = _absolute(run)
    if not local_ray_processes():
        refuse_nodes(nodes_with(each), placed.output_dir, placed.checkpoint_place)
    if sum(node["Alive"] for node in ray.nodes()) > 1:  # on one machine the first worker builds, while the others wait for its lock
        entries = list(placed.entries().values())
        cache_everywhere(entries, run.network().vision.image_size, needs=each, resize=run.resize or ANTIALIAS)
    shorten_ray_intervals(alone=bool(local_ray_processes()))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": options.encode(placed)},
        # hangs end by the watchdog, with stacks; this longer timeout is for hangs that the watchdog cannot end
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(2 * run.hang_seconds) + 60),
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=bool(gpus),
            resources_per_worker=each,
            elastic_resize_monitor_interval_s=run.resize_seconds,
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=str(placed.output_dir),
            failure_config=FailureConfig(max_failures=-1),  # counted by EndAtFaults
            callbacks=[EndAtFaults(placed.output_dir, run.max_failures), CheckpointRequester(placed.output_dir)],
        ),
    )
    began = time.perf_counter()
    with _ProgressReader(run), RecordedSignals(lambda: write_request(run.output_dir, RunRequest.STOP)) as noted:
        _fit(trainer, run.output_dir, lambda: _missing_resources(each, fewest), noted)
    last = read_last(run.output_dir) or {}
    if noted.number and int(last.get("step", 0)) < run.steps:  # the workers saved and left
        told = "Ctrl-C" if noted.number == signal.SIGINT else "SIGTERM"
        raise stopped_error(noted.number, f"stopped by {told}, with a checkpoint in {run.checkpoint_place}; add --resume true to go on")
    from pi0fm.train.loop import TrainResult  # now that nobody waits for its libraries

    return TrainResult(run.output_dir / "bundle", run.steps, float(last.get("loss", math.nan)), time.perf_counter() - began)


def _fit(trainer: Any, output_dir: Path, no_room: Callable[[], str | None], noted: RecordedSignals) -> None:
    """Run `trainer.fit()` in a thread: in the main thread Ray would replace the SIGINT handler, and signals would wait.

    Returns early on a signal while the cluster has `no_room` for the workers, since no worker can respond to it. Raises the fault inside
    Ray's error, and ClusterError if Ray itself ended.
    """
    from pi0fm.cluster.ray_faults import underlying_fault

    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  raised in the main thread
            raised.append(error)

    thread, ray_processes, head = threading.Thread(target=fit, name="pi0fm-fit", daemon=True), local_ray_processes(), RayHead()
    thread.start()
    told, looked = False, time.monotonic()
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_LOOKS)
        refuse_ended(ray_processes)
        try:
            head.refuse_lost()
        except ClusterError:
            write_request(output_dir, RunRequest.STOP)  # workers on other machines may still run: they save and leave
            raise
        if time.monotonic() - looked < SECONDS_BETWEEN_LOOKS_FOR_ROOM:
            continue
        looked, missing = time.monotonic(), no_room()
        if missing is not None and not told:
            progress.say(f"the run waits for room: {missing}")
        if missing is not None and noted.number:
            return
        told = missing is not None
    if raised:
        raise underlying_fault(raised[0]) from raised[0]


def _missing_resources(each: Mapping[str, float], fewest: int) -> str | None:
    """Describe the resources missing for the fewest workers; None if none are missing or the cluster does not answer."""
    try:
        require_resources(each, fewest)
    except ConfigError as error:
        return str(error)
    except Exception:  # noqa: BLE001  RayHead.refuse_lost reports a lost head
        return None
    return None


def _report_held_resources(each: Mapping[str, float], fewest: int) -> None:
    """Print which of the workers' resources other jobs hold, for which Ray waits."""
    import ray

    free = ray.available_resources()
    lacking = {name: amount * fewest - free.get(name, 0.0) for name, amount in each.items()}
    taken = ", ".join(f"{amount:g} {name}" for name, amount in lacking.items() if amount > 0)
    if taken:
        progress.say(f"other jobs on the cluster hold {taken} that {fewest} workers need: the run waits until they end")


def _worker(config: dict[str, Any]) -> None:
    """Train in a Ray worker, whose process group exists already."""
    import ray
    from ray import train as ray_train

    from pi0fm.cluster.elastic import preempted

    end_with_parent(os.getppid())  # the raylet: when it is killed, its node is lost, but Ray's workers run on for seconds
    run, place = options.decode(TrainingRun, config["run"]), ray_train.get_context()
    rank, node = place.get_world_rank(), f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:6]})"
    if rank == 0:
        remove_requests(run.output_dir, (RunRequest.SAVE, RunRequest.MOVE))  # requests to earlier workers
    files.write_json(worker_file(run.output_dir, rank), {"process": os.getpid(), "node": ray.get_runtime_context().get_node_id()})
    with status_lines.appended_to(status_file(run.output_dir) if rank == 0 else None):
        try:
            train(Context(rank, place.get_world_size(), shown=False, node=node), run)
        except MovedError as error:
            raise preempted(str(error)) from None
        except StoppedError:
            return  # an error would make Ray start the workers again
        except Exception as error:
            error.add_note(traceback.format_exc())  # pickling loses the traceback
            raise


def worker_file(output_dir: Path, rank: int) -> Path:
    """File in which a worker records its process and node."""
    return output_dir / RAY_FOLDER / f"worker-{rank}.json"


def status_file(output_dir: Path) -> Path:
    """File with the first worker's status lines, for the driver."""
    return output_dir / RAY_FOLDER / "said.txt"


def _share_of_cpus(num_workers: int, gpus: float) -> int:
    """CPUs of each worker: an equal share of one machine's cores; on a cluster 4 per GPU worker for the loader's threads, else 1."""
    import ray

    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return max(1, int(nodes[0]) // num_workers)
    return 4 if gpus else 1


def _absolute(run: TrainingRun) -> TrainingRun:
    """Make all paths absolute: Ray's workers have another working directory."""
    tokenizer = Path(run.tokenizer)
    if run.pretrained is not None:
        run = replace(run, pretrained=run.pretrained.absolute())
    if run.tokenizer not in ("byt5", "pretrained") and tokenizer.is_dir():
        run = replace(run, tokenizer=str(tokenizer.absolute()))
    mixture = {name: replace(entry, dataset=_absolute_folders(entry.dataset)) for name, entry in run.mixture.items()}
    return replace(run, output_dir=run.output_dir.absolute(), dataset=_absolute_folders(run.dataset), mixture=mixture)


def _absolute_folders(dataset: DatasetConfig) -> DatasetConfig:
    paths = {name: getattr(dataset, name).absolute() for name in ("root", "cache_dir") if getattr(dataset, name) is not None}
    return replace(dataset, **paths)


class _ProgressReader:
    """Progress bar and status lines of the workers in the driver, read from files in the output folder."""

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._status, self._stop = run, status_lines.StatusReader(status_file(run.output_dir)), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        directory: Path = self._run.output_dir
        before = int((read_last(directory) or {}).get("step", 0))
        progress.say(f"starting {self._run.num_workers} Ray training worker{'' if self._run.workers == (1, 1) else 's'}")
        while not self._stop.wait(0.5):
            self._status.print_new()
            if int((read_last(directory) or {}).get("step", 0)) > before:
                break
        with progress.step("train", self._run.steps, start=before) as bar:
            shown, ended = before, False
            while True:
                last = read_last(directory) or {}
                now = int(last.get("step", 0))
                if now != shown:
                    bar.advance(now - shown, note=format_progress(last))
                    shown = now
                self._status.print_new()
                if ended:
                    return
                ended = self._stop.wait(1.0)  # read once more after the end: the last lines may be newer than the last read
