"""Which worker holds which episode, and which is to be tried again.

Owns: the queue, the second try, the verdict `crash` for what took a worker down twice. Does not know: Ray.

    fresh ---take (as many as fit)---> held by worker ---ended---> result
                                          | lost (the worker died)
                                          v
    again ---take (one, alone)-------> held by worker ---ended---> result
                                          | lost
                                          v
                                        crash
"""

from collections import deque
from collections.abc import Sequence
from typing import final

from pi0fm.eval.episode import Episode, EpisodeResult


@final
class Ledger:
    """The driver's account of an evaluation. Each (task, seed) must be there once."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._fresh = deque(episodes)
        self._again: deque[Episode] = deque()
        self._retried: set[tuple[str, int]] = set()
        self._held: dict[int, dict[tuple[str, int], Episode]] = {}

    def holds(self, worker: int) -> int:
        """Episodes that `worker` is busy with."""
        return len(self._held.get(worker, {}))

    def take(self, worker: int, slots: int) -> list[Episode]:
        """Episodes for a worker that runs `slots` at a time.

        A second try waits until the fresh ones are out and is run alone: an episode that kills its worker takes no other along twice.
        """
        held = self._held.setdefault(worker, {})
        taken: list[Episode] = []
        while self._fresh and len(held) + len(taken) < slots:
            taken.append(self._fresh.popleft())
        if not taken and not held and self._again:
            taken.append(self._again.popleft())
        held.update({(episode.task, episode.seed): episode for episode in taken})
        return taken

    def ended(self, worker: int, results: Sequence[EpisodeResult]) -> None:
        """Strike the episodes that a worker finished."""
        for result in results:
            del self._held[worker][result.task, result.seed]

    def lost(self, worker: int, why: str) -> list[EpisodeResult]:
        """The worker died: its episodes are queued for a second try; a crash for each that had it."""
        crashes = []
        for key, episode in self._held.pop(worker, {}).items():
            if key in self._retried:
                crashes.append(EpisodeResult(episode.task, episode.seed, "crash", 0, 0.0, f"its worker died twice: {why}"))
            else:
                self._retried.add(key)
                self._again.append(episode)
        return crashes
