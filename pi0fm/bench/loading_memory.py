"""Whether the loader's memory stays flat: what a process and its workers hold, over many batches.

Owns: the looks at memory. Does not know: what a batch is made of.

    batches   0 ... a tenth ................................................ all
    looks              start   |   |   |   |   |   |   |   |   |   |   |     end       peak: the highest of all from start on
"""

from dataclasses import dataclass

from pi0fm import progress
from pi0fm.bench.loading_config import LoadingConfig
from pi0fm.data.loading.loader import Collator, micro_batches
from pi0fm.processes import anonymous_memory_of_tree

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
                seen.append(anonymous_memory_of_tree() / 2**20)
                bar.advance(number - looked, note=f"{seen[-1]:.1f} MiB")
                looked = number
    return MemoryUse(seen[0], seen[-1], max(seen))
