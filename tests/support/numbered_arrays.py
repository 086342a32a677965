"""What worker processes make in tests, without torch: a worker then starts in a fraction of a second."""

import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.loading.processes import in_processes
from pi0fm_client.errors import DatasetError


@dataclass(frozen=True)
class Numbered:
    """`Numbered(table)(first, count)`: rows of the table, and arrays whose size, shape and type change with the task."""

    table: NDArray[np.float32]
    fault_at: int = -1
    seconds: float = 0.0

    def __call__(self, first: int, count: int) -> dict[str, NDArray]:
        if first == self.fault_at:
            raise DatasetError("an episode is cut")
        if self.seconds:
            time.sleep(self.seconds * (first % 3))  # the later task may be done first
        rows = np.arange(first, first + count) % len(self.table)
        return {
            "rows": self.table[rows],
            "mask": (rows % 2 == 0)[:, None],
            "inner.square": np.full((first % 7, first % 5, 3), first, np.uint8),
            "scalar": np.array(first, np.int64),
            "torch": np.array("torch" in sys.modules),
        }


def made_in_processes(answers: Any) -> None:
    """Put what a worker process of this process makes of two tasks on a queue."""
    arrays = in_processes(Numbered(np.zeros((9, 9), np.float32)), iter([(3, 2), (4, 2)]), processes=1, slots=2)
    answers.put([int(found["scalar"]) for found in arrays])
