"""A function in a new process, for what is decided once a process: accelerate's precision, the peak of the memory.

Owns: starting it, its answer, its death, the most memory it had. Does not know: what runs there.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from pi0fm.errors import Pi0fmError


def in_fresh_process[R](function: Callable[..., R], *arguments: object) -> R:
    """`function(*arguments)` in a spawned process; function, arguments and answer are pickled. Its exceptions are raised here.

    Raises Pi0fmError when the process dies before it answers.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise Pi0fmError(
                "a measurement's process must end by itself, found it killed, as by a system short of memory; "
                "close other programs, or name fewer --cases"
            ) from None


def peak_resident() -> int:
    """Bytes of this process's largest resident set.

    Not getrusage where it can be avoided: on Linux that figure outlives exec, and a new process begins with its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
