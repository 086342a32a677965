"""Several data sets in one stream, each with its own robot, statistics and weight.

Owns: options of an entry as they are typed, weights of samples, the seed of each data set, one batch out
of several. Does not know: how a data set is read, how a network is chosen.

    position     0    1    2    3    4    5    6    7        weights 4 : 2 : 1
    data set     A    B    A    C    A    B    A    A        A's share of the first p positions is 4 p / 7, less than one off
    own stream   0    0    1    0    2    1    3    4        a data set's stream continues, epoch by epoch, undisturbed

With three or more the first is dealt against the others, then the second against the remaining ones, and so on: integers, O(1) memory, and
a function of the position, so that neither workers nor restarts change anything.
Shape letters: B batch, C cameras of the mixture, H horizon, A action dim, L prompt tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.columns.rows import refuse_unknown_sentences
from pi0fm.data.config import MixtureEntry
from pi0fm.data.loading.batch import Batch
from pi0fm.data.loading.loader import BatchMaker, Collator, keep_count
from pi0fm.data.order.orders import Weighted, deal, weighted
from pi0fm.data.pictures.augmentation import Augmentation
from pi0fm.models.observation import ModelObservation
from pi0fm_client.errors import ConfigError, Pi0fmError


@contextmanager
def entry_named(name: str) -> Iterator[None]:
    """Name the mixture's entry, and its options as they are typed, in an error of the block; "" for no mixture."""
    try:
        yield
    except Pi0fmError as error:
        if not name:
            raise
        raise type(error)(f"mixture.{name}: {as_typed(name, str(error))}") from error


def as_typed(name: str, text: str) -> str:
    """Write the options of a data set in a line as they are typed for an entry of this name; "" for no mixture."""
    if not name:
        return text
    return text.replace("--dataset.", f"--mixture.{name}.dataset.").replace("--embodiment.", f"--mixture.{name}.embodiment.")


def sample_order(source: LeRobotSource, entry: MixtureEntry) -> Weighted | None:
    """Order by the entry's sample weights, None for none. Raises ConfigError for bad weights or sentences, DatasetError for the column."""
    if not entry.task_weights and entry.weight_column is None:
        return None
    refuse_unknown_sentences(list(entry.task_weights), dict(enumerate(source.tasks)), source.root)
    weights = np.ones(len(source.state))
    for text, weight in entry.task_weights.items():
        weights[source.task == source.tasks.index(text)] = weight
    if entry.weight_column is not None:
        weights *= source.column(entry.weight_column)
    return weighted(weights[source.frames])


def part_seed(seed: int, part: int) -> int:
    """Seed of one data set's order and noise, different for each data set of a mixture."""
    return seed if part == 0 else (seed ^ (0x9E3779B97F4A7C15 * part)) % 2**63


@dataclass(frozen=True)
class MixtureCollator(BatchMaker):
    """Batches of several data sets. parts: each with its own chain, all for one network; weights: one each."""

    parts: tuple[Collator, ...]
    weights: tuple[float, ...]
    _counts: dict[tuple[int, int], int] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ConfigError(f"a mixture needs one weight per data set, found {len(self.weights)} for {len(self.parts)}; correct the list")
        seeds, sizes = {part.seed for part in self.parts}, {(part.action_horizon, part.action_dim, part.max_delay) for part in self.parts}
        if len(seeds) != len(self.parts) or len(sizes) != 1:
            raise ConfigError("the data sets of a mixture need different seeds (part_seed) and one network; build the parts again")

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras of all parts, in the order of first mention; one that a sample lacks is masked."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.source.embodiment.cameras))

    def __call__(self, first: int, count: int) -> Batch:
        """Make each part's samples and put them in the order of the stream."""
        which, numbers = deal(self.weights, np.arange(first, first + count))
        rows = [np.flatnonzero(which == part) for part in range(len(self.parts))]
        made = [(self.parts[part], chosen, self.parts[part].collate(numbers[chosen])) for part, chosen in enumerate(rows) if len(chosen)]
        return _joined(made, self.cameras, count)

    def valid_elements(self, first: int, count: int) -> int:
        """Sum over the parts."""
        known = self._counts.pop((first, count), None)
        return self._count(first, count) if known is None else known

    def count_ahead(self, first: int, count: int) -> None:
        """Count and keep the result until it is used, or until many later ones are kept."""
        keep_count(self._counts, (first, count), self._count(first, count))

    def announce_after(self, first: int, count: int) -> None:
        """Announce to each streaming part the positions of its stream."""
        which, numbers = deal(self.weights, np.arange(first, first + count))
        for number, part in enumerate(self.parts):
            chosen = numbers[which == number]
            if part.cache.look_ahead and len(chosen):
                part.announce(chosen + part.cache.look_ahead)

    def _count(self, first: int, count: int) -> int:
        which, numbers = deal(self.weights, np.arange(first, first + count))
        return sum(part.count_valid(numbers[which == number]) for number, part in enumerate(self.parts) if (which == number).any())


def _joined(made: Sequence[tuple[Collator, NDArray[np.int64], Batch]], cameras: tuple[str, ...], count: int) -> Batch:
    """Join the parts' batches into one of `count` rows: rows by their places, cameras by name."""
    longest = max(batch.observation.prompt_tokens.shape[1] for _, _, batch in made)
    sample = made[0][2]
    images = sample.observation.images
    seen = ModelObservation(
        images=images.new_zeros(count, len(cameras), *images.shape[2:]),
        image_mask=torch.zeros(count, len(cameras), dtype=torch.bool),
        prompt_tokens=sample.observation.prompt_tokens.new_zeros(count, longest),
        prompt_mask=torch.zeros(count, longest, dtype=torch.bool),
        state=sample.observation.state.new_zeros(count, sample.observation.state.shape[1]),
    )
    names = ("actions", "action_mask", "noise", "uniform", *(() if sample.delays is None else ("delays",)))
    arrays = {name: getattr(sample, name) for name in names}
    whole = Batch(seen, **{name: array.new_zeros(count, *array.shape[1:]) for name, array in arrays.items()})
    augmentation = _neutral(count, len(cameras)) if any(batch.augmentation is not None for _, _, batch in made) else None
    for part, rows, batch in made:
        place = torch.from_numpy(rows)
        slots = torch.tensor([cameras.index(name) for name in part.source.embodiment.cameras])
        width = batch.observation.prompt_tokens.shape[1]
        whole.observation.images[place[:, None], slots] = batch.observation.images
        whole.observation.image_mask[place[:, None], slots] = batch.observation.image_mask
        whole.observation.prompt_tokens[place, :width] = batch.observation.prompt_tokens
        whole.observation.prompt_mask[place, :width] = batch.observation.prompt_mask
        whole.observation.state[place] = batch.observation.state
        for name in arrays:
            getattr(whole, name)[place] = getattr(batch, name)
        if augmentation is not None and batch.augmentation is not None:
            for item in fields(Augmentation):
                getattr(augmentation, item.name)[place[:, None], slots] = getattr(batch.augmentation, item.name)
    return replace(whole, augmentation=augmentation)


def _neutral(count: int, cameras: int) -> Augmentation:
    """Augmentation that changes nothing, for masked cameras and parts without augmentation."""
    window: Tensor = torch.zeros(count, cameras, 3)
    window[..., 0] = 1
    return Augmentation(window, torch.zeros(count, cameras), torch.ones(count, cameras, 3))
