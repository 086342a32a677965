"""Workers as forks of the test's process, over gloo, without new imports."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from pi0fm.train.parallel.context import Context


def workers(count: int, place: Path, body: Callable[[Context], Any]) -> list[Any]:
    """What `body` returns in each of `count` processes. A process that fails, fails the test with its traceback."""
    forks = multiprocessing.get_context("fork")
    answers = forks.SimpleQueue()
    meeting = place / f"meeting-{count}-{len(list(place.iterdir()))}"

    def work(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test of the parent may have made one for a single process
        torch.set_num_threads(1)  # a fork has none of the parent's threads to compute with
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        try:
            answers.put((rank, body(Context(rank, count, shown=False)), ""))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        os._exit(0)  # no test, no fixture and no exit handler of the parent runs here

    processes = [forks.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found = sorted(answers.get() for _ in processes)
    for process in processes:
        process.join()
    failures = [failure for _, _, failure in found if failure]
    assert not failures, "\n".join(failures)
    return [answer for _, answer, _ in found]
