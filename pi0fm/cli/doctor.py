"""`pi0fm doctor DATASET [CONFIG.yaml ...] [--option value ...]`: what is wrong with a data set, before anything is trained on it.

Owns: the options, the table, the exit code. Does not know: what is judged (doctor/data.py).
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import options
from pi0fm.cluster.training import TrainingRun
from pi0fm.data.chain import Chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import DatasetConfig, LeRobotSource
from pi0fm.data.judging import Extent
from pi0fm.doctor.data import Findings, judge
from pi0fm.options import option, required
from pi0fm.train.data import policy_config
from pi0fm_client.errors import ConfigError, DatasetError

HELP = "judge a data set: every fault with file, episode, row and remedy"
POSITIONAL = "data"
OTHERS = "config"
SHOWN = 20  # faults in the table
WIDE = 600  # letters of a line that no terminal folds


@dataclass(frozen=True)
class Options:
    """A data set, and the run that is to train on it."""

    data: str = required("folder of the data set, or its name as in --dataset.repo_id")
    config: tuple[str, ...] = option((), "configuration files of the run, as pi0fm train takes them: prompts are judged by its network")
    pictures: Extent = option("ends", "ends looks at the first and last picture of every file, all at every one, none at columns only")
    dataset: DatasetConfig = option(DatasetConfig, "")
    embodiment: Embodiment = option(Embodiment, "")

    def __post_init__(self) -> None:
        if self.pictures not in ("none", "ends", "all"):
            raise ConfigError(f"pictures must be none, ends or all, found {self.pictures!r}")


ALIASES: dict[str, str] = {}


def run(given: Options) -> None:
    """Judge, print the table and a last line of JSON. Raises DatasetError, and so exit code 1, where there is a fault."""
    findings = _judged(given)
    show(findings)
    sys.stdout.write(json.dumps(findings.json()) + "\n")
    sys.stdout.flush()
    if findings.faults:
        bad = f" in {len(findings.bad)} of {findings.episodes} episodes" if findings.bad else ""
        raise DatasetError(f"{findings.root} has {len(findings.faults)} faults{bad}; {findings.advice()}")


def _judged(given: Options) -> Findings:
    # a name of the hub has one slash; anything else that is no folder was meant as one
    path = Path(given.data)
    is_folder = path.exists() or path.is_absolute() or given.data.startswith((".", "~")) or given.data.count("/") > 1
    place: dict[str, Any] = {"root": path} if is_folder else {"repo_id": given.data}
    dataset = replace(given.dataset, **place)
    if not given.config:
        return judge(dataset, given.embodiment, extent=given.pictures)
    tree = options.read_files(given.config)
    if tree.get("mixture"):
        raise ConfigError(f"doctor judges one data set, found a mixture of {', '.join(tree['mixture'])}; give the options of one entry")
    typed = {"embodiment": _changed(given.embodiment, Embodiment()), "dataset": _changed(given.dataset, DatasetConfig())}
    run_ = options.decode(TrainingRun, options.merge(tree, typed))
    run_ = replace(run_, dataset=replace(run_.dataset, **{"repo_id": "", "root": None, **place}))

    def chain(source: LeRobotSource) -> Chain:
        policy = policy_config(run_, source)
        return policy.chain(source.norm_stats(policy.model.action_horizon))

    (entry,) = run_.entries().values()
    return judge(entry.dataset, entry.embodiment, entry.selection(), given.pictures, chain)


def _changed(given: Any, usual: Any) -> dict[str, Any]:
    """The options that are not as they are when nothing is typed."""
    tree, known = options.encode(given), options.encode(usual)
    return {name: value for name, value in tree.items() if value != known[name]}


def show(findings: Findings) -> None:
    """The table on standard error."""
    console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else WIDE)
    console.print(f"{findings.root}: {findings.episodes} episodes, {findings.rows} rows")
    if not findings.faults:
        console.print("no fault")
        return
    table = Table(box=None, padding=(0, 2), header_style="")
    for heading in ("kind", "episode", "what"):
        table.add_column(heading, overflow="fold")
    for fault in findings.faults[:SHOWN]:
        table.add_row(fault.kind, "all" if fault.episode is None else str(fault.episode), fault.text)
    console.print(table)
    if len(findings.faults) > SHOWN:
        console.print(f"and {len(findings.faults) - SHOWN} more")
    console.print(", ".join(f"{kind}: {count}" for kind, count in findings.counts().items()))
