"""Faults of a data set, one line each with file, episode, row and remedy.

Owns: `Fault`, and the one line that reports several. Does not know: how a fault is found, which data set is open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pi0fm_client.errors import DatasetError, Pi0fmError

RECORD_AGAIN = "record or download the data set again"
SKIP = "type --dataset.skip_bad true to train on the other episodes"


@dataclass(frozen=True)
class Fault:
    """Fault of a data set. kind: the word it is counted under; episode: the affected one, None for the whole data set."""

    kind: str
    text: str
    remedy: str = RECORD_AGAIN
    episode: int | None = None

    @classmethod
    def of(cls, kind: str, error: Pi0fmError, episode: int | None = None) -> "Fault":
        """Make a fault from a raised error."""
        text, _, remedy = str(error).partition("; ")
        return cls(kind, text, remedy or RECORD_AGAIN, episode)

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"

    def error(self) -> DatasetError:
        """Convert to an exception."""
        return DatasetError(str(self))


def refuse(faults: Sequence[Fault], where: object) -> None:
    """Raise DatasetError with the first fault and the number of others, if there is any.

    Where every fault belongs to an episode, the line names the option that leaves such episodes out.
    """
    if not faults:
        return
    line = str(faults[0])
    if all(fault.episode is not None for fault in faults):
        line += f", or {SKIP}"
    if len(faults) > 1:
        line += f" ({len(faults) - 1} more: pi0fm doctor {where})"
    raise DatasetError(line)


def faulty_episodes(faults: Sequence[Fault]) -> list[int]:
    """Numbers of the episodes that have a fault, ascending."""
    return sorted({fault.episode for fault in faults if fault.episode is not None})
