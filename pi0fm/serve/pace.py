"""How long an inference takes by batch size, and when each session asks again: measured, to choose when a batch starts.

Owns: these two estimates, the moment until which a batch waits, the time that a new request will take. Does not know: requests, threads.

n sessions wait, m more are expected within d seconds, and T(b) is the seconds of a batch of b. The sum of all latencies is

    without waiting    n T(n)          + m (T(n) - d + T(m))
    with waiting       n (d + T(n+m))  + m T(n+m)                 smaller where  d < T(n) - T(n+m) + m / (n+m) T(m)

so two robots in a closed loop share each batch of a GPU (T(2) is about T(1)), a CPU whose T grows with b never waits, a lone robot
has nobody to wait for, and two robots half a period apart are left alone.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import median_low
from typing import final

KEPT_SESSIONS = 1024
KEPT_INFERENCES = 7  # of a size, whose median, the lower one of two, is its time: one that was paused does not count
TRUSTED_SECONDS = 1.0  # that the estimates hold without an inference: a device that was slow is asked again
_WEIGHT = 0.2  # of a new measurement
_MARGIN = 0.0005  # seconds that the event loop adds


@dataclass
class _Rhythm:
    """Seconds between an answer and the same session's next request. answered: when its last answer left, None while it waits."""

    answered: float | None = None
    think: float | None = None
    deviation: float = 0.0

    def expected(self) -> float | None:
        if self.answered is None or self.think is None:
            return None
        return self.answered + self.think + self.deviation + _MARGIN


@final
class Pace:
    """Estimates of one policy on one device. All times are seconds of one clock."""

    def __init__(self, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        self._recent: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}
        self._measured = -math.inf
        self._rhythms: OrderedDict[Hashable, _Rhythm] = OrderedDict()

    def inferred(self, size: int, seconds: float, now: float) -> None:
        """Count one inference."""
        recent = self._recent.setdefault(size, deque(maxlen=KEPT_INFERENCES))
        recent.append(seconds)
        self._seconds[size], self._measured = median_low(recent), now

    def is_stale(self, now: float) -> bool:
        """Tell whether nothing was measured for TRUSTED_SECONDS."""
        return now - self._measured > TRUSTED_SECONDS

    def asked(self, session: Hashable, now: float) -> None:
        """Count a request."""
        rhythm = self._rhythms.setdefault(session, _Rhythm())
        self._rhythms.move_to_end(session)
        if len(self._rhythms) > KEPT_SESSIONS:
            self._rhythms.popitem(last=False)
        if rhythm.answered is None:
            return
        think = now - rhythm.answered
        if rhythm.think is None:
            rhythm.think = think
        rhythm.deviation += _WEIGHT * (abs(think - rhythm.think) - rhythm.deviation)
        rhythm.think += _WEIGHT * (think - rhythm.think)
        rhythm.answered = None

    def answered(self, session: Hashable, now: float) -> None:
        """Count an answer."""
        if session in self._rhythms:
            self._rhythms[session].answered = now

    def forget(self, session: Hashable) -> None:
        """Expect no further request of a session."""
        self._rhythms.pop(session, None)

    def seconds(self, size: int) -> float:
        """Time of a batch of `size`: measured, or interpolated between the nearest sizes that were; never less than a smaller batch's."""
        if not self._seconds:
            return 0.0
        below = max((known for known in self._seconds if known <= size), default=min(self._seconds))
        above = min((known for known in self._seconds if known >= size), default=max(self._seconds))
        low, high = self._seconds[below], max(self._seconds[below], self._seconds[above])
        return low if above <= below else low + (high - low) * (size - below) / (above - below)

    def wait_until(self, waiting: int, free_since: float, now: float) -> float:
        """Return when a batch of `waiting` sessions should start on a worker that is free since `free_since`: `now`, or later."""
        expected = sorted(moment for rhythm in self._rhythms.values() if (moment := rhythm.expected()) is not None and moment > now)
        best = now
        for more, moment in enumerate(expected[: self._max_batch_size - waiting], 1):
            saved = self.seconds(waiting) - self.seconds(waiting + more) + more / (waiting + more) * self.seconds(more)
            if moment - free_since < saved:
                best = moment
        return best

    def estimate(self, ahead: int, remaining: float) -> float:
        """Seconds until a new request is answered: `ahead` wait before it, and the running inference takes `remaining` more."""
        full, rest = divmod(ahead, self._max_batch_size)
        return max(0.0, remaining) + full * self.seconds(self._max_batch_size) + self.seconds(rest + 1)
