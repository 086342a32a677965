"""Whether the loader's memory stays flat: what a process and its workers hold, over many batches.

Owns: the looks at memory. Does not know: what a batch is made of.

    batches   0 ... a tenth ................................................ all
    looks              start   |   |   |   |   |   |   |   |   |   |   |     end       peak: the highest of all from start on
"""

from dataclasses import dataclass

import psutil

from pi0fm import progress
from pi0fm.bench.loading_config import LoadingConfig
from pi0fm.data.loading.loader import Collator, micro_batches

LOOKS = 500


@dataclass(frozen=True)
class MemoryUse:
    """MiB of memory that no file backs, of this process and its children: after a tenth of the batches, after all, and the most seen."""

    start: float
    end: float
    peak: float


def memory_over(collator: Collator, config: LoadingConfig) -> MemoryUse:
    """Take `config.memory_batches` batches from one loader. The first tenth fills tables and the allocator's reserve."""
    begin, between = config.memory_batches // 10, max(1, config.memory_batches // LOOKS)
    seen: list[float] = []
    looked = 0
    batches = micro_batches(collator, 0, config.memory_batches, config.batch_size, 0, 1, config.batch_size, config.loader)
    with progress.step("batches", config.memory_batches) as bar:
        for number, _ in enumerate(batches, start=1):
            if number == begin or (number > begin and number % between == 0) or number == config.memory_batches:
                seen.append(anonymous_mib())
                bar.advance(number - looked, note=f"{seen[-1]:.1f} MiB")
                looked = number
    return MemoryUse(seen[0], seen[-1], max(seen))


def anonymous_mib() -> float:
    """Resident memory of this process and its children without what files or shared memory back; a loader's slots are bounded anyway."""
    total = 0
    process = psutil.Process()
    for each in (process, *process.children(recursive=True)):
        try:
            info = each.memory_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended after the list was made
        total += info.rss - getattr(info, "shared", 0)
    return total / 2**20
