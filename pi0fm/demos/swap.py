"""Putting a finished directory in the place of another, with no moment without one.

Owns: Linux's exchange of two names, and the two renames where a file system has no exchange. Does not know: what is in them.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)


def swap_directories(new: Path, current: Path, aside: Path) -> None:
    """Let `new` become `current`, and remove what was there.

    With the exchange, a reader or a kill sees the old directory or the new one. Without it there is an instant in which `current` is
    missing and its content lies at `aside`: who opens it again moves it back.
    """
    if not current.exists():
        new.rename(current)
        return
    if exchange(new, current):
        shutil.rmtree(new)
        return
    current.rename(aside)
    new.rename(current)
    shutil.rmtree(aside)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot. Raises OSError for any other reason."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
