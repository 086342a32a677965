"""Tests of a run without a step: the time limit, the stacks of every worker, the silent one."""

import threading
import time

import pytest
from forked_workers import workers

from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.watch import hangs
from pi0fm.train.watch.hangs import HangWatch, stacks


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(hangs, "SECONDS_OF_GRACE", 0.3)
    monkeypatch.setattr(hangs, "SECONDS_FOR_STATUS_LINE", 0.0)


def ended(folder, context: Context, nodes: list[str], hang: threading.Event, seconds: float = 0.2) -> list[int]:
    """The codes with which the watch would have ended the process, after step 7 was taken and no other."""
    codes: list[int] = []
    with HangWatch(folder, context, nodes, seconds, codes.append) as watch:
        watch.beat(7)
        hang.wait(1.5)
    return codes


def test_stacks_of_all_threads_are_kept_and_the_silent_worker_is_named(tmp_path, capsys):
    def waiting_for_a_disk(event: threading.Event) -> None:
        event.wait(5)

    event = threading.Event()
    thread = threading.Thread(target=waiting_for_a_disk, args=(event,), name="loader")
    thread.start()
    assert ended(tmp_path, Context(0, 2, shown=False), ["here", "there"], threading.Event()) == [1]
    event.set()
    thread.join()
    text = (tmp_path / "hangs/step-7-worker-0.txt").read_text()
    assert text.startswith("worker 0 on here took no step for 0.2 s (hang_seconds) after step 7")
    assert "thread MainThread" in text and "hang.wait(1.5)" in text
    assert "thread loader" in text and "waiting_for_a_disk" in text
    said = capsys.readouterr().err.splitlines()
    assert said == [text.splitlines()[0], "no stack came from worker 1 on there: stopped, or its machine is gone; look there first"]


def test_whoever_takes_steps_or_gets_on_with_a_validation_is_left_alone(tmp_path):
    codes: list[int] = []
    with HangWatch(tmp_path, Context(shown=False), ["here"], 0.4, codes.append) as watch:
        for step in range(6):
            watch.beat(step if step % 2 else None)
            time.sleep(0.15)
    assert codes == []
    assert not (tmp_path / "hangs").exists()


def test_every_worker_of_a_collective_that_hangs_writes_where_it_stands(tmp_path):
    """Worker 1 never comes to the sum that worker 0 waits in."""

    def body(context: Context) -> list[int]:
        parallel = Parallel(context, allow_cuda=False)
        nodes, codes = parallel.nodes(), list[int]()
        with HangWatch(tmp_path / "run", context, nodes, 0.5, codes.append):
            if context.rank == 0:
                threading.Thread(target=parallel.barrier, name="sums", daemon=True).start()
            time.sleep(2.5)
        return codes

    assert workers(2, tmp_path, body) == [[1], [1]]
    waiting, absent = ((tmp_path / f"run/hangs/step-0-worker-{rank}.txt").read_text() for rank in range(2))
    assert "torch.distributed.barrier()" in waiting
    assert "torch.distributed.barrier()" not in absent and "time.sleep(2.5)" in absent


def test_the_main_thread_comes_first():
    assert stacks().startswith("thread MainThread")
