"""Assignment of episodes to workers, with a second try after a worker's death.

Owns: the queue, the second try, the verdict `crash` for an episode whose worker died twice. Does not know: Ray.

    fresh ---assign (as many as fit)---> a worker's ---complete---> result
                                          | worker_died
                                          v
    retry ---assign (one, alone)-------> a worker's ---complete---> result
                                          | worker_died
                                          v
                                        crash
"""

from collections import deque
from collections.abc import Sequence
from typing import final

from pi0fm.eval.rollouts.episode import Episode, EpisodeResult


@final
class Ledger:
    """Queue of the driver's episodes, each (task, seed) once."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._fresh = deque(episodes)
        self._retry: deque[Episode] = deque()
        self._retried: set[tuple[str, int]] = set()
        self._assigned: dict[int, dict[tuple[str, int], Episode]] = {}

    def assigned(self, worker: int) -> int:
        """Count the episodes that `worker` is running."""
        return len(self._assigned.get(worker, {}))

    def assign(self, worker: int, capacity: int) -> list[Episode]:
        """Assign new episodes to a worker that runs `capacity` at a time.

        A second try waits until no fresh episode is left, and runs alone, so that an episode that kills its worker harms no other twice.
        """
        running = self._assigned.setdefault(worker, {})
        new: list[Episode] = []
        while self._fresh and len(running) + len(new) < capacity:
            new.append(self._fresh.popleft())
        if not new and not running and self._retry:
            new.append(self._retry.popleft())
        running.update({(episode.task, episode.seed): episode for episode in new})
        return new

    def complete(self, worker: int, results: Sequence[EpisodeResult]) -> None:
        """Remove the episodes that a worker finished."""
        for result in results:
            del self._assigned[worker][result.task, result.seed]

    def worker_died(self, worker: int, why: str) -> list[EpisodeResult]:
        """Queue the episodes of a dead worker for a second try; return a crash for each that had it."""
        crashes = []
        for key, episode in self._assigned.pop(worker, {}).items():
            if key in self._retried:
                crashes.append(EpisodeResult(episode.task, episode.seed, "crash", 0, 0.0, f"its worker died twice: {why}"))
            else:
                self._retried.add(key)
                self._retry.append(episode)
        return crashes
