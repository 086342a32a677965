"""Fault injection: kill workers, nodes or the command of a training run at intervals, and compare its weights with an undisturbed run's.

Owns: what is killed and when, by a seed; the cost of each kill; the comparison. Does not know: how a run recovers.

    quiet        |--------------------------------| bundle          `pi0fm train` on nodes of this machine, or on your cluster
    disturbed-0  |----x .... ----x ...... ---------| bundle         the same command with --resume auto, started again where it ended
                      worker     node                               compared: bit by bit where the number of workers is fixed
    disturbed-1  until `minutes` are over

A kill is due `every` seconds after the last one, and at least a third of that after the first step since, so that the run makes progress.
The cost of a kill is the seconds until that step, and the number of repeated steps.

    worker    SIGKILL of one training process                      any cluster whose nodes the command may join
    driver    SIGKILL of the command                               any cluster
    node      SIGKILL of its raylet and that raylet's processes; another node joins after `back_seconds`   nodes of this machine
    drain     a notice of SECONDS_OF_NOTICE, then as `node`        nodes of this machine
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, final

import psutil
import yaml

from pi0fm import files, options, progress
from pi0fm.cluster.nodes.local_nodes import LocalNodes
from pi0fm.cluster.nodes.preflight import on_each_node
from pi0fm.cluster.runtime import ray_session
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.options import option
from pi0fm.train.start.output import RAY_FOLDER
from pi0fm_client.errors import ClusterError, ConfigError

ANYWHERE, HERE = ("worker", "driver"), ("worker", "driver", "node", "drain")
SECONDS_BETWEEN_LOOKS, SECONDS_UNTIL_STARTED, SECONDS_OF_NOTICE = 0.05, 600.0, 20.0
TOLERANCE = 1e-2  # of the norm of all weights, where the number of workers changes the order of summation: AdamW amplifies rounding


@dataclass(frozen=True)
class ChaosConfig:
    """Kinds and times of kills. Raises ConfigError for a value out of range."""

    every: float = option(30.0, "seconds between two kills")
    minutes: float = option(10.0, "minutes after which nothing is killed; until then a run that ends is followed by another")
    kinds: str = option("", f"kills, of {', '.join(HERE)}, comma-separated; empty takes all, on a joined cluster {' and '.join(ANYWHERE)}")
    kills: int | None = option(None, "largest number of kills; empty for no limit but the minutes")
    seed: int = option(0, "seed of the kinds and of the time of the first kill")
    nodes: int | None = option(None, "nodes of this machine, one worker each; empty takes one more than the most workers")
    back_seconds: float | None = option(15.0, "seconds until a new node joins in place of a lost one; null for never")

    def __post_init__(self) -> None:
        for name in ("every", "minutes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"chaos.{name} must be above 0, found {getattr(self, name):g}; leave it out for the default")
        options.refuse_below(self, "chaos.", kills=1, seed=0, nodes=1, back_seconds=0)
        for kind in self.names(HERE):
            if kind not in HERE:
                raise ConfigError(f"chaos.kinds: {options.nearest(kind, HERE)}")

    def names(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """Kinds of kills by name, `default` when none is given."""
        return tuple(word.strip() for word in self.kinds.split(",") if word.strip()) or default


@dataclass(frozen=True)
class Kill:
    """A kill and its cost. seconds: until the next step, None before that; again: number of repeated steps."""

    kind: str
    step: int
    seconds: float | None = None
    repeated_steps: int = 0


def chaos(run: TrainingRun, config: ChaosConfig) -> dict[str, Any]:
    """Run undisturbed, then disturbed until the time is over; returns the figures.

    run.output_dir: new, or holding the quiet run of an earlier call with the same options. Raises ClusterError where the weights differ or
    a run does not recover.
    """
    kinds = config.names(ANYWHERE if run.ray_address else HERE)
    if run.ray_address and not set(kinds) <= set(ANYWHERE):
        raise ConfigError(f"on a joined cluster chaos.kinds must be {' and '.join(ANYWHERE)}, found {', '.join(kinds)}; leave it out")
    if run.workers == (0, 0):
        raise ConfigError("pi0fm chaos needs Ray workers, found num_workers 0; type --num_workers 2")
    if run.checkpoint_dir:
        raise ConfigError(f"pi0fm chaos keeps checkpoints in each run's folder, found checkpoint_dir {run.checkpoint_dir}; leave it out")
    files.make_folder(run.output_dir)
    commanded = run.output_dir / "config.yaml"
    files.write_text(commanded, yaml.safe_dump(_for_command(run)))
    with ExitStack() as stack:
        nodes = None if run.ray_address else stack.enter_context(LocalNodes(config.nodes or run.workers[1] + 1))
        address = nodes.address if nodes is not None else str(run.ray_address)
        quiet = _Command(commanded, run.output_dir / "quiet", address)
        progress.say("chaos: the quiet run")
        quiet.finish()
        rounds: list[list[Kill]] = []
        until, chance = time.monotonic() + 60 * config.minutes, random.Random(config.seed)
        while time.monotonic() < until and (config.kills is None or sum(map(len, rounds)) < config.kills):
            left = None if config.kills is None else config.kills - sum(map(len, rounds))
            command = _Command(commanded, run.output_dir / f"disturbed-{len(rounds)}", address)
            rounds.append(_DisturbedRun(command, nodes, replace(config, kills=left), kinds, chance, until).run())
            difference = weight_difference(quiet.folder, command.folder)
            if difference > (0.0 if run.workers[0] == run.workers[1] else TOLERANCE):
                raise ClusterError(
                    f"a disturbed run must end in the quiet one's weights, found {difference:.2g} of their norm between "
                    f"{command.folder} and {quiet.folder} after {_list_kills(rounds[-1])}; keep both folders and report them"
                )
            progress.say(
                f"chaos: round {len(rounds)} ended in the quiet run's weights (difference {difference:.2g}) after {_list_kills(rounds[-1])}"
            )
    return _figures(rounds, difference)


def _for_command(run: TrainingRun) -> dict[str, Any]:
    """Options that each command reads from a file; its cluster and output folder are on its command line."""
    names = {name: value for name, value in options.encode(run).items() if name in TrainingRun.__dataclass_fields__}
    return {name: value for name, value in names.items() if name not in ("output_dir", "ray_address", "resume")}


def _figures(rounds: list[list[Kill]], difference: float) -> dict[str, Any]:
    kills = [kill for each in rounds for kill in each]
    seconds = {kind: [kill.seconds for kill in kills if kill.kind == kind and kill.seconds is not None] for kind in HERE}
    return {
        "equal": True,
        "difference": difference,
        "rounds": len(rounds),
        "kills": {kind: sum(kill.kind == kind for kill in kills) for kind in HERE},
        "median_seconds": {kind: round(median(found), 1) for kind, found in seconds.items() if found},
        "most_seconds": {kind: round(max(found), 1) for kind, found in seconds.items() if found},
        "most_steps_again": max((kill.repeated_steps for kill in kills), default=0),
    }


def _list_kills(kills: list[Kill]) -> str:
    each = [f"{kill.kind} after step {kill.step}" + (f" ({kill.seconds:.0f} s)" if kill.seconds is not None else "") for kill in kills]
    return ", ".join(each) or "no kill"


def weight_difference(one: Path, other: Path) -> float:
    """Distance of the weights of two runs' bundles relative to the norm of `other`'s; 0 if bitwise equal, infinite if any is not finite."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (load_file(run / "bundle" / "model.safetensors") for run in (one, other))
    if all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()):
        return 0.0
    squares = [
        (float((ours[name] - tensor).double().square().sum()), float(tensor.double().square().sum())) for name, tensor in theirs.items()
    ]
    apart, norm = (math.fsum(column) for column in zip(*squares, strict=True))
    return math.sqrt(apart / norm) if math.isfinite(apart) and norm > 0 else math.inf


