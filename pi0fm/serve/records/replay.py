"""`pi0fm replay`: infer a log of requests again, in its batches and by its seeds, and compare a second bundle on the same requests.

Owns: the order of passes, the figures. Does not know: how a log is written (request_log.py), the network.

    identical            answers that are the log's, bit for bit: the same bundle, machine, versions and number of threads give all of them
    largest_difference   to the log's answers, robot units; differs: facts that have changed since the log was written
    other                the second bundle against the first: root mean square of each action dimension, robot units
    another_seed         the first bundle against itself with other noise: the size of a difference without a meaning
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm import machine, progress
from pi0fm.policy.load_options import LoadOptions
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.saved import bundle
from pi0fm.serve.batcher import infer
from pi0fm.serve.records.config import ReplayConfig
from pi0fm.serve.records.request_log import read
from pi0fm.serve.served import refuse_another_robot
from pi0fm_client.errors import BundleError, ConfigError, ServingError

WORST = 5  # requests that are named


def replay(options: ReplayConfig) -> dict[str, Any]:
    """Return the figures. Raises ServingError for a log without requests or of another robot, BundleError for a bundle that is gone."""
    known: Mapping[str, Any] | None = None
    logged: list[NDArray[np.float32]] = []
    at: list[float] = []
    total, left_out, damaged = 0, 0, list[str]()
    if options.other is not None:
        bundle.read(options.other)  # a wrong path is named now, not behind the first bundle's passes
    for batch in read(options.log, damaged):
        known = batch.description if known is None else known
        if batch.description["identity"] != known["identity"]:
            left_out += 1
        elif total < (options.most or math.inf):
            total += 1
            logged += batch.actions
            at += [batch.at] * len(batch.actions)
    if known is None:
        raise ServingError(f"{options.log} holds no whole batch: ask the server that writes it, or let it end")
    for line in damaged:
        progress.say(line)
    identity = known["identity"]

    def again(name: str, policy: LocalPolicy, shift: int = 0) -> NDArray[np.float32]:
        """Return [requests, H, A], inferred in the log's batches by its seeds + `shift`."""
        found: list[NDArray[np.float32]] = []
        with progress.step(name, total) as step:
            alike = (batch for batch in read(options.log) if batch.description["identity"] == identity)
            for batch in islice(alike, total):
                seeds = [(seed + shift) % 2**63 for seed in batch.seeds]
                found += [chunk.actions for chunk in infer(policy, batch.requests, seeds)]
                step.advance()
        return np.stack(found)

    policy = _opened(options.bundle or Path(known["bundle"]), options, known)
    first, recorded = again("first bundle", policy), np.stack(logged)
    if first.shape != recorded.shape:
        raise ServingError(
            f"the log's answers are {list(recorded.shape[1:])}, the bundle's {list(first.shape[1:])}: give the log's --bundle"
        )
    here = {"identity": policy.metadata.get("identity"), **_here(policy)}
    figures: dict[str, Any] = {
        "requests": len(recorded),
        "batches": total,
        "batches_of_other_bundles": left_out,
        "damaged": damaged,
        "identical": int((first.view(np.uint32) == recorded.view(np.uint32)).reshape(len(recorded), -1).all(axis=1).sum()),
        "largest_difference": float(np.abs(first - recorded).max()),
        "identity": {"log": identity, "first": here["identity"]},
        "differs": [name for name, now in here.items() if known.get(name) != now],
    }
    if options.other is not None:
        another_seed, metadata = again("first bundle, another seed", policy, 1), policy.metadata
        del policy  # two bundles of billions of weights need not fit together
        second_policy = _opened(options.other, options, known)
        refuse_another_robot(second_policy.metadata, metadata)
        figures["identity"]["other"] = second_policy.metadata.get("identity")
        figures |= _compared(first, again("other bundle", second_policy), another_seed, at)
    return figures


def describe(policy: LocalPolicy, path: Path, load: LoadOptions) -> dict[str, Any]:
    """Describe a policy for a log, so that it can be opened again as it was."""
    return {"bundle": str(path.resolve()), "guidance": policy.guidance, "load": vars(load) | _threads(), **_here(policy)}


def _here(policy: LocalPolicy) -> dict[str, Any]:
    """Name the facts that the rounding of an answer depends on."""
    facts = machine.describe_machine()
    return {"device": str(policy.device), "processor": facts["processor"], "versions": machine.describe_versions(), **_threads()}


def _threads() -> dict[str, int]:
    import torch

    return {"threads": torch.get_num_threads()}


def _opened(path: Path, options: ReplayConfig, known: Mapping[str, Any]) -> LocalPolicy:
    own = {name: value for name, value in (("device", options.device), ("threads", options.threads)) if value is not None}
    if not path.exists():
        raise BundleError(f"the log's bundle is gone from {path}: give --bundle")
    try:
        load = LoadOptions(**{**known["load"], **own})
    except TypeError:
        version = known.get("versions", {}).get("pi0fm", "another version")
        raise ConfigError(f"the log is of pi0fm {version}, whose options this one does not know: replay it with that one") from None
    return bundle.load(path, load, guidance=known["guidance"])


def _compared(
    first: NDArray[np.float32], second: NDArray[np.float32], another_seed: NDArray[np.float32], at: list[float]
) -> dict[str, Any]:
    def per_dimension(difference: NDArray[np.float32]) -> list[float]:
        return [float(value) for value in np.sqrt((difference.astype(np.float64) ** 2).mean(axis=(0, 1)))]

    largest = np.abs(second - first).reshape(len(first), -1).max(axis=1)
    worst = [
        {"request": int(row), "at": datetime.fromtimestamp(at[row], UTC).isoformat(), "largest_difference": float(largest[row])}
        for row in np.argsort(-largest)[:WORST]
    ]
    return {"other": per_dimension(second - first), "another_seed": per_dimension(another_seed - first), "worst": worst}
