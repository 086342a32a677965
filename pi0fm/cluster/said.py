"""What the first worker says, on the driver's standard error: Ray shows nothing of its workers' output.

Owns: the actor that carries the lines, both of its ends. Does not know: who says what.

    worker   progress.say -> heard_by -- a call that nobody waits for -->  actor  <-- every second --  driver   `repeat`
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pi0fm import progress

SECONDS = 2.0  # for an answer; a Ray that is gone has none


class _Lines:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, text: str) -> None:
        self._lines.append(text)

    def take(self) -> list[str]:
        taken, self._lines = self._lines, []
        return taken


def start() -> Any:
    """Start the actor, which takes no processor."""
    import ray

    return ray.remote(num_cpus=0)(_Lines).remote()


@contextmanager
def heard_by(lines: Any) -> Iterator[None]:
    """Send what this process says during the block; None for nowhere."""
    if lines is None:
        yield
        return
    with progress.heard(lines.add.remote):
        yield


def repeat(lines: Any) -> None:
    """Say here what was sent since the last call; nothing where Ray does not answer."""
    import ray
    from ray.exceptions import RayError

    with suppress(RayError):
        for text in ray.get(lines.take.remote(), timeout=SECONDS):
            progress.say(text)
