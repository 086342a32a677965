"""The peak memory of a process that trains: LeRobot's PI0 or ours, one of them.

Owns: the steps that reach the peak. Does not know: the other side, which is not even imported.

    process starts -> imports -> [imported: resident now] -> network, optimiser, steps -> [peak: most ever resident]

Three steps: the moments are there after the first, so the second is the first that has all at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from pi0fm.bench.peer_cases import Case, make_batch
from pi0fm.bench.training_sides import our_step, their_step
from pi0fm.models.pi0 import Pi0
from pi0fm.processes import peak_resident
from pi0fm.train.parallel.allocator import keep_freed_memory

STEPS = 3
Side = Literal["pi0fm", "lerobot"]


@dataclass(frozen=True)
class Peak:
    """Bytes. whole: most ever resident (on a GPU: most ever allocated there). imported: resident before the network was built."""

    whole: int
    imported: int

    @property
    def above(self) -> int:
        """What training took."""
        return self.whole - self.imported


def peak_of_training(case: Case, side: Side, precision: str, device: str, threads: int, seed: int) -> Peak:
    """Build one side, take `STEPS` steps, and look. To be called first in its process. precision: of ours; LeRobot's is float32."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    step: Callable[[], float]
    if side == "lerobot":
        from pi0fm.bench.peer_pair import build_theirs  # LeRobot: not in our process

        imported = 0 if place.type == "cuda" else psutil.Process().memory_info().rss
        step = their_step(build_theirs(case).to(place), make_batch(case, seed), place, fused=False)
    else:
        keep_freed_memory()
        imported = 0 if place.type == "cuda" else psutil.Process().memory_info().rss
        step = our_step(Pi0(case.config), make_batch(case, seed), precision, place)
    for _ in range(STEPS):
        step()
    return Peak(torch.cuda.max_memory_allocated(place) if place.type == "cuda" else peak_resident(), imported)
