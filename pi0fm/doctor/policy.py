"""Examination of a policy before it is trained or served: against its data set, an environment, a server.

Owns: the choice and order of checks, `Examination`. Does not know: the checks (batch, environment, answers), tables on a terminal.

    CONFIG   policy and statistics that a run would make   --.
    BUNDLE   those that a run made, and weights              +-- data set -> a batch, the sheet, answers on it
    URL      a server's greeting                           --'-- environment, server
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm import machine, progress
from pi0fm.data.chain import Chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import LeRobotSource, open_source
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.chosen import pictures_at
from pi0fm.data.prompt import BYTES
from pi0fm.doctor import answers
from pi0fm.doctor.batch import NetworkRows, batch_findings, read_network_rows
from pi0fm.doctor.environment import PolicyAndData, environment_findings
from pi0fm.doctor.finding import Finding, worst_first
from pi0fm.doctor.sheet import write_sheet
from pi0fm.policy.load_options import TOKEN_VARIABLE, LoadOptions
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm_client.errors import Pi0fmError
from pi0fm_client.types import ActionChunk, Observation

STARTS = 8


@dataclass(frozen=True)
class Counterparts:
    """Counterparts of a policy, each None if not given. load: infer with a bundle, where memory allows."""

    suite: str | None = None
    server: str | None = None
    max_steps: int | None = None
    load: bool = True
    sheet: Path = Path("outputs/doctor/sheet.png")


@dataclass(frozen=True)
class Subject:
    """Policy under examination. path: of a bundle, None before training; trained_here: the statistics are those of `source`."""

    name: str
    policy: PolicyConfig
    stats: NormStats
    chain: Chain
    facts: Mapping[str, Any]
    path: Path | None = None
    trained_here: bool = False


@dataclass(frozen=True)
class Examination:
    """Findings of an examination, worst first; measured: facts by name; sheet: the picture of a batch, if there was a data set."""

    name: str
    findings: tuple[Finding, ...]
    measured: Mapping[str, str] = field(default_factory=dict)
    sheet: Path | None = None

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the command fail."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def json(self) -> dict[str, Any]:
        """Return the figures of the command's last line."""
        figures = {"policy": self.name, "errors": len(self.errors), "findings": [finding.json() for finding in self.findings]}
        return figures | {"measured": dict(self.measured), "sheet": self.sheet and str(self.sheet)}


def of_bundle(path: Path, robot: str | None) -> Subject:
    """Read a bundle without its weights. Raises BundleError."""
    policy, stats = bundle.read(path, robot)
    chain = policy.chain(stats, None if policy.tokenizer == BYTES else str(path / policy.tokenizer))
    return Subject(str(path), policy, stats, chain, bundle.metadata(path, robot), path)


def open_counterpart(subject: Subject, dataset: DatasetConfig) -> LeRobotSource:
    """Open the data set in the policy's columns. Raises ConfigError for missing columns, DatasetError."""
    return open_source(dataset, subject.policy.embodiment)


def examine(subject: Subject, dataset: DatasetConfig, source: LeRobotSource | None, counterparts: Counterparts) -> Examination:
    """Judge a policy against its counterparts. Raises ConfigError, SimulationError for a counterpart that cannot be opened."""
    found: list[Finding] = []
    measured: dict[str, str] = {}
    seen, sheet = None, None
    if subject.path is not None:
        found += [*answers.version_findings(subject.path)]
        with progress.step("read weights", 1) as bar:
            found += answers.weight_findings(subject.path, subject.policy.model)
            bar.advance()
    if source is not None:
        fps = subject.policy.fps
        if fps and abs(fps - source.fps) > 1e-3 * source.fps:
            text = f"the policy was trained at {fps:g} Hz, the data set is at {source.fps:g} Hz"
            found.append(Finding("error", "rate", text, "name a data set of that rate"))
        seen = read_network_rows(source, dataset, subject.chain, subject.policy.model.action_horizon)
        found += batch_findings(seen, subject.policy, subject.stats, subject.chain, subject.trained_here)
        measured |= _batch_figures(seen, subject.chain)
        sheet = write_sheet(counterparts.sheet, seen)
    broken = any(finding.kind == "weights" for finding in found)
    if subject.path is not None and seen is not None and counterparts.load and not broken:
        more, figures = _bundle_findings(subject, seen)
        found, measured = found + more, measured | figures
    if counterparts.suite is not None:
        judged = _policy_and_data(subject.facts, subject.chain, source, subject.stats)
        found += environment_findings(counterparts.suite, counterparts.max_steps, judged, _starts(source, dataset, subject.chain))
    if counterparts.server is not None:
        asked = [seen.observation(number) for number in range(len(seen.place))] if seen is not None else []
        more, figures = _server_findings(counterparts.server, subject.facts, asked, None if source is None else source.action)
        found, measured = found + more, measured | figures
    return Examination(subject.name, tuple(worst_first(found)), measured, sheet)


