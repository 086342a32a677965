"""`pi0fm doctor` after its options: open what was named, check it, print tables, exit with 1 for an error.

Owns: which check a word goes to, the tables, the exit code. Does not know: the options (cli/judging/doctor), the checks (doctor/data,
doctor/policy).
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pi0fm import files, options
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.data.chain import Chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.columns.lerobot_source import examine as examine_source
from pi0fm.data.config import LIKE_A_PATH, DatasetConfig, MixtureEntry
from pi0fm.data.loading.mixture import entry_named
from pi0fm.doctor.contents import write_contact_sheet
from pi0fm.doctor.data import Findings, counted, find_faults
from pi0fm.doctor.policy import Counterparts, Examination, Subject, examine, examine_server, of_bundle, open_counterpart
from pi0fm.policy.device import choose_device
from pi0fm.policy.saved.manifest import MANIFEST
from pi0fm.train.data import policy_config
from pi0fm.train.plan.flops import training_work
from pi0fm.train.plan.planner import known_cards
from pi0fm.train.start.pretrained import open_pretrained, pretrained_stats, resolve_dialect, resolve_tokenizer
from pi0fm_client.errors import BundleError, ConfigError, DatasetError

if TYPE_CHECKING:
    from pi0fm.cli.judging.doctor import DoctorOptions

SHOWN = 20  # faults in the table
WIDE = 600  # columns where no terminal folds lines


def diagnose(given: "DoctorOptions") -> None:
    """Check, print tables and a last line of JSON. Raises DatasetError or BundleError (exit code 1) for a fault."""
    examined = _policy(given)
    if examined is not None:
        show_policy(examined)
        _say(examined.json())
        _refuse(examined)
        return
    judged = _examine_all(given)
    for findings, seen in judged:
        show(findings, _contact_sheet(given, findings))
        if seen is not None:
            show_policy(seen)
    entries = [findings.json() | ({} if seen is None else {"seen": seen.json()}) for findings, seen in judged]
    _say(entries[0] if not judged[0][0].name else {"faults": sum(each["faults"] for each in entries), "entries": entries})
    faulty = [findings for findings, _ in judged if findings.faults]
    for findings in faulty[:1]:
        if findings.source is None and len(findings.faults) == 1:
            with entry_named(findings.name):
                raise DatasetError(f"{findings.faults[0].text}; {findings.advice()}")
        bad = f" in {len(findings.bad)} of {findings.episodes} episodes" if findings.bad else ""
        others = f" (and entries {', '.join(each.name for each in faulty[1:])})" if faulty[1:] else ""
        with entry_named(findings.name):
            raise DatasetError(f"{findings.root} has {counted(len(findings.faults), 'fault')}{bad}{others}; {findings.advice()}")
    for findings, seen in judged:
        with entry_named(findings.name):
            if seen is not None:
                _refuse(seen)


def _contact_sheet(given: "DoctorOptions", findings: Findings) -> Path | None:
    """Write the contact sheet of a data set; return None where pictures are not checked, or one cannot be read."""
    if findings.source is None or given.pictures == "none" or not findings.source.embodiment.cameras:
        return None
    path = given.output_dir / (f"contact-{findings.name}.png" if findings.name else "contact.png")
    try:
        return write_contact_sheet(path, findings.source, given.dataset)
    except DatasetError:  # a fault in the middle of a file, which --pictures all reports
        return None


def _say(last: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(last) + "\n")
    sys.stdout.flush()


def _refuse(examined: Examination) -> None:
    if examined.errors:
        first, more = examined.errors[0], len(examined.errors) - 1
        raise BundleError(
            f"{examined.name} has {counted(len(examined.errors), 'error')}: {first}" + (f" ({more} more above)" if more else "")
        )


def _policy(given: "DoctorOptions") -> Examination | None:
    """Examine a bundle or a server; return None for anything else. Raises ConfigError for options that go with neither."""
    is_server = given.data.startswith(("ws://", "wss://"))
    if not is_server and not (Path(given.data) / MANIFEST).is_file():
        if given.server or given.robot:
            raise ConfigError(f"--server and --robot go with a bundle, found {given.data}; name one, or leave them out")
        return None
    if given.config or given.mixture:
        raise ConfigError(f"{given.data} is a policy already, found a configuration with it; leave one of them out")
    has_data = bool(given.dataset.root or given.dataset.repo_id)
    if is_server:
        return examine_server(given.data, given.dataset if has_data else None, _counterparts(given))
    subject = of_bundle(Path(given.data), given.robot)
    source = open_counterpart(subject, given.dataset) if has_data else None
    return examine(subject, given.dataset, source, _counterparts(given))


def _counterparts(given: "DoctorOptions", name: str = "") -> Counterparts:
    sheet = given.output_dir / (f"sheet-{name}.png" if name else "sheet.png")
    return Counterparts(given.suite, given.server, given.max_steps, given.load, sheet)


def _examine_all(given: "DoctorOptions") -> list[tuple[Findings, Examination | None]]:
    """Check each data set; with a configuration, also examine a batch as its network would see it."""
    _refuse_word(given.data)
    path = Path(given.data)
    is_file = not path.is_dir() and (path.suffix == ".yaml" or given.data in options.shipped())
    place: dict[str, Any] = {}
    if not is_file:
        # a name on the hub has one slash; any other word was meant as a folder
        is_folder = path.exists() or path.is_absolute() or given.data.startswith((".", "~")) or given.data.count("/") > 1
        place = {"repo_id": "", "root": path} if is_folder else {"repo_id": given.data, "root": None}
    if not (is_file or given.config):
        if given.suite:
            raise ConfigError(f"--suite goes with a policy, found the data set {given.data} alone; name a configuration or a bundle")
        return [(find_faults(replace(given.dataset, **place), given.embodiment, extent=given.pictures), None)]
    tree = options.read_files([*([given.data] if is_file else []), *given.config])
    if not is_file and tree.get("mixture"):
        raise ConfigError(f"these files name the data sets of a mixture themselves: {', '.join(tree['mixture'])}; leave {given.data} out")
    defaults = {"embodiment": Embodiment(), "dataset": DatasetConfig(), "mixture": {name: MixtureEntry() for name in given.mixture}}
    typed = {name: _changed(options.encode(getattr(given, name)), options.encode(usual)) for name, usual in defaults.items()}
    run_ = options.decode(TrainingRun, options.merge(tree, typed))
    if place:
        run_ = replace(run_, dataset=replace(run_.dataset, **place))

    pretrained = open_pretrained(run_.pretrained)
    dialect = resolve_dialect(run_.prompt_dialect, pretrained)
    run_ = replace(run_, tokenizer=resolve_tokenizer(run_.tokenizer, pretrained), prompt_dialect=dialect)

    def subject(name: str, source: LeRobotSource) -> Subject:
        policy = policy_config(run_, source)
        kept = pretrained is not None and run_.pretrained_norm_stats
        stats = pretrained_stats(pretrained, name, policy) if kept and pretrained else source.norm_stats(policy.model.action_horizon)
        return Subject(
            f"the run's policy{f' of {name}' * bool(name)}", policy, stats, policy.chain(stats), policy.metadata(), None, not kept
        )

    def chain(name: str, source: LeRobotSource) -> Chain:
        return subject(name, source).chain

    found: list[tuple[Findings, Examination | None]] = []
    for name, entry in run_.entries().items():
        with entry_named(name):
            faults = find_faults(
                entry.dataset,
                entry.embodiment,
                entry.selection(),
                given.pictures,
                partial(chain, name),
                name,
            )
            whole = all(fault.episode is not None for fault in faults.faults) and len(faults.bad) < faults.episodes
            seen = None
            if whole and faults.episodes and given.pictures != "none":
                source, _ = examine_source(entry.dataset, entry.embodiment, entry.selection())
                source = source.without(faults.bad)
                seen = examine(subject(name, source), entry.dataset, source, _counterparts(given, name))
                training = _of_training(run_, len(source.embodiment.cameras))
                seen = replace(seen, measured={**seen.measured, **training})
            found.append((faults, seen))
    return found


def _refuse_word(word: str) -> None:
    """Raise ConfigError for a word that is no data set, configuration, bundle or server."""
    kinds = "a data set's folder or USER/NAME, a configuration, a bundle, or a server's ws:// address"
    scheme, separated, rest = word.partition("//")
    if separated and scheme.rstrip(":").isalpha():
        raise ConfigError(f"doctor takes {kinds}, found {word!r}; type ws://{rest} for a policy server")
    path = Path(word)
    is_path = "/" in word and not separated and not word.endswith(".yaml")
    if is_path and not path.exists() and not (files.nearest_path(path, LIKE_A_PATH) is None and files.is_hub_name(word)):
        raise ConfigError(f"doctor takes {kinds}, but {files.missing(path)}")
    if "/" not in word and not Path(word).exists() and not word.endswith(".yaml") and word not in options.shipped():
        known = [
            *options.shipped(),
            *sorted(path.name for path in Path().iterdir() if (path / "meta").is_dir() or (path / MANIFEST).is_file()),
        ]
        raise ConfigError(f"doctor takes {kinds}, found {word!r}: {options.nearest(word, known)}")


def _of_training(run_: TrainingRun, cameras: int) -> dict[str, str]:
    """Estimate a worker's memory, the operations of a step and their least time on known cards."""
    work = training_work(run_.network(), run_.adaptation(), cameras, run_.flow_draws_per_observation)
    flops = run_.global_batch_size * (work.forward + work.backward)
    least = ", ".join(f"{name} {1e3 * flops / card.flops_per_second:.3g} ms" for name, card in known_cards().items())
    memory = run_.memory(cameras, max(1, run_.workers[1]), choose_device(run_.device))
    return {"training": str(memory), "step": f"{flops / 1e12:.3g} TFLOP; on one card at its highest rate {least}; see pi0fm plan"}


