"""Batches from worker processes are those of threads, in the loader and in a run; a worker or a parent that is killed leaves nothing."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import recorded_curve as record
import tiny_dataset
import yaml
from numbered_arrays import Numbered, made_in_processes

from pi0fm.cli.main import main
from pi0fm.data.chain import make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import DatasetConfig, open_source
from pi0fm.data.loading.loader import Collator, LoaderConfig, micro_batches
from pi0fm.data.loading.processes import in_processes
from pi0fm.data.pictures.augmentation import AugmentConfig
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.data.prompt import PromptTokenizer, load_tokenizer
from pi0fm_client.errors import Pi0fmError

TABLE = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
STEPS, GLOBAL_BATCH, MICRO = 12, 8, 4


@pytest.fixture
def collator(tmp_path_factory, tmp_path) -> Collator:
    """Both cameras of the tiny data set from a cache on the disk, at 32 pixels, augmented."""
    config = DatasetConfig(root=tiny_dataset.written(tmp_path_factory), cache_dir=tmp_path / "cache", video_decoder="pyav")
    source = open_source(config, Embodiment())
    chain = make_chain(
        source.embodiment,
        source.norm_stats(4),
        PromptTokenizer(load_tokenizer("byt5", 384), 32),
        normalization="z_score",
        floor=1e-3,
        image_size=32,
        padded_state_dim=6,
        padded_action_dim=5,
    )
    return Collator(source, open_cache(source, config, 32), chain, 4, 5, seed=7, flow_draws=2, augmentation=AugmentConfig())


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "pi0fm.data.loading.processes" in child.cmdline()]


@pytest.fixture
def nothing_left():
    """No worker, no name in the machine's shared memory."""
    before = {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
    yield
    assert workers() == []
    assert ({path.name for path in Path("/dev/shm").iterdir()} if before else set()) <= before


def test_batches_of_processes_are_those_of_threads(collator, nothing_left):
    """Of the second of two ranks; the counts of valid elements are at hand as they are with threads."""
    share = (0, STEPS, GLOBAL_BATCH, 1, 2, MICRO // 2)
    expected = list(micro_batches(collator, *share))
    found = list(micro_batches(collator, *share, LoaderConfig(processes=2, ahead=2)))
    assert len(found) == len(expected) == 2 * STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours.named()) == list(theirs.named())
        assert [name for name, tensor in theirs.named().items() if not ours.named()[name].equal(tensor)] == []
    counted = [collator._counts[step * GLOBAL_BATCH, GLOBAL_BATCH] for step in range(STEPS)]
    assert counted == [collator.count_valid(np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)) for step in range(STEPS)]


def test_a_worker_answers_no_signal_but_the_last_and_its_death_is_one_line(nothing_left):
    """Two workers, one of them slower; order stays. SIGTERM and SIGINT are for the parent; SIGKILL is found out although nobody waits."""
    make = Numbered(TABLE, seconds=0.05)
    arrays = in_processes(make, iter([(first, 5) for first in range(10_000)]), processes=2, slots=4)
    for taken in range(7):
        assert int(next(arrays)["scalar"]) == taken
    first, second = workers()
    for number in (signal.SIGTERM, signal.SIGINT):
        second.send_signal(number)
    for taken in range(7, 14):
        assert int(next(arrays)["scalar"]) == taken
    first.kill()
    with pytest.raises(Pi0fmError, match=rf"^loader process 1 of 2 \(pid {first.pid}\) was killed by SIGKILL[^\n]*$"):
        for _ in range(100):
            next(arrays)


def test_a_reader_that_stops_early_ends_the_workers_at_once(nothing_left):
    arrays = in_processes(Numbered(TABLE, seconds=30.0), iter([(first, 5) for first in (0, 1)]), processes=1, slots=2)
    next(arrays)
    began = time.monotonic()
    arrays.close()
    assert time.monotonic() - began < 15  # not the half minute of the task that is under way


PARENT = """
import signal, sys, time
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests in the background has it ignored
from numbered_arrays import Numbered
from pi0fm.data.loading.processes import in_processes
arrays = in_processes(Numbered(np.zeros((9, 9), np.float32)), ((first, 5) for first in range(10_000)), processes=2, slots=4)
next(arrays)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_when_their_parent_does(number, nothing_left):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "begun\n"
    children = psutil.Process(parent.pid).children()
    assert len(children) == 2
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


def test_a_daemon_may_have_workers(nothing_left):
    """multiprocessing allows a daemon no children of its own kind."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    daemon = context.Process(target=made_in_processes, args=(answers,), daemon=True)
    daemon.start()
    daemon.join(60)
    assert daemon.exitcode == 0 and answers.get() == [3, 4]


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_with_loader_processes_has_the_same_curve(num_workers, tmp_path_factory, tmp_path):
    """In this process and in a worker of Ray."""
    tree = record.options_of(tiny_dataset.written(tmp_path_factory), tmp_path) | {"steps": 6, "num_workers": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: value for name, value in tree.items() if name != "output_dir"}))
    words = {"threads": (), "processes": ("--loader.processes", "1", "--num_workers", str(num_workers))}
    curves = []
    for name, more in words.items():
        assert main(["train", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / name), *more]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([(line["step"], line["loss"], line["grad_norm"]) for line in lines])
    assert curves[0] == curves[1] and len(curves[0]) == 6