@final
class _Command:
    """A `pi0fm train` command in a separate process, which can be started again."""

    def __init__(self, config: Path, folder: Path, address: str) -> None:
        self.folder, self._metrics = folder, folder / "metrics.jsonl"
        words = ["train", str(config), "--output_dir", str(folder), "--ray_address", address, "--resume", "auto"]
        self._words = [sys.executable, "-m", "pi0fm.cli.main", *words]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command, with its output in FOLDER.log."""
        with self.folder.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=log, start_new_session=True)

    def finish(self) -> None:
        """Run the command undisturbed to its end. Raises ClusterError with its last line where it fails."""
        self.start()
        try:
            while self.code() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self.kill()
        if self.code() != 0:
            raise ClusterError(f"the run in {self.folder} must end by itself, found: {self.last_line()}")

    def code(self) -> int | None:
        """Exit code, None while the command runs."""
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        """Kill the command if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def last_line(self) -> str:
        """Last line of its output."""
        lines = self.folder.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def reached(self) -> tuple[int, int]:
        """Last step in metrics.jsonl, and that file's inode: workers replace the file whenever they start."""
        try:
            with self._metrics.open("rb") as file:
                which = os.fstat(file.fileno()).st_ino
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                line = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
            return int(json.loads(line)["step"]), which
        except (OSError, ValueError, KeyError):
            return 0, -1


