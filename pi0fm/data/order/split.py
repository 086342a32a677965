"""Division of a global batch among workers, and of a worker's share into micro batches.

Owns: shares and parts as (offset, count). Does not know: where batches come from, who the workers are.

    global batch   | 0 1 2 3 4 5 6 7 8 9 |      contiguous shares, so that the union is the same for any number of workers
    3 workers      | 0 1 2 | 3 4 5 | 6 7 8 9 |  they differ by one sample at most
    micro batches  | 0 | 1 2 | ...              as many on every worker, and they differ by one sample at most
"""

from itertools import pairwise

from pi0fm_client.errors import ConfigError


def split(global_batch_size: int, rank: int, world_size: int, micro_batch_size: int | None = None) -> tuple[tuple[int, int], ...]:
    """(offset in the global batch, count) of each micro batch of worker `rank`."""
    first, last = (global_batch_size * each // world_size for each in (rank, rank + 1))
    steps = micro_steps(global_batch_size, world_size, micro_batch_size)
    bounds = [first + (last - first) * step // steps for step in range(steps + 1)]
    return tuple((start, stop - start) for start, stop in pairwise(bounds))


def micro_steps(global_batch_size: int, world_size: int, micro_batch_size: int | None = None) -> int:
    """Number of micro batches in a step, equal on all workers. micro_batch_size: largest size; None for a worker's whole share.

    Raises ConfigError when a worker would have an empty one.
    """
    smallest, largest = global_batch_size // world_size, -(-global_batch_size // world_size)
    if smallest == 0:
        raise ConfigError(
            f"global_batch_size must be at least the number of workers, found {global_batch_size} for {world_size}; "
            f"type --global_batch_size {world_size}, or fewer workers"
        )
    steps = -(-largest // (micro_batch_size or largest))
    if steps > smallest:
        raise ConfigError(
            f"shares of {smallest} and {largest} samples must be cut into equally many micro batches, found micro_batch_size "
            f"{micro_batch_size}; type --micro_batch_size 2"
        )
    return steps
