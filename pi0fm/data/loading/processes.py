r"""Arrays made in worker processes: in the order of their tasks, through memory that both sides map.

Owns: the workers from start to end, that memory, both ends of what is said, the line for a worker that died.
Does not know: what is made, torch.

    tasks     0   1   2   3   4   5        (first, count), in order; each goes to the worker that has the fewest
    worker A [0]     [2]     [4]           `python -m pi0fm.data.loading.processes`
    worker B     [1]     [3]               |  task: {"task": 3, "of": [96, 32], "slot": 0}            JSON, to the worker
    slots    |0|1|2|0|1|2                  |  answer: name, type, shape, place of each array          JSON, from the worker
    taken     0   1   2   3                in order; a slot is filled again when the batch after it is asked for

    memory   program  pickle of `make` | its arrays as they lie, mapped by all workers, copied by none
             slot k   arrays of tasks k, k + slots, ..: written by a worker, read by the parent

The memory has no name: it is anonymous, inherited by descriptor, and goes with the last process that has it open, however that ends. A
worker ends when the parent's end of its pipe is closed, which the death of the parent does too. Signals to the process group are the
parent's to answer: a worker that obeyed SIGTERM would be missing in the step that leads to the last checkpoint.
Only a worker unpickles, and only what its parent laid into the memory that it inherited.
"""

import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from pi0fm_client import errors
from pi0fm_client.errors import Pi0fmError

type Arrays = dict[str, NDArray[Any]]
type Make = Callable[[int, int], Arrays]

