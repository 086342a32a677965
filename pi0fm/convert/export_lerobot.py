"""The files that LeRobot 0.6.1 reads besides a policy's weights, written without LeRobot.

Owns: config.json, the two processors with their statistics, the tokenizer's folder. Does not know: weights.

    before   rename, batch, [newline, tokenizer, device, relative, normalise]     pi0
                            [relative, normalise, state prompt, tokenizer, device] pi0.5
    after    unnormalise, absolute, device
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pi0fm import files
from pi0fm.convert.config import ConvertConfig
from pi0fm.convert.export import kind_of, variants
from pi0fm.convert.lerobot import ACTION, EPSILON, STATE
from pi0fm.convert.stats import written_stats
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.prompt import BYTES, PromptTokenizer, load_tokenizer
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.progress import say
from pi0fm_client.errors import BundleError

PREFIX = "observation."
PALIGEMMA = "google/paligemma-3b-pt-224"
SAMPLE = "pick up the red block"
NORMALIZATION = {"z_score": "MEAN_STD", "quantile": "QUANTILES"}

Step = tuple[str, dict[str, Any]]


def write_lerobot(aside: Path, config: PolicyConfig, stats: NormStats, options: ConvertConfig, dtype: str) -> None:
    """Write all files except the weights into `aside`. Raises BundleError for a policy that LeRobot cannot express."""
    state_dim, action_dim = config.embodiment.dims()
    if config.embodiment.delta_actions and state_dim < action_dim:
        raise BundleError(
            f"LeRobot needs a state as wide as the {action_dim} actions for relative ones, found {state_dim}; such a policy stays a bundle"
        )
    place = config.tokenizer if config.tokenizer == BYTES else str(options.source / config.tokenizer)
    tokenizer = load_tokenizer(place, config.model.vocab_size)
    refuse_other_tokens(tokenizer, config.model.max_prompt_tokens)
    tokenizer.save_pretrained(aside / "tokenizer")
    own = str((options.output_dir / "tokenizer").resolve())
    name = options.tokenizer_name or (PALIGEMMA if config.model.vocab_size == 257_152 else own)
    say(f"LeRobot will look for the tokenizer at {name}")
    columns = columns_of(config.embodiment)
    _print_differences(config.embodiment, columns)
    epsilon = config.norm_epsilon or EPSILON
    tree, before, after = _configuration(config, columns, dtype, name, epsilon)
    files.write_json(aside / "config.json", tree)
    written = written_stats(stats, config, epsilon if config.normalization == "z_score" else 0.0)
    tensors = {
        f"{column}.{statistic}": array
        for column, group in ((STATE, written["state"]), (ACTION, written["action"]))
        for statistic, array in group.items()
    }
    _write_processor(aside, "policy_preprocessor", before, tensors)
    _write_processor(aside, "policy_postprocessor", after, tensors)


def refuse_other_tokens(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """Raise BundleError where LeRobot, which lets the tokenizer add special tokens, would get other ids than pi0fm."""
    ours, mask = PromptTokenizer(tokenizer, max_tokens)([SAMPLE], np.zeros((1, 1), dtype=np.float32))
    theirs = list(tokenizer(SAMPLE + "\n")["input_ids"])
    if ours[0][mask[0]].tolist() != theirs:
        raise BundleError(
            f"pi0fm puts <bos> before a prompt and nothing after it, this tokenizer gives LeRobot {theirs[:3]}...{theirs[-2:]}; "
            "its actions would differ there: use a tokenizer such as PaliGemma's"
        )


def columns_of(embodiment: Embodiment) -> dict[str, str]:
    """Return LeRobot's name of every column, since LeRobot passes a policy only columns that begin with `observation.`."""
    found: dict[str, str] = {}
    for camera, column in embodiment.cameras.items():
        name = column if column.startswith(PREFIX) else f"{PREFIX}images.{camera}"
        while name in found.values():
            name += "_"
        found[column] = name
    return {**found, embodiment.state: STATE}


