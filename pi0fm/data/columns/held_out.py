"""Which episodes are kept from training, so that a policy can be judged on demonstrations that it never saw.

Owns: the choice, and the two halves of a data set. Does not know: what the held-out half is used for.

    episodes by task    A: 0 3 4 7    B: 1 5    C: 2 6 8
    order by the seed   A: 4 0 7 3    B: 5 1    C: 8 2 6        the last of each task always trains
    taken in rounds     A 4, B 5, C 8, A 0, C 2, A 7            a larger number holds out what a smaller one does, and more
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.order.counter import permute
from pi0fm_client.errors import ConfigError

NO_EPOCH = 2**63  # the key of a permutation that no epoch of training has


def choose(source: LeRobotSource, count: int, seed: int) -> tuple[int, ...]:
    """`count` episodes of those that `source` trains on, in order: a function of (episodes, seed), spread evenly over tasks.

    An episode's task is that of its first frame. Raises ConfigError when a task would be left without an episode to train on.
    """
    episodes, first = np.unique(source.episode[source.frames], return_index=True)
    tasks = source.task[source.frames][first]
    ranked: list[tuple[int, int, int]] = []
    for task in np.unique(tasks):
        own = episodes[tasks == task]
        order = permute(np.arange(len(own) - 1), len(own), seed, NO_EPOCH)
        ranked += [(place, int(task), int(own[index])) for place, index in enumerate(order)]
    if not 0 <= count <= len(ranked):
        raise ConfigError(
            f"validation.episodes must leave every task an episode to train on: 0 to {len(ranked)} of these {len(episodes)} episodes "
            f"of {len(np.unique(tasks))} tasks can be held out, found {count}; type --validation.episodes {len(ranked)} or less"
        )
    return tuple(sorted(episode for _, _, episode in sorted(ranked)[:count]))


def split(source: LeRobotSource, episodes: Sequence[int]) -> tuple[LeRobotSource, LeRobotSource]:
    """(what is left to train on, the held-out episodes): the same columns, other `frames`."""
    held = np.isin(source.episode[source.frames], list(episodes))
    return replace(source, frames=source.frames[~held]), replace(source, frames=source.frames[held])