MODULE = "pi0fm.data.loading.processes"
_ALIGNED = 64
_SECONDS_TO_END = 10.0
# one thread each, and freed memory is kept: a batch of pictures would else be asked of the system, and zeroed by it, each time
_SETTINGS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def in_processes(make: Make, tasks: Iterator[tuple[int, int]], processes: int, slots: int) -> Generator[Arrays]:
    """`make(*task)` of every task, in order; at most `slots` are made and not yet taken.

    make: pickled now; its large arrays are shared. The arrays that are yielded lie in shared memory that is filled again when the next are
    asked for: copy them before. Workers start with the first and end with the last, with an error, or with `close`.
    Raises what pickling raises, the errors of pi0fm_client.errors that `make` raises, Pi0fmError for any other, or for a worker that died.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(make, protocol=5, buffer_callback=buffers.append)
    return _made([memoryview(head), *(buffer.raw() for buffer in buffers)], tasks, processes, slots)


def _made(program: Sequence[memoryview], tasks: Iterator[tuple[int, int]], processes: int, slots: int) -> Generator[Arrays]:
    memory = [_Memory.new() for _ in range(slots + 1)]
    workers: list[_Worker] = []
    answers: dict[int, dict[str, Any]] = {}
    sent = 0

    def send() -> None:
        nonlocal sent
        task = next(tasks, None)
        if task is not None:
            min(workers, key=lambda worker: worker.busy).send(sent, task, sent % slots)
            sent += 1

    try:
        places = memory[-1].lay(program)
        for number in range(processes):
            workers.append(_Worker(f"loader process {number + 1} of {processes}", memory, places))
        for _ in range(slots):
            send()
        taken = 0
        while taken < sent:
            while taken not in answers:
                _listen(workers, answers)
            yield _arrays(answers.pop(taken), memory[taken % slots])
            taken += 1
            send()  # into the slot that was taken last
    finally:
        for worker in workers:
            worker.end()
        for each in memory:
            each.close()


def _listen(workers: Sequence["_Worker"], answers: dict[int, dict[str, Any]]) -> None:
    """Wait for an answer, or for the death of a worker, be it an idle one. Raises Pi0fmError for that."""
    ready = wait([worker.connection for worker in workers])
    for worker in workers:
        if worker.connection in ready:
            answer = worker.receive()
            answers[answer["task"]] = answer | {"by": worker.name}


def _arrays(answer: dict[str, Any], memory: "_Memory") -> Arrays:
    """What a worker laid into a slot. Raises its fault, in a class of pi0fm_client.errors that keeps its meaning."""
    if "fault" in answer:
        kind = vars(errors).get(answer["kind"])
        if isinstance(kind, type) and issubclass(kind, Pi0fmError):
            raise kind(answer["fault"])
        raise Pi0fmError(f"{answer['by']} failed ({answer['fault']}); type --loader.processes 0 to see where")
    whole = memory.room(answer["bytes"])
    return {name: np.ndarray(tuple(shape), np.dtype(kind), whole, place) for name, kind, shape, place in answer["arrays"]}


@final
class _Worker:
    """A worker process, seen from its parent. busy: tasks that it was sent and has not answered."""

    def __init__(self, name: str, memory: Sequence["_Memory"], places: Sequence[tuple[int, int]]) -> None:
        self.name, self.busy = name, 0
        self.connection, theirs = Pipe()
        descriptors = [theirs.fileno(), *(each.descriptor for each in memory)]
        # A program rather than multiprocessing's spawn: that refuses to start from a daemon, and runs the caller's script again. A user's
        # folder may hold a json.py: -P keeps it out of the way.
        command = [sys.executable, "-P", "-m", MODULE, *map(str, descriptors)]
        environment = os.environ | _SETTINGS | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        nothing = subprocess.DEVNULL  # standard output is for the command's last line
        with _signals_held():
            self._process = subprocess.Popen(command, env=environment, pass_fds=descriptors, stdin=nothing, stdout=nothing)
        theirs.close()
        self._tell({"places": places})

    def send(self, task: int, of: tuple[int, int], slot: int) -> None:
        """Give it a task."""
        self.busy += 1
        self._tell({"task": task, "of": of, "slot": slot})

    def receive(self) -> dict[str, Any]:
        """An answer that is there. Raises Pi0fmError where it died instead."""
        try:
            answer: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise self._fault() from None
        self.busy -= 1
        return answer

    def end(self) -> None:
        """It has nothing to lose: its files are read only, its memory goes with it."""
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError:
            raise self._fault() from None

    def _fault(self) -> Pi0fmError:
        try:
            code = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            code = 0
        who = f"{self.name} (pid {self._process.pid})"
        if code == -signal.SIGKILL:
            return Pi0fmError(f"{who} was killed by SIGKILL, as by a system short of memory; lower --loader.processes or --loader.ahead")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return Pi0fmError(f"{who} {how}; its last words stand above, --loader.processes 0 does without it")


@final
class _Memory:
    """Memory without a name, which other processes map by its descriptor; it grows when more room is asked for."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    @classmethod
    def new(cls) -> "_Memory":
        """An empty one."""
        if hasattr(os, "memfd_create"):  # not bounded by the size of /dev/shm, which is 64 MiB in many containers
            return cls(os.memfd_create("pi0fm-loader"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def room(self, size: int) -> mmap.mmap:
        """The first `size` bytes and maybe more, mapped. OSError where the machine has no room for them."""
        if self._map is None or len(self._map) < size:
            held = os.fstat(self.descriptor).st_size
            if held < size:
                held = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
                # the pages now, or an error: a page that is not there when it is written to would be a bus error
                (os.posix_fallocate if hasattr(os, "posix_fallocate") else _truncate)(self.descriptor, 0, held)
            self._map = mmap.mmap(self.descriptor, held)
        return self._map

    def lay(self, parts: Sequence[memoryview]) -> list[tuple[int, int]]:
        """Write byte strings behind each other; (offset, length) of each."""
        places, size = [], 0
        for part in parts:
            places.append((size, part.nbytes))
            size += -(-part.nbytes // _ALIGNED) * _ALIGNED
        whole = memoryview(self.room(max(size, 1)))
        for part, (offset, length) in zip(parts, places, strict=True):
            whole[offset : offset + length] = part
        return places

    def own(self) -> memoryview:
        """All of it to read, and to write without anyone else seeing it."""
        return memoryview(mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size, access=mmap.ACCESS_COPY))

    def close(self) -> None:
        """Let go of it; arrays that were made of it keep their pages."""
        self._map = None
        os.close(self.descriptor)


def _truncate(descriptor: int, first: int, size: int) -> None:
    os.ftruncate(descriptor, first + size)


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process that is started inside is born with SIGINT and SIGTERM blocked, before it could run any handler of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _laid(arrays: Arrays, slot: _Memory) -> dict[str, Any]:
    """Write arrays into a slot: where they are, as JSON."""
    listed: list[tuple[str, str, tuple[int, ...], int]] = []
    size = 0
    for name, array in arrays.items():
        listed.append((name, array.dtype.str, array.shape, size))
        size += -(-array.nbytes // _ALIGNED) * _ALIGNED
    whole = slot.room(max(size, 1))
    for array, (_, _, shape, place) in zip(arrays.values(), listed, strict=True):
        np.ndarray(shape, array.dtype, whole, place)[...] = array
    return {"bytes": size, "arrays": listed}


def _serve(descriptors: Sequence[int]) -> None:
    """The worker: a task, an answer, until the parent's end of the pipe is closed. descriptors: of the pipe, the slots, the program."""
    connection = Connection(descriptors[0])
    *slots, program = (_Memory(descriptor) for descriptor in descriptors[1:])
    message = _heard(connection)
    if message is None:
        return
    whole = program.own()
    parts = [whole[offset : offset + length] for offset, length in message["places"]]
    make: Make = pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301  (of our own parent, through memory that we inherited)
    while (message := _heard(connection)) is not None:
        try:
            answer = _laid(make(*message["of"]), slots[message["slot"]])
        except Exception as error:  # noqa: BLE001  (it is raised again in the parent)
            answer = _described(error)
        try:
            connection.send_bytes(json.dumps(answer | {"task": message["task"]}).encode())
        except OSError:
            return


def _heard(connection: Connection) -> dict[str, Any] | None:
    """What the parent says next; None when it has gone."""
    try:
        return dict(json.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        return None


def _described(error: Exception) -> dict[str, Any]:
    """An error for the parent: one of ours by its class, another by its name and the line that raised it."""
    if isinstance(error, Pi0fmError):
        return {"fault": str(error), "kind": type(error).__name__}
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f", {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place is not None else ""
    return {"fault": f"{type(error).__name__}: {' '.join(str(error).split()):.160}{where}", "kind": ""}


if __name__ == "__main__":
    _serve([int(word) for word in sys.argv[1:]])
