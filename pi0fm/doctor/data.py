"""A data set judged as a run would judge it, with every fault instead of the first.

Owns: `Findings`, in which order things are judged, what the user is to type. Does not know: training, tables on a terminal.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pi0fm import progress
from pi0fm.data.chain import Chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.faults import Fault
from pi0fm.data.columns.lerobot_source import DatasetConfig, LeRobotSource, examine
from pi0fm.data.columns.rows import Selection
from pi0fm.data.judging import Extent, judge_pictures, judge_prompts, num_files
from pi0fm_client.errors import DatasetError


@dataclass(frozen=True)
class Findings:
    """What is wrong with a data set. episodes, rows: that were judged."""

    root: Path
    episodes: int
    rows: int
    faults: tuple[Fault, ...]
    remarks: tuple[str, ...] = field(default=())

    @property
    def bad(self) -> list[int]:
        """Episodes with a fault."""
        return sorted({fault.episode for fault in self.faults if fault.episode is not None})

    def counts(self) -> dict[str, int]:
        """Faults by kind, the most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())

    def advice(self) -> str:
        """The line to type; empty for a healthy data set."""
        if not self.faults:
            return ""
        whole = [fault for fault in self.faults if fault.episode is None]
        if whole:
            return whole[0].remedy
        if len(self.bad) == self.episodes:
            return self.faults[0].remedy
        return f"type --dataset.skip_bad true to train on the other {self.episodes - len(self.bad)} episodes, or: {self.faults[0].remedy}"

    def json(self) -> dict[str, Any]:
        """For the last line of the command."""
        return {
            "dataset": str(self.root),
            "episodes": self.episodes,
            "rows": self.rows,
            "faults": len(self.faults),
            "kinds": self.counts(),
            "bad_episodes": self.bad,
            "advice": self.advice(),
        }


def judge(
    config: DatasetConfig,
    embodiment: Embodiment,
    selection: Selection | None = None,
    extent: Extent = "ends",
    chain: Callable[[LeRobotSource], Chain] | None = None,
) -> Findings:
    """Judge the chosen episodes: columns, instructions, pictures. chain: of a policy, against which instructions are judged.

    What spoils the whole data set is a fault without an episode. Raises ConfigError for what the configuration got wrong.
    """
    where = config.root or Path(config.repo_id)
    try:
        source, faults = examine(config, embodiment, selection)
    except DatasetError as error:
        text, _, remedy = str(error).partition("; ")
        return Findings(where, 0, 0, (Fault("data set", text, remedy),))
    bad = {fault.episode for fault in faults if fault.episode is not None}
    episodes, rows = len({*np.unique(source.episode).tolist(), *bad}), len(source.rows)
    good = source.without(sorted(bad)) if bad else source
    if len(good.frames):
        if chain is None:
            empty = [place for place, text in enumerate(good.tasks) if not text.strip()]
            for place in np.flatnonzero(np.isin(good.task, empty))[:1].tolist():
                text = (
                    f"row {good.rows[place]} of episode {good.episode[place]} of {good.root}: the prompt must say something, found nothing"
                )
                faults.append(Fault("prompt", text, "write the sentence into meta/tasks.parquet", int(good.episode[place])))
        else:
            faults += judge_prompts(good, chain(good))
        with progress.step("look at pictures", num_files(good) if extent != "none" else 0) as bar:
            faults += judge_pictures(good, config, extent, bar.advance)
    return Findings(source.root, episodes, rows, tuple(faults))