def _changed(tree: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    found = {name: value for name, value in tree.items() if value != usual[name]}
    return {name: _changed(value, usual[name]) if isinstance(usual[name], dict) and usual[name] else value for name, value in found.items()}


def show(findings: Findings, sheet: Path | None = None) -> None:
    """Print a data set's contents and faults to standard error."""
    console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else WIDE)
    entry = f"{findings.name}: " if findings.name else ""
    console.print(f"{entry}{findings.root}: {findings.episodes} episodes, {findings.rows} rows")
    if findings.contents is not None:
        for name, text in findings.contents.facts().items():
            console.print(f"{name + ':':16}{text}")
    if sheet is not None:
        console.print(f"pictures: {sheet}")
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


def show_policy(examined: Examination) -> None:
    """Print a policy's measurements and findings to standard error."""
    console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else WIDE)
    console.print(examined.name)
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, text in examined.measured.items():
        table.add_row(name, text)
    console.print(table)
    table = Table(box=None, padding=(0, 2), header_style="")
    for heading in ("severity", "kind", "what", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in examined.findings:
        table.add_row(finding.severity, finding.kind, finding.text, finding.remedy)
    console.print(table if examined.findings else "nothing wrong was found")
    if examined.sheet is not None:
        console.print(f"as the network sees it: {examined.sheet}")
