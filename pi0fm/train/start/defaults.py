"""Defaults for the options not given: from the run's record, from the bundle that it starts from, or from its preset's file.

Owns: which of the three applies, before options are decoded. Does not know: the meaning of an option.

    --resume true in a folder with a run.json    that run's options
    --pretrained BUNDLE                          its network, tokenizer, prompt dialect, normalisation, path and prediction of the flow
    model.preset tiny, which is the default      configs/tiny.yaml
"""

import json
from pathlib import Path
from typing import Any

from pi0fm import options
from pi0fm.policy.saved.manifest import CONFIG, check_files, read_json
from pi0fm.train.components import FIXED_IN_FLOW, OWN
from pi0fm.train.config import TrainConfig
from pi0fm_client.errors import OutputError

TYPED_EACH_TIME = ("resume", "resume_changed")  # given with each command, not taken from the record


def defaults(given: options.Tree) -> options.Tree:
    """Return defaults for the options not given. Raises BundleError for a damaged bundle, OutputError for an unreadable record."""
    record = Path(given.get("output_dir", TrainConfig.output_dir)).expanduser() / "run.json"
    if str(given.get("resume")).lower() in ("true", "auto") and record.is_file():
        return _recorded(record)
    if given.get("pretrained"):  # a missing bundle is reported when it is opened; a run can be planned without it
        path = Path(given["pretrained"]).expanduser()
        return _of_bundle(path, given) if path.is_dir() else {}
    network = given.get("model", {})
    return options.read_files(["tiny"]) if isinstance(network, dict) and network.get("preset", "tiny") == "tiny" else {}


def _recorded(record: Path) -> options.Tree:
    try:
        found: Any = json.loads(record.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{record} is not readable ({error}); choose another --output_dir") from None
    return {name: value for name, value in found.items() if name not in TYPED_EACH_TIME} if isinstance(found, dict) else {}


def _of_bundle(path: Path, given: options.Tree) -> options.Tree:
    check_files(path)
    policy = read_json(path / CONFIG).get("policy")
    if not isinstance(policy, dict) or not isinstance(policy.get("model"), dict):
        return {}  # a damaged bundle is reported when it is opened
    flow = {name: value for name, value in (policy.get("flow") or {}).items() if name in FIXED_IN_FLOW}
    normalization = {name: policy[name] for name in ("normalization",) if name in policy}
    fixed = {"tokenizer": OWN, "prompt_dialect": OWN, "flow": flow, **normalization}
    return fixed | ({} if "preset" in given.get("model", {}) else {"model": policy["model"]})
