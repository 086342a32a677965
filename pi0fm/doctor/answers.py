"""Checks of a policy's answers: weights that fit, finite and plausible actions, speed, a server of the same policy.

Owns: these checks. Does not know: the observations (doctor/batch.py), environments.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from pi0fm import machine
from pi0fm.doctor.finding import Finding
from pi0fm.policy.saved.bundle import open_weights
from pi0fm.policy.saved.manifest import CONFIG, WEIGHTS, read_json
from pi0fm.policy.saved.weights import refuse_wrong_weights
from pi0fm_client.errors import Pi0fmError
from pi0fm_client.types import ActionChunk, Observation

CALLS = 5
ROOM = 1.3  # memory of an inference, as a multiple of the weights' bytes
COMPARED = ("state_dim", "robot_action_dim", "action_horizon", "fps", "state_key")


def weight_findings(path: Path, model: Any) -> list[Finding]:
    """Check names, shapes and numbers of the weights, and the file's bytes against the manifest."""
    try:
        with open_weights(path) as weights:
            refuse_wrong_weights(weights, model)
            bad = [name for name in weights.shapes if not bool(weights.read(name, ()).isfinite().all())]
    except Pi0fmError as error:
        return [Finding.of("weights", error)]
    if not bad:
        return []
    text = f"weights must be finite, found NaN or infinity in {len(bad)} tensors, the first {bad[0]}"
    return [Finding("error", "weights", text, "take a checkpoint from before the loss broke")]


def fits_in_memory(path: Path) -> bool:
    """Tell whether an inference of the bundle fits in this machine's memory."""
    return ROOM * (path / WEIGHTS).stat().st_size < psutil.virtual_memory().available


def answer_findings(
    infer: Callable[[Observation], ActionChunk],
    asked: Sequence[Observation],
    facts: Mapping[str, Any],
    actions: NDArray[np.float32],
    who: str,
) -> tuple[list[Finding], list[float]]:
    """Infer CALLS times; return findings on the answers, and the seconds of each call. actions [n, A]: recorded ones.

    A speed is warned of where every call was too slow: other programs of this machine delay single ones by several times.
    """
    seconds, answers = [], []
    try:
        infer(asked[0])  # the first pays for warming up
        for each in islice(cycle(asked), CALLS):
            began = time.perf_counter()
            answers.append(np.asarray(infer(each).actions))
            seconds.append(time.perf_counter() - began)
    except Pi0fmError as error:
        return [Finding.of(who, error)], []
    found = []
    rows = np.concatenate(answers)
    if not np.isfinite(rows).all():
        return [Finding("error", who, f"{who} must answer finite actions, found NaN or infinity", "look at the training's loss")], seconds
    if rows.shape[1] == actions.shape[1]:
        low, high = actions.min(0), actions.max(0)
        span = np.maximum(high - low, 1e-6)
        beyond = np.maximum(low - rows.min(0), rows.max(0) - high) / span
        if (beyond > 1).any():
            dim = int(beyond.argmax())
            answered = f"{rows[:, dim].min():.3g} to {rows[:, dim].max():.3g}"
            text = f"{who} answers action {dim} from {answered}, recorded were {low[dim]:.3g} to {high[dim]:.3g}"
            found.append(Finding("warning", "answers", text, "train longer, or check that the policy has the statistics of this data set"))
    fps, horizon = float(facts.get("fps") or 0), int(facts.get("action_horizon") or len(answers[0]))
    if fps and max(seconds) * fps > horizon:
        text = f"{who} takes {spoken(seconds)} for a chunk of {1e3 * horizon / fps:.0f} ms"
        if min(seconds) * fps > horizon:
            advice = "type fewer --num_flow_steps, or take a faster device"
            found.append(Finding("warning", "speed", f"{text}: a robot would stand still in between", advice))
        else:
            found.append(Finding("note", "speed", f"{text}: some calls were too slow", "repeat it on a machine that does nothing else"))
    return found, seconds


def spoken(seconds: Sequence[float]) -> str:
    """Format `18.2 to 25.1 ms, median 19.0`."""
    if not seconds:
        return "unknown"
    return f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f} ms, median {1e3 * float(np.median(seconds)):.1f}"


def greeting_findings(url: str, facts: Mapping[str, Any], served: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare a server's greeting with the metadata of the policy that it should serve."""
    if facts.get("identity") and served.get("identity") and facts["identity"] != served["identity"]:
        text = f"{url} serves the bundle {str(served['identity'])[:12]}, this one is {str(facts['identity'])[:12]}"
        yield Finding("error", "server", text, "start pi0fm serve with this bundle, or swap it in")
    for name in COMPARED:
        if name in facts and name in served and facts[name] != served[name]:
            yield Finding("error", "server", f"{name} of {url} is {served[name]}, of this policy {facts[name]}", "serve this policy")
    if "cameras" in served and set(served["cameras"]) != set(facts.get("cameras") or served["cameras"]):
        text = f"{url} wants the cameras {', '.join(served['cameras'])}, this policy {', '.join(facts['cameras'])}"
        yield Finding("error", "server", text, "serve this policy")


def version_findings(path: Path) -> Iterator[Finding]:
    """Compare the versions that a bundle was written with against those installed here."""
    written = read_json(path / CONFIG).get("versions") or {}
    here = machine.describe_versions()
    other = [f"{name} {version}, here {here[name]}" for name, version in written.items() if here.get(name, version) != version]
    if other:
        yield Finding("note", "versions", f"the bundle was written with {'; '.join(other)}")
