"""Keep freed memory in the process.

Owns: one call to the C library. Does not know: torch, training.
A training step on a CPU frees and allocates the same tensors again. glibc returns large ones to the system each time, and the system zeroes
every page again: 13 800 page faults in a step of the tiny model, a quarter of its time (docs/LOG.md).
"""

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; False with another C library. The peak stays the same."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    settings = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)
