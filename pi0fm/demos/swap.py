"""Putting a finished directory in the place of another, with no moment without one.

Owns: the exchange, and the two renames where a file system has none. Does not know: what is in them.
"""

import shutil
from pathlib import Path

from pi0fm.files import exchange


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
