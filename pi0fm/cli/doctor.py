"""`pi0fm doctor DATASET [CONFIG.yaml ...]`, or the files of a run alone: what is wrong with its data, before anything is trained on it.

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
from pi0fm.data.loading.mixture import MixtureEntry, entry_named
from pi0fm.doctor.data import Findings, judge
from pi0fm.options import option, required
from pi0fm.train.data import policy_config
from pi0fm_client.errors import ConfigError, DatasetError

HELP = "judge a data set, or all of a mixture: every fault with file, episode, row and remedy"
POSITIONAL = "data"
OTHERS = "config"
SHOWN = 20  # faults in the table
WIDE = 600  # letters of a line that no terminal folds


@dataclass(frozen=True)
class Options:
    """A data set, and the run that is to train on it."""

    data: str = required(
        "folder of the data set, or its name as in --dataset.repo_id; or the first configuration file of a run that names its own"
    )
    config: tuple[str, ...] = option((), "configuration files of the run, as pi0fm train takes them: prompts are judged by its network")
    pictures: Extent = option("ends", "ends looks at the first and last picture of every file, all at every one, none at columns only")
    dataset: DatasetConfig = option(DatasetConfig, "")
    embodiment: Embodiment = option(Embodiment, "")
    mixture: dict[str, MixtureEntry] = option(dict, "of a mixture, options of its entries, as in pi0fm train")

    def __post_init__(self) -> None:
        if self.pictures not in ("none", "ends", "all"):
            raise ConfigError(f"pictures must be none, ends or all, found {self.pictures!r}")


ALIASES: dict[str, str] = {}


def run(given: Options) -> None:
    """Judge, print a table and a last line of JSON. Raises DatasetError, and so exit code 1, where there is a fault."""
    judged = _judged(given)
    for findings in judged:
        show(findings)
    told = [findings.json() for findings in judged]
    last = told[0] if not judged[0].name else {"faults": sum(each["faults"] for each in told), "entries": told}
    sys.stdout.write(json.dumps(last) + "\n")
    sys.stdout.flush()
    faulty = [findings for findings in judged if findings.faults]
    for findings in faulty[:1]:
        bad = f" in {len(findings.bad)} of {findings.episodes} episodes" if findings.bad else ""
        others = f" (and entries {', '.join(each.name for each in faulty[1:])})" if faulty[1:] else ""
        with entry_named(findings.name):
            raise DatasetError(f"{findings.root} has {len(findings.faults)} faults{bad}{others}; {findings.advice()}")


def _judged(given: Options) -> list[Findings]:
    path = Path(given.data)
    is_file = not path.is_dir() and (path.suffix == ".yaml" or given.data in options.shipped())
    place: dict[str, Any] = {}
    if not is_file:
        # a name of the hub has one slash; anything else that is no folder was meant as one
        is_folder = path.exists() or path.is_absolute() or given.data.startswith((".", "~")) or given.data.count("/") > 1
        place = {"repo_id": "", "root": path} if is_folder else {"repo_id": given.data, "root": None}
    if not (is_file or given.config):
        return [judge(replace(given.dataset, **place), given.embodiment, extent=given.pictures)]
    tree = options.read_files([*([given.data] if is_file else []), *given.config])
    if not is_file and tree.get("mixture"):
        raise ConfigError(f"these files name the data sets of a mixture themselves: {', '.join(tree['mixture'])}; leave {given.data} out")
    defaults = {"embodiment": Embodiment(), "dataset": DatasetConfig(), "mixture": {name: MixtureEntry() for name in given.mixture}}
    typed = {name: _changed(options.encode(getattr(given, name)), options.encode(usual)) for name, usual in defaults.items()}
    run_ = options.decode(TrainingRun, options.merge(tree, typed))
    if place:
        run_ = replace(run_, dataset=replace(run_.dataset, **place))

    def chain(source: LeRobotSource) -> Chain:
        policy = policy_config(run_, source)
        return policy.chain(source.norm_stats(policy.model.action_horizon))

    found = []
    for name, entry in run_.entries().items():
        with entry_named(name):
            found.append(judge(entry.dataset, entry.embodiment, entry.selection(), given.pictures, chain, name))
    return found


def _changed(tree: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """The options that are not as they are when nothing is typed."""
    found = {name: value for name, value in tree.items() if value != usual[name]}
    return {name: _changed(value, usual[name]) if isinstance(usual[name], dict) and usual[name] else value for name, value in found.items()}


def show(findings: Findings) -> None:
    """The table on standard error."""
    console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else WIDE)
    entry = f"{findings.name}: " if findings.name else ""
    console.print(f"{entry}{findings.root}: {findings.episodes} episodes, {findings.rows} rows")
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
