"""Reading a directory written by LeRobot's `save_pretrained`, without LeRobot.

Owns: config.json, policy_preprocessor.json, policy_postprocessor.json and their statistics, as LeRobot 0.6.1 writes them.
Does not know: weights, the export (convert/export_lerobot).

    config.json                type pi0 or pi05, features, horizons, normalisation modes
    policy_preprocessor.json   steps: rename, (newline), tokenizer, relative actions, normalizer -> its state_file
    policy_postprocessor.json  steps: unnormalizer -> its state_file
    *.safetensors              `observation.state.mean`, `action.q99`, ...
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pi0fm.convert.facts import NORMALIZATION, ForeignFacts
from pi0fm.convert.names import Kind
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.prompt import LEROBOT
from pi0fm.policy.saved.manifest import read_json
from pi0fm.policy.saved.weights import damaged_error
from pi0fm_client.errors import BundleError

STATE, ACTION = "observation.state", "action"
EPSILON = 1e-8  # LeRobot's default
MODES = {"MEAN_STD": "z_score", "QUANTILES": "quantile"}
# Values for which our network computes the same; LeRobot's defaults for absent keys.
FIXED: dict[str, Any] = {"n_obs_steps": 1, "min_period": 4e-3, "max_period": 4.0, "use_peft": False}
KINDS: dict[str, Kind] = {"pi0": "pi0", "pi05": "pi05"}


def is_lerobot(path: Path) -> bool:
    """Whether config.json is that of a LeRobot policy."""
    return (path / "config.json").is_file() and "type" in read_json(path / "config.json")


def read_lerobot(path: Path) -> ForeignFacts:
    """Read the directory's facts. Raises BundleError for a fact that pi0fm cannot honour, or that contradicts another."""
    try:
        return _facts(path, read_json(path / "config.json"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BundleError(
            f"{path} is not as LeRobot 0.6.1 writes it ({type(error).__name__}: {error}); save it with that version"
        ) from None


def _facts(path: Path, config: Mapping[str, Any]) -> ForeignFacts:
    if config["type"] not in KINDS:
        raise BundleError(
            f"{path} must hold a LeRobot policy of type pi0 or pi05, found {config['type']!r}; other policies cannot be converted"
        )
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise BundleError(f"{path / 'config.json'}: {key} must be {value}, found {config[key]!r}; pi0fm has no such policy")
    pre = _steps(path, "policy_preprocessor.json")
    post = _steps(path, "policy_postprocessor.json")
    columns = _columns(path, pre, post)
    tokenizer = pre.get("tokenizer_processor", {}).get("config", {}).get("tokenizer_name")
    resolution = config.get("image_resolution", [224, 224])
    kind, normalization = KINDS[config["type"]], _normalization(path, config)
    # LeRobot adds eps to a standard deviation, but replaces a quantile range of 0 by it
    epsilon = float(pre.get("normalizer_processor", {}).get("config", {}).get("eps", EPSILON))
    quantiles = (normalization or NORMALIZATION[kind]) == "quantile"
    return ForeignFacts(
        peer="lerobot",
        where=str(path),
        kind=kind,
        embodiment=_embodiment(path, config, pre),
        columns=columns,
        normalization=normalization,
        norm_floor=epsilon / 2 if quantiles else 0.0,
        norm_epsilon=0.0 if quantiles else epsilon,
        resize="plain",
        tokenizer=tokenizer,
        prompt_dialect=LEROBOT,
        action_horizon=int(config.get("chunk_size", 50)),
        execution_horizon=int(config.get("n_action_steps", 50)),
        max_prompt_tokens=int(config.get("tokenizer_max_length", 48 if config["type"] == "pi0" else 200)),
        num_flow_steps=int(config.get("num_inference_steps", 10)),
        state_dim=int(config.get("max_state_dim", 32)),
        image_size=int(resolution[0]),
        ties_embedding=False,
    )


def _embodiment(path: Path, config: Mapping[str, Any], pre: Mapping[str, Any]) -> Embodiment:
    """Return the robot with the column names of its data, undoing LeRobot's rename step."""
    inputs, outputs = config.get("input_features") or {}, config.get("output_features") or {}
    original = {new: old for old, new in pre.get("rename_observations_processor", {}).get("config", {}).get("rename_map", {}).items()}
    cameras = {
        key.rsplit(".", 1)[-1]: original.get(key, key)
        for key, feature in inputs.items()
        # an empty camera is padding, always masked
        if feature.get("type") == "VISUAL" and ".empty_camera_" not in key
    }
    state_dim, action_dim = _width(inputs.get(STATE)), _width(outputs.get(ACTION))
    relative = pre.get("relative_actions_processor", {}).get("config", {})
    delta: tuple[int, ...] = ()
    if relative.get("enabled", config.get("use_relative_actions", False)):
        if action_dim is None:
            raise BundleError(f"{path / 'config.json'} must give the width of {ACTION} for relative actions; add it to output_features")
        delta = _relative_dims(relative.get("action_names"), relative.get("exclude_joints") or [], action_dim)
    return Embodiment(
        cameras=cameras,
        state=original.get(STATE, STATE),
        action=ACTION,
        state_dim=state_dim,
        robot_action_dim=action_dim,
        delta_actions=delta,
    )


def _relative_dims(names: list[str] | None, excluded: list[str], width: int) -> tuple[int, ...]:
    """Return every dimension without an excluded word in its name, as LeRobot does; all dimensions if there are no names."""
    if not names:
        return tuple(range(width))
    words = [word.lower() for word in excluded if word]
    kept = [not any(word in str(name).lower() for word in words) for name in names[:width]]
    return tuple(dim for dim, relative in enumerate(kept + [True] * (width - len(kept))) if relative)


def _width(feature: Mapping[str, Any] | None) -> int | None:
    return int(feature["shape"][0]) if feature else None


def _normalization(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return the normalisation of state and action; None where config.json leaves it to LeRobot's default."""
    mapping = config.get("normalization_mapping")
    if mapping is None:
        return None
    modes = {mapping.get("STATE"), mapping.get("ACTION")}
    if len(modes) != 1 or not modes <= MODES.keys() or mapping.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise BundleError(
            f"{path / 'config.json'}: STATE and ACTION must both be MEAN_STD or both QUANTILES and VISUAL IDENTITY, found {mapping}; "
            "retrain with one of them"
        )
    return MODES[modes.pop()]


def _steps(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the steps of a processor file by registry name; none without the file."""
    if not (path / name).is_file():
        return {}
    steps = read_json(path / name).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise BundleError(f"{path / name} must hold a list of steps; copy it again")
    return {str(step.get("registry_name", step.get("class"))): step for step in steps}


def _columns(path: Path, pre: Mapping[str, Any], post: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Return the statistics of state and action; both files hold the action's, and must agree."""
    found = _state(path, pre.get("normalizer_processor", {}))
    back = _state(path, post.get("unnormalizer_processor", {}))
    for statistic, value in back.get(ACTION, {}).items():
        if ACTION in found and not np.array_equal(found[ACTION].get(statistic, value), value):
            raise BundleError(f"{path}: {ACTION}.{statistic} differs between policy_preprocessor and policy_postprocessor; save both again")
    columns = {name: group for name, group in (back | found).items() if name in (STATE, ACTION)}
    return columns or None


def _state(path: Path, step: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    name = step.get("state_file")
    if name is None:
        return {}
    file = path / str(name)
    if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
        raise BundleError(f"{path} lacks {name}, the statistics that its processor names; copy it again, all files")
    try:
        arrays = load_file(file)
    except (SafetensorError, OSError) as error:
        raise damaged_error(file, error) from None
    columns: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        column, statistic = key.rsplit(".", 1)
        columns.setdefault(column, {})[statistic] = array
    return columns
