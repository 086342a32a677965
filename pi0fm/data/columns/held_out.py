"""Episodes held out of training, so that a policy can be judged on demonstrations that it never saw.

Owns: the choice, and the split of a data set in two. Does not know: what the held-out part is used for.

    episodes by task    A: 0 3 4 7    B: 1 5    C: 2 6 8
    order by the seed   A: 4 0 7 3    B: 5 1    C: 8 2 6        the last of each task is always trained on
    taken in rounds     A 4, B 5, C 8, A 0, C 2, A 7            a larger number holds out a superset of a smaller one's
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.order.counter import permute
from pi0fm_client.errors import ConfigError

NO_EPOCH = 2**63  # key of a permutation that no training epoch uses


def choose_held_out(source: LeRobotSource, count: int, seed: int) -> tuple[int, ...]:
    """Choose `count` of the episodes that `source` trains on, ascending, spread evenly over tasks: a function of (episodes, seed).

    An episode's task is that of its first frame. Raises ConfigError when a task would be left without an episode to train on.
    """
    episodes, first = np.unique(source.episode[source.frames], return_index=True)
    tasks = source.task[source.frames][first]
    ranked: list[tuple[int, int, int]] = []
    for task in np.unique(tasks):
        members = episodes[tasks == task]
        order = permute(np.arange(len(members) - 1), len(members), seed, NO_EPOCH)
        ranked += [(place, int(task), int(members[index])) for place, index in enumerate(order)]
    if not 0 <= count <= len(ranked):
        raise ConfigError(
            f"validation.episodes must leave every task an episode to train on: 0 to {len(ranked)} of these {len(episodes)} episodes "
            f"of {len(np.unique(tasks))} tasks can be held out, found {count}; type --validation.episodes {len(ranked)} or less"
        )
    return tuple(sorted(episode for _, _, episode in sorted(ranked)[:count]))


def split(source: LeRobotSource, episodes: Sequence[int]) -> tuple[LeRobotSource, LeRobotSource]:
    """(training part, held-out part): the same columns with other `frames`."""
    held = np.isin(source.episode[source.frames], list(episodes))
    return replace(source, frames=source.frames[~held]), replace(source, frames=source.frames[held])
