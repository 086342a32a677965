"""How a global batch is dealt to workers, and a worker's share to micro batches.

Owns: shares and parts as (offset, count). Does not know: where batches come from, who the workers are.

    global batch   | 0 1 2 3 4 5 6 7 8 9 |      contiguous shares, so that the union is the same for any number of workers
    3 workers      | 0 1 2 | 3 4 5 | 6 7 8 9 |  they differ by one sample at most
    micro batches  | 0 | 1 2 | ...              every worker makes as many, of as equal sizes
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
    """Micro batches of a step, of every worker alike. micro_batch_size: the largest one; None for a worker's whole share.

    Raises ConfigError when the global batch cannot be split so.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest or share == 0:
        raise ConfigError(f"global_batch_size must be a multiple of the {world_size} workers, found {global_batch_size}")
    micro = min(micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(f"each worker's share of {share} samples must be a multiple of micro_batch_size, found {micro}")
    return share // micro