def _print_differences(embodiment: Embodiment, columns: Mapping[str, str]) -> None:
    """Print the options that the user must type, since no file can set them in LeRobot."""
    renamed = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    unseen = {ours: theirs for ours, theirs in renamed.items() if not ours.startswith(PREFIX)}
    if unseen:
        listed = ", ".join(f"{ours} as {theirs}" for ours, theirs in unseen.items())
        say(f"LeRobot hands a policy only columns that begin with {PREFIX}: in its data sets and robots name {listed}")
    if renamed.keys() - unseen.keys():
        seen = {ours: theirs for ours, theirs in renamed.items() if ours not in unseen}
        say(f"lerobot-eval forgets a policy's renaming unless it is typed: --rename_map='{json.dumps(seen)}'")
    if embodiment.delta_actions:
        say(
            "LeRobot adds the state of every step to an action that was queued steps before: of a chunk of relative actions only the first "
            "is right there; type --policy.n_action_steps=1, or ask predict_action_chunk and postprocess the whole chunk"
        )


def _relative(config: PolicyConfig) -> dict[str, Any]:
    """Return LeRobot's options of relative actions, which exclude dimensions by words in their names."""
    delta = config.embodiment.delta_dims
    if not delta:
        return {"enabled": False, "exclude_joints": ["gripper"], "action_names": None}
    names = [f"{'relative' if dim in delta else 'absolute'}_{dim}" for dim in range(config.embodiment.dims()[1])]
    return {"enabled": True, "exclude_joints": ["absolute"], "action_names": names}


def _configuration(
    config: PolicyConfig, columns: Mapping[str, str], dtype: str, tokenizer_name: str, epsilon: float
) -> tuple[dict[str, Any], list[Step], list[Step]]:
    """Return config.json, and the steps before and after the policy."""
    model, relative, kind = config.model, _relative(config), kind_of(config.model)
    state_dim, action_dim = config.embodiment.dims()
    size, mode, state = model.vision.image_size, NORMALIZATION[config.normalization], config.embodiment.state
    inputs: dict[str, Any] = {
        **{columns[ours]: {"type": "VISUAL", "shape": [3, size, size]} for ours in config.embodiment.cameras.values()},
        STATE: {"type": "STATE", "shape": [state_dim]},
    }
    outputs = {ACTION: {"type": "ACTION", "shape": [action_dim]}}
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    tree = {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "device": None,
        "push_to_hub": False,
        **variants(model),
        "dtype": dtype,
        "chunk_size": model.action_horizon,
        "n_action_steps": config.execution_horizon,
        "max_state_dim": model.state_dim,
        "max_action_dim": model.action_dim,
        "num_inference_steps": config.flow.num_flow_steps,
        "use_relative_actions": relative["enabled"],
        "relative_exclude_joints": relative["exclude_joints"],
        "action_feature_names": relative["action_names"],
        "image_resolution": [size, size],
        "tokenizer_max_length": model.max_prompt_tokens,
        "normalization_mapping": modes,
    }
    renamed = {state: STATE} if state != STATE and state.startswith(PREFIX) else {}
    tokens = {"max_length": model.max_prompt_tokens, "task_key": "task", "padding_side": "right", "padding": "max_length"}
    text: list[Step] = [
        ("tokenizer_processor", tokens | {"truncation": True, "tokenizer_name": tokenizer_name}),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    numbers: list[Step] = [
        ("relative_actions_processor", relative),
        ("normalizer_processor", {"eps": epsilon, "features": {**inputs, **outputs}, "norm_map": modes}),
    ]
    before: list[Step] = [("rename_observations_processor", {"rename_map": renamed}), ("to_batch_processor", {})]
    if kind == "pi0":
        before += [("pi0_new_line_processor", {}), *text, *numbers]
    else:
        before += [*numbers, ("pi05_prepare_state_tokenizer_processor_step", {}), *text]
    after: list[Step] = [
        ("unnormalizer_processor", {"eps": epsilon, "features": outputs, "norm_map": modes}),
        ("absolute_actions_processor", {"enabled": relative["enabled"]}),
        text[1],
    ]
    return tree, before, after


def _write_processor(aside: Path, name: str, steps: list[Step], tensors: dict[str, NDArray[np.float32]]) -> None:
    entries: list[dict[str, Any]] = []
    for index, (registry, config) in enumerate(steps):
        entry: dict[str, Any] = {"registry_name": registry, "config": config}
        if registry in ("normalizer_processor", "unnormalizer_processor"):
            entry["state_file"] = f"{name}_step_{index}_{registry}.safetensors"
            files.write_bytes(aside / entry["state_file"], save(tensors))  # save_file would make it readable by the owner only
        entries.append(entry)
    files.write_json(aside / f"{name}.json", {"name": name, "steps": entries})
