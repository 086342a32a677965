"""Examination of a data set as by a run, with every fault instead of the first.

Owns: `Findings`, the order of checks, the advice on what to type. Does not know: training, tables on a terminal.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pi0fm import progress
from pi0fm.data.chain import Chain
from pi0fm.data.checks import num_files, picture_faults, prompt_faults
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.faults import Fault, faulty_episodes
from pi0fm.data.columns.lerobot_source import LeRobotSource, examine
from pi0fm.data.config import DatasetConfig, Extent, Selection
from pi0fm.data.loading.mixture import as_typed
from pi0fm.doctor.contents import DatasetContents, describe
from pi0fm_client.errors import DatasetError


@dataclass(frozen=True)
class Findings:
    """Faults of a data set. episodes, rows: number judged; extent: the pictures judged; name: its entry in a mixture.

    skipped: the given --dataset.skip_bad. contents, source: of the rows without a fault, if there are any.
    """

    root: Path
    episodes: int
    rows: int
    faults: tuple[Fault, ...]
    extent: Extent = "ends"
    name: str = ""
    skipped: Literal["all"] | bool = False
    contents: DatasetContents | None = None
    source: LeRobotSource | None = None

    @property
    def bad(self) -> list[int]:
        """Episodes with a fault."""
        return faulty_episodes(self.faults)

    def counts(self) -> dict[str, int]:
        """Number of faults by kind, the most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())

    def advice(self) -> str:
        """Return the advice; empty for a healthy data set."""
        if not self.faults:
            return ""
        whole = [fault for fault in self.faults if fault.episode is None]
        if whole:
            return whole[0].remedy
        if len(self.bad) == self.episodes:
            return self.faults[0].remedy
        wanted = "all" if self.extent == "all" else "true"
        others = f"the other {counted(self.episodes - len(self.bad), 'episode')}, or: {self.faults[0].remedy}"
        if str(self.skipped).lower() in (wanted, "all"):
            return f"a run with this --dataset.skip_bad trains on {others}"
        return f"type --dataset.skip_bad {wanted} to train on {others}"

    def json(self) -> dict[str, Any]:
        """Return the figures of the command's last line."""
        return {
            **({"entry": self.name} if self.name else {}),
            "dataset": str(self.root),
            "episodes": self.episodes,
            "rows": self.rows,
            "faults": len(self.faults),
            "kinds": self.counts(),
            "bad_episodes": self.bad,
            "advice": as_typed(self.name, self.advice()),
            **({"contents": self.contents.json()} if self.contents else {}),
        }


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: `1 fault`, `2 faults`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def find_faults(
    config: DatasetConfig,
    embodiment: Embodiment,
    selection: Selection | None = None,
    extent: Extent = "ends",
    chain: Callable[[LeRobotSource], Chain] | None = None,
    name: str = "",
) -> Findings:
    """Judge the chosen episodes: columns, instructions, pictures. chain: of a policy, against which instructions are judged.

    A fault of the whole data set has no episode. Raises ConfigError for a wrong configuration.
    """
    where = config.root or Path(config.repo_id)
    try:
        source, faults = examine(config, embodiment, selection)
    except DatasetError as error:
        return Findings(where, 0, 0, (Fault.of("data set", error),), extent, name, config.skip_bad)
    bad = faulty_episodes(faults)
    episodes, rows = len({*np.unique(source.episode).tolist(), *bad}), len(source.rows)
    good = source.without(bad) if bad else source
    if len(good.frames):
        if chain is None:
            empty = [place for place, text in enumerate(good.tasks) if not text.strip()]
            for place in np.flatnonzero(np.isin(good.task, empty))[:1].tolist():
                text = (
                    f"row {good.rows[place]} of episode {good.episode[place]} of {good.root}: the prompt must say something, found nothing"
                )
                faults.append(Fault("prompt", text, "write the sentence into meta/tasks.parquet", int(good.episode[place])))
        else:
            faults += prompt_faults(good, chain(good))
        with progress.step("look at pictures", num_files(good) if extent != "none" else 0) as bar:
            faults += picture_faults(good, config, extent, bar.advance)
    bad = faulty_episodes(faults)
    usable = source.without(bad) if bad else source
    contents = describe(usable) if len(usable.rows) else None
    return Findings(source.root, episodes, rows, tuple(faults), extent, name, config.skip_bad, contents, usable if contents else None)