def examine_server(url: str, dataset: DatasetConfig | None, counterparts: Counterparts) -> Examination:
    """Judge a server's greeting and its answers on a data set. Raises ServingError, and as `examine`."""
    served, close = _connect(url)
    close.close()
    source, asked = None, []
    found: list[Finding] = []
    if dataset is not None:
        columns = Embodiment(
            cameras=dict(served.get("cameras") or {}),
            state=str(served.get("state_key", "observation.state")),
            state_dim=served.get("state_dim"),
            robot_action_dim=served.get("robot_action_dim"),
        )
        source = open_source(dataset, columns)
        fps = float(served.get("fps") or source.fps)
        if abs(fps - source.fps) > 1e-3 * source.fps:
            text = f"the server's policy was trained at {fps:g} Hz, the data set is at {source.fps:g} Hz"
            found.append(Finding("error", "rate", text, "name a data set of that rate"))
        place = np.unique(np.linspace(0, len(source.rows) - 1, STARTS).round().astype(np.int64))
        pictures = pictures_at(source, dataset, place, int((served.get("image_size") or (224,))[0]))
        asked = [source.observation(row, shots) for row, shots in zip(place.tolist(), pictures, strict=True)]
    more, measured = _server_findings(url, served, asked, None if source is None else source.action)
    if counterparts.suite is not None:
        more += environment_findings(counterparts.suite, counterparts.max_steps, _policy_and_data(served, None, source, None), None)
    return Examination(url, tuple(worst_first(found + more)), measured)


def _policy_and_data(facts: Mapping[str, Any], chain: Chain | None, source: LeRobotSource | None, stats: NormStats | None) -> PolicyAndData:
    """Select actions in the environment's form: the data set's, else those of a policy without differences."""
    low = high = None
    if source is not None:
        low, high = np.quantile(source.action, (0.01, 0.99), axis=0).astype(np.float32)
    elif stats is not None and chain is not None and not chain.embodiment.delta_actions:
        low, high = stats.action.q01, stats.action.q99
    return PolicyAndData(facts, chain, source, low, high, () if source is None else source.tasks)


def _starts(source: LeRobotSource | None, dataset: DatasetConfig, chain: Chain) -> NDArray[np.uint8] | None:
    if source is None:
        return None
    begins = source.starts
    return pictures_at(source, dataset, begins[:STARTS], chain.image_size, chain.resize)


def _batch_figures(seen: NetworkRows, chain: Chain) -> dict[str, str]:
    limit = chain.tokenizer.max_tokens
    figures = {}
    for name, _, _, normal in seen.columns():
        share = 100 * float((np.abs(normal) > 1).mean())
        figures[name] = (
            f"mean {normal.mean():.3g}, deviation {normal.std():.3g}, {share:.1f} % beyond -1..1, largest {np.abs(normal).max():.3g}"
        )
    if seen.tokens:
        longest = int(np.argmax(seen.tokens))
        figures["prompt"] = f"{seen.tokens[longest]} of {limit} tokens: {seen.texts[longest]!r}"[:200]
        figures["prompts too long"] = f"{100 * float(np.mean(np.array(seen.tokens) > limit)):.1f} %"
        figures["tokens"] = " ".join(map(str, chain.tokenizer.tokenizer.encode(seen.texts[0], add_special_tokens=False)[:24]))
    return figures


def _bundle_findings(subject: Subject, seen: NetworkRows) -> tuple[list[Finding], dict[str, str]]:
    assert subject.path is not None
    if not answers.fits_in_memory(subject.path):
        text = "this machine has no memory for an inference of the policy: its answers and speed were not judged"
        return [Finding("note", "memory", text, "type it where it is served")], {}
    try:
        policy = bundle.load(subject.path, LoadOptions(threads=None, robot=subject.facts.get("robot")))
    except Pi0fmError as error:
        return [Finding.of("policy", error)], {}

    def infer(observation: Observation) -> ActionChunk:
        return policy.infer_batch([observation], [0])[0]

    usable = [number for number in range(len(seen.place)) if _fits_prompt(seen, number, subject.chain)]
    if not usable:
        return [], {}
    asked = [seen.observation(number) for number in usable]
    found, seconds = answers.answer_findings(infer, asked, subject.facts, seen.source.action, "the policy")
    gib = sum(parameter.numel() * parameter.element_size() for parameter in policy.model.parameters()) / 2**30
    figures = {"inference": f"{answers.spoken(seconds)} per chunk on {policy.device} ({machine.describe_machine()['processor']})"}
    return found, figures | {"weights in memory": f"{gib:.2f} GiB"}


def _fits_prompt(seen: NetworkRows, number: int, chain: Chain) -> bool:
    try:
        chain.check(seen.observation(number))
    except Pi0fmError:
        return False
    return True


def _connect(url: str) -> tuple[dict[str, Any], Any]:
    from pi0fm_client.client import RemotePolicy

    remote = RemotePolicy(url, connections=1, token=os.environ.get(TOKEN_VARIABLE))
    return dict(remote.metadata), remote


def _server_findings(
    url: str, facts: Mapping[str, Any], asked: Sequence[Observation], actions: NDArray[np.float32] | None
) -> tuple[list[Finding], dict[str, str]]:
    try:
        served, remote = _connect(url)
    except Pi0fmError as error:
        return [Finding.of("server", error)], {}
    try:
        found = [*answers.greeting_findings(url, facts, served)]
        if not asked or actions is None:
            return found, {}

        def infer(observation: Observation) -> ActionChunk:
            chunk: ActionChunk = remote.infer_batch([observation], [0])[0]
            return chunk

        more, seconds = answers.answer_findings(infer, asked, served, actions, "the server")
        return found + more, {"server": f"{answers.spoken(seconds)} per chunk, round trip"}
    finally:
        remote.close()
