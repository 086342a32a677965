"""`pi0fm eval --follow.run RUN`: evaluate each bundle that a run saves, on other workers, while it trains.

Owns: which bundle is next, the best one, when to ask the run to stop. Does not know: how a run trains, how episodes run.

    run      --bundle_every N --> RUN/bundles/step-N ... RUN/bundle              RUN/STOP --> a checkpoint, then the run ends
    here     RUN/bundles/step-N --evaluate--> RUN/evaluations/step-N --> RUN/best.json;  no better one in `patience` of them --> RUN/STOP

The same command continues after a kill: finished evaluations are read, an unfinished one continues from its journal.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from pi0fm import files, progress
from pi0fm.cluster.evaluation import evaluate_on_cluster
from pi0fm.eval.config import EvalConfig, FollowConfig
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.manifest import MANIFEST
from pi0fm.train.start.lease import is_held
from pi0fm_client.errors import ConfigError

SECONDS_BETWEEN_LOOKS, SECONDS_TO_START = 2.0, 120.0
BEST = "best.json"


def follow(config: FollowConfig, evaluate: Callable[[EvalConfig], Any] = evaluate_on_cluster) -> dict[str, Any]:
    """Evaluate until the run has ended and all its bundles are evaluated; returns the command's last line.

    Raises ConfigError for a folder without a run, and the errors of `evaluate`.
    """
    run, judged, asked = config.follow.run, dict[int, dict[str, Any]](), False
    _wait_for_run(run)
    while True:
        alive = is_held(run)  # read before listing the bundles, or a run's last one could be missed
        left = {steps: path for steps, path in bundles(run).items() if steps not in judged}
        for steps, path in sorted(left.items()):
            judged[steps] = _evaluate_bundle(config, steps, path, evaluate)
            best = max(judged, key=lambda each: (judged[each]["mean_success"] or 0.0, -each))
            files.write_json(run / BEST, judged[best])
            since = sum(each > best for each in judged)
            progress.say(f"step {steps}: mean success {judged[steps]['mean_success']}; the best is step {best}")
            if config.follow.keep == "best":
                _remove_others(run, judged, best, newest=max(judged))
            if config.follow.patience and since >= config.follow.patience and alive and not asked:
                asked = True
                files.write_text(run / "STOP", "")
                progress.say(f"no better one in {since} evaluations: {run} was asked to stop")
        if not alive and not left:
            break
        if not left:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if not judged:
        raise ConfigError(f"{run} ended without a bundle; train with --bundle_every N, or to the end")
    best = max(judged, key=lambda each: (judged[each]["mean_success"] or 0.0, -each))
    return {"best": judged[best], "evaluations": [judged[steps] for steps in sorted(judged)], "asked_to_stop": asked}


def _wait_for_run(run: Path) -> None:
    """Wait for a run that may be starting. Raises ConfigError if none starts."""
    until, said = time.monotonic() + SECONDS_TO_START, False
    while not (run.is_dir() and (is_held(run) or (run / "run.json").is_file() or bundles(run))):
        if not said:
            progress.say(f"no run in {run} yet: waiting {SECONDS_TO_START:.0f} s for one to begin")
            said = True
        if time.monotonic() > until:
            raise ConfigError(f"--follow.run must be the output_dir of pi0fm train, found no run in {run}; start one with --bundle_every N")
        time.sleep(min(SECONDS_BETWEEN_LOOKS, SECONDS_TO_START))


def bundles(run: Path) -> dict[int, Path]:
    """Complete bundles of a run by number of steps; for its last step the final bundle."""
    found = {int(path.parent.name.removeprefix("step-")): path.parent for path in sorted(run.glob(f"bundles/step-*/{MANIFEST}"))}
    end = run / "bundle"
    if (end / MANIFEST).is_file():
        found[int(bundle.read(end)[0].training.get("steps", 0))] = end
    return found


def _evaluate_bundle(config: FollowConfig, steps: int, path: Path, evaluate: Callable[[EvalConfig], Any]) -> dict[str, Any]:
    """Row of a bundle, from its finished evaluation or from a new one."""
    output = Path(config.output_dir or config.follow.run / "evaluations") / f"step-{steps:09d}"
    if not (output / "summary.json").is_file():
        given = {field.name: getattr(config, field.name) for field in fields(EvalConfig)}
        evaluate(EvalConfig(**given | {"policy": str(path), "output_dir": str(output)}))
    summary = json.loads((output / "summary.json").read_text())
    return {"steps": steps, "bundle": str(path), "evaluation": str(output)} | {
        name: summary[name] for name in ("mean_success", "mean_interval", "episodes", "crashes")
    }


def _remove_others(run: Path, judged: dict[int, dict[str, Any]], best: int, newest: int) -> None:
    """Remove the evaluated bundles in RUN/bundles that are neither the best nor the newest."""
    for steps in judged:
        path = run / f"bundles/step-{steps:09d}"
        if steps not in (best, newest) and path.is_dir():
            shutil.rmtree(path)
