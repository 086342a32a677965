"""What is wrong with a data set, a line each that names file, episode, row and remedy.

Owns: `Fault` and the line of several. Does not know: how a fault is found, which data set is open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pi0fm_client.errors import DatasetError, Pi0fmError

RECORD_AGAIN = "record or download the data set again"
SKIP = "type --dataset.skip_bad true to train on the other episodes"


@dataclass(frozen=True)
class Fault:
    """One fault. kind: a word that faults are counted by; episode: the one that it spoils, None for the whole data set."""

    kind: str
    text: str
    remedy: str = RECORD_AGAIN
    episode: int | None = None

    @classmethod
    def of(cls, kind: str, error: Pi0fmError, episode: int | None = None) -> "Fault":
        """A fault that was raised as an error."""
        text, _, remedy = str(error).partition("; ")
        return cls(kind, text, remedy or RECORD_AGAIN, episode)

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"

    def error(self) -> DatasetError:
        """The fault as an exception."""
        return DatasetError(str(self))


def refuse(faults: Sequence[Fault], where: object) -> None:
    """Raise DatasetError with the first of the faults and the number of others; nothing where there is none.

    Where every fault belongs to an episode, the line says which option leaves such episodes out.
    """
    if not faults:
        return
    line = str(faults[0])
    if all(fault.episode is not None for fault in faults):
        line += f", or {SKIP}"
    if len(faults) > 1:
        line += f" ({len(faults) - 1} more: pi0fm doctor {where})"
    raise DatasetError(line)


def spoiled(faults: Sequence[Fault]) -> list[int]:
    """The episodes that have a fault."""
    return sorted({fault.episode for fault in faults if fault.episode is not None})