@final
class _DisturbedRun:
    """A run with kills until the time `until`."""

    def __init__(
        self, command: _Command, nodes: LocalNodes | None, config: ChaosConfig, kinds: tuple[str, ...], chance: random.Random, until: float
    ) -> None:
        self._command, self._nodes, self._config, self._kinds, self._chance, self._until = command, nodes, config, kinds, chance, until
        self._kills: list[Kill] = []
        self._killed = self._deadline = self._settled = time.monotonic()
        self._before = -1  # inode of the metrics file at the last kill
        self._resumed: int | None = None
        self._joins: list[float] = []

    def run(self) -> list[Kill]:
        """Run to the end; returns the kills."""
        due, first = math.inf, self._chance.uniform(0.3, 1.0) * self._config.every
        self._command.start()
        self._deadline = time.monotonic() + SECONDS_UNTIL_STARTED
        try:
            while (code := self._command.code()) != 0:
                now = time.monotonic()
                if code is not None:
                    self._start_again()
                self._add_nodes(now)
                pending = self._measure(now)
                step, _ = self._command.reached()
                due = now + first if due == math.inf and step > 0 else due
                wanted = self._config.kills is None or len(self._kills) < self._config.kills
                if not pending and wanted and max(due, self._settled) <= now < self._until:
                    self._kill(step)
                    due = self._killed + self._config.every
                if now > self._deadline and (pending or step == 0):
                    raise ClusterError(
                        f"the run in {self._command.folder} took no step for {SECONDS_UNTIL_STARTED:g} s after {_list_kills(self._kills)}"
                    )
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self._command.kill()
        self._measure(time.monotonic())
        return self._kills

    def _start_again(self) -> None:
        """Start the command again if it was killed. Raises ClusterError if it ended for another reason."""
        if not self._kills or self._kills[-1].kind != "driver" or self._kills[-1].seconds is not None:
            raise ClusterError(
                f"the run in {self._command.folder} must survive, found it ended after {_list_kills(self._kills)}: "
                f"{self._command.last_line()}"
            )
        self._command.start()

    def _measure(self, now: float) -> bool:
        """Record the cost of the last kill once a step was taken; returns whether that is pending."""
        if not self._kills or self._kills[-1].seconds is not None:
            return False
        step, which = self._command.reached()
        if which in (self._before, -1):
            return True
        if self._resumed is None:
            self._resumed = step
            return True
        if step == self._resumed and self._command.code() != 0:
            return True
        last = self._kills[-1]
        self._kills[-1] = replace(last, seconds=now - self._killed, repeated_steps=max(0, last.step - self._resumed))
        self._settled = now + self._config.every / 3
        progress.say(f"chaos: {last.kind} after step {last.step}: goes on after {now - self._killed:.1f} s from step {self._resumed}")
        return False

    def _kill(self, step: int) -> None:
        _, self._before = self._command.reached()
        kind = self._chance.choice(self._kinds)
        try:
            self._inject(kind)
        except (OSError, ValueError, KeyError, StopIteration, psutil.Error):
            return  # the run has ended or is starting: try again at the next look
        self._killed, self._resumed = time.monotonic(), None
        self._deadline = self._killed + SECONDS_UNTIL_STARTED
        self._kills.append(Kill(kind, step))

    def _inject(self, kind: str) -> None:
        if kind == "driver":
            self._command.kill()
            return
        folder = self._command.folder
        workers = sorted((folder / RAY_FOLDER).glob("worker-*.json"))
        # files of workers that the run no longer has are older
        newest = max(path.stat().st_mtime for path in workers)
        found = [json.loads(path.read_text()) for path in workers if path.stat().st_mtime > newest - SECONDS_OF_NOTICE]
        chosen = self._chance.choice(found)
        if kind == "worker":
            _kill_worker(int(chosen["process"]), str(chosen["node"]), self._nodes, folder)
        elif self._nodes is not None and chosen["node"] in self._nodes.alive:
            if kind == "node":
                self._nodes.kill(chosen["node"])
            else:
                self._nodes.drain(chosen["node"], SECONDS_OF_NOTICE)
            if self._config.back_seconds is not None:
                self._joins.append(time.monotonic() + self._config.back_seconds)
        else:
            raise ValueError

    def _add_nodes(self, now: float) -> None:
        while self._nodes is not None and self._joins and self._joins[0] <= now:
            self._joins.pop(0)
            self._nodes.add()


def _kill_worker(process: int, node: str, nodes: LocalNodes | None, folder: Path) -> None:
    """SIGKILL, on this machine or on a node of a cluster. Raises ValueError where that process is no longer a worker."""
    if nodes is not None:
        end_worker(process)
        return
    with ray_session(_address_in(folder)):
        answer = on_each_node(end_worker, [node], process)[node]
    if isinstance(answer, Exception):
        raise ValueError from answer


def end_worker(process: int) -> None:
    """Kill a worker on this node. Raises ValueError for a process that is not Ray's, such as one with a reused number."""
    with suppress(psutil.NoSuchProcess):
        if "ray::" in " ".join(psutil.Process(process).cmdline()):
            os.kill(process, signal.SIGKILL)
            return
    raise ValueError(f"no worker of Ray has the process {process}")


def _address_in(folder: Path) -> str:
    record = json.loads((folder / "run.json").read_text())
    return str(record["ray_address"])
