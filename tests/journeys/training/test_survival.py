"""Tests of a run on several Ray nodes (raylets of one machine) under faults: the loss curve is that of one process.

workers   a process killed, a node killed that never returns, one that joins, one that is announced to go: one run of 1..2 workers
command   SIGKILL of the driver, then of Ray's head: the same command goes on, on another cluster
chaos     `pi0fm chaos` itself
hang      a worker that is stopped: ended after the bound, with the stack of the one that waits
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import recorded_curve as record
import tiny_dataset
import yaml

from pi0fm.cli.main import main
from pi0fm.cluster.chaos import TOLERANCE, weight_difference
from pi0fm.cluster.nodes.local_nodes import LocalNodes
from pi0fm.cluster.training import worker_file
from pi0fm.train.checkpoint.storage import whole
from pi0fm.train.watch.metrics import read_last

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(900)]

SECONDS = 240  # until something has happened, on a machine that is busy
STEPS, LAST = 500, 200  # of the runs in tests 1 and 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of config.yaml, for a run with slow steps and a learning rate at which runs on other workers stay comparable."""
    folder = tmp_path_factory.mktemp("survival")
    tree = record.options_of(tiny_dataset.written(tmp_path_factory), folder) | {"micro_batch_size": 1}
    tree |= {"steps": STEPS, "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1}, "checkpoint_every": 25, "cpus_per_worker": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({name: value for name, value in tree.items() if name != "output_dir"}))
    return folder


def quiet(place: Path, name: str, steps: int) -> Path:
    """The run of one process that nobody disturbs; in a process without the tests' checks of shapes, which take most of its time."""
    words = ["--output_dir", str(place / name), "--num_workers", "0", "--steps", str(steps)]
    command = [sys.executable, "-m", "pi0fm.cli.main", "train", str(place / "config.yaml"), *words]
    subprocess.run(command, check=True, capture_output=True)
    return place / name


@pytest.fixture
def started(place: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`started(run, nodes, "--option", "value")`: the command on these nodes."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(run: Path, nodes: LocalNodes, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pi0fm.cli.main", "train", str(place / "config.yaml"), "--output_dir", str(run)]
        command += ["--ray_address", nodes.address, "--resume", "auto", "--resize_seconds", "5", *words]
        with run.with_suffix(".log").open("ab") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def step_of(run: Path) -> int:
    return int((read_last(run) or {}).get("step", 0))


def log(run: Path) -> str:
    return run.with_suffix(".log").read_text(errors="replace")


def wait_until(run: Path, process: subprocess.Popen[bytes], what: Callable[[], bool]) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not what():
        assert process.poll() is None, f"ended with {process.returncode} at step {step_of(run)}:\n{log(run)[-3000:]}"
        assert time.monotonic() < began + SECONDS, f"at step {step_of(run)}:\n{log(run)[-3000:]}"
        time.sleep(0.05)
    return time.monotonic() - began


def starts(run: Path) -> int:
    """How often workers have begun, the first time and from a checkpoint."""
    return log(run).count("train 0.06 M parameters")


def resumed_by(run: Path, process: subprocess.Popen[bytes], act: Callable[[], object]) -> float:
    """Act; seconds until workers have begun again and taken a step."""
    before, reached = starts(run), step_of(run)
    act()
    seconds = wait_until(run, process, lambda: starts(run) > before)
    again = step_of(run)
    seconds += wait_until(run, process, lambda: step_of(run) != again)
    print(f"{getattr(act, '__name__', act)}: {seconds:.1f} s, from step {reached}")
    return seconds


def worker(run: Path, rank: int) -> dict:
    return yaml.safe_load(worker_file(run, rank).read_text())


def test_workers_and_nodes_come_and_go(place, started):
    run = place / "elastic"
    with LocalNodes(2) as nodes:
        process = started(run, nodes, "--num_workers", "1..2")
        wait_until(run, process, lambda: step_of(run) > 10)

        def kill_a_worker() -> None:
            os.kill(worker(run, 1)["process"], signal.SIGKILL)

        resumed_by(run, process, kill_a_worker)
        assert "which 2 workers wrote" not in log(run)

        def lose_a_node() -> None:
            nodes.kill(worker(run, 1)["node"])

        wait_until(run, process, lambda: len(whole(run / "checkpoints")) > 0)
        assert resumed_by(run, process, lose_a_node) < 120  # 30 s on an idle machine, see pi0fm bench scaling
        assert "which 2 workers wrote" in log(run)

        before = step_of(run)
        resumed_by(run, process, nodes.add)
        assert "which 1 workers wrote" in log(run)
        assert any(step % 25 for step in whole(run / "checkpoints")), "no checkpoint was asked for before the workers were stopped"

        def announce() -> None:
            nodes.drain(worker(run, 1)["node"], 60)

        wait_until(run, process, lambda: step_of(run) > before + 5)
        at = step_of(run)
        resumed_by(run, process, announce)
        last = [line for line in log(run).splitlines() if line.startswith("resumed from step")][-1]
        assert int(last.split()[3].rstrip(",")) >= at  # saved when it was announced, not at the last multiple
        assert process.wait(timeout=SECONDS) == 0, log(run)[-3000:]
    assert [line["step"] for line in record.curve(run)] == list(range(1, STEPS + 1))
    expected = quiet(place, "quiet", STEPS)
    for ours, theirs in zip(record.curve(run), record.curve(expected), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert weight_difference(run, expected) < TOLERANCE


def test_the_command_and_then_the_head_are_lost(place, started):
    run, words = place / "lost", ("--num_workers", "1", "--steps", str(LAST))
    with LocalNodes(1) as nodes:
        process = started(run, nodes, *words)
        wait_until(run, process, lambda: step_of(run) > 30)
        trainer = psutil.Process(worker(run, 0)["process"])
        process.kill()
        process.wait()
        trainer.wait(timeout=60)
        process = started(run, nodes, *words)
        wait_until(run, process, lambda: starts(run) == 2 and step_of(run) > 40)
        nodes.kill_head()
        assert process.wait(timeout=120) == 1, log(run)[-3000:]
        assert log(run).splitlines()[-1].startswith("pi0fm: Ray must live as long as the run, found ")
    with LocalNodes(1) as nodes:
        assert started(run, nodes, *words).wait(timeout=SECONDS) == 0, log(run)[-3000:]
    assert [line["step"] for line in record.curve(run)] == list(range(1, LAST + 1))
    assert weight_difference(run, quiet(place, "short", LAST)) < TOLERANCE


def test_a_disturbed_run_ends_in_the_weights_of_a_quiet_one_bit_by_bit(place, capsys):
    words = ["--num_workers", "1", "--steps", str(LAST), "--chaos.kinds", "worker,driver", "--chaos.kills", "2", "--chaos.every", "4"]
    assert main(["chaos", str(place / "config.yaml"), "--output_dir", str(place / "chaos"), *words]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["equal"] and found["difference"] == 0 and sum(found["kills"].values()) == 2


def test_a_worker_that_hangs_is_ended_and_the_others_say_where_they_wait(place, started):
    run = place / "hang"
    with LocalNodes(2) as nodes:
        process = started(run, nodes, "--num_workers", "2", "--hang_seconds", "20", "--steps", str(LAST))
        wait_until(run, process, lambda: step_of(run) > 30)
        seconds = resumed_by(run, process, lambda: os.kill(worker(run, 1)["process"], signal.SIGSTOP))
        assert seconds > 20
        assert process.wait(timeout=SECONDS) == 0, log(run)[-3000:]
    [stack] = (run / "hangs").glob("step-*-worker-0.txt")
    assert "took no step for 20 s" in stack.read_text() and "train_step" in stack.read_text()
    assert "no stack came from worker 1 on " in log(run)
