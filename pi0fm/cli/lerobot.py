"""LeRobot's options translated to pi0fm's: each is taken, ignored with its reason, or refused with what to type instead.

Owns: the tables of `pi0fm train`, `eval` and `serve`. Does not know: how options are parsed. docs/from_lerobot.md is printed from these
tables by `python -m pi0fm.cli.lerobot`; tests/docs/test_from_lerobot.py checks that they cover every field of LeRobot's configurations.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from pi0fm import progress
from pi0fm_client.errors import ConfigError

Given = Mapping[str, Any]
SAME = ("steps", "seed", "output_dir", "resume", "dataset.repo_id", "dataset.root", "dataset.episodes")
"""Options with the same name and the same meaning in both."""
OTHERS = {"num_workers": "LeRobot's are processes that load data; pi0fm's are Ray workers that train, and threads load data"}
"""Options with the same name and different meanings: pi0fm's is taken."""


@final
@dataclass(frozen=True)
class TakenOption:
    """LeRobot option that sets our option `to`. value: function of its value and all options given, or mapping, to our value."""

    to: str
    value: Callable[[Any, Given], Any] | Mapping[Any, Any] | None = None
    note: str = ""

    def options(self, name: str, value: Any, given: Given) -> dict[str, Any]:
        """Return our options by dotted name. Raises ConfigError for a value without a counterpart."""
        if self.value is None:
            return {self.to: value}
        if callable(self.value):
            found = self.value(value, given)
        elif value in self.value:
            found = self.value[value]
        else:
            known = [_yaml(each) for each in self.value]
            raise ConfigError(
                f"LeRobot's --{name} has a counterpart for {', '.join(known)}, found {_yaml(value)}; type --{name} {known[0]}"
            )
        return {} if found is None else {self.to: found}


@final
@dataclass(frozen=True)
class IgnoredOption:
    """LeRobot option that changes nothing here. only: the values for which that holds; instead: what to type for others."""

    why: str
    only: tuple[Any, ...] = ()
    instead: str = ""

    def options(self, name: str, value: Any, given: Given) -> dict[str, Any]:
        """Return no options, and print the reason. Raises ConfigError for a value that would change something."""
        del given
        if self.only and value not in self.only:
            raise ConfigError(f"LeRobot's --{name} {_yaml(value)} has no counterpart: {self.instead}")
        progress.say(f"--{name} is ignored: {self.why}")
        return {}


@final
@dataclass(frozen=True)
class RefusedOption:
    """LeRobot option without a counterpart that would change something. instead: what to type."""

    instead: str

    def options(self, name: str, value: Any, given: Given) -> dict[str, Any]:
        """Raise ConfigError, always."""
        del value, given
        raise ConfigError(f"LeRobot's --{name} has no counterpart: {self.instead}")


def _yaml(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)


def _flag(word: str) -> dict[Any, Any]:
    """Map true to `word`, and false to no option."""
    return {True: word, False: None}


def _final_ratio(value: Any, given: Given) -> float:
    """Convert LeRobot's final learning rate to pi0fm's ratio of it to the peak."""
    peak = next((given[name] for name in PEAKS if name in given), 2.5e-5)
    return float(value) / float(peak)


def _cameras(value: Any, given: Given) -> dict[str, str]:
    """Convert {column of the data set: column for the policy} to {camera of the policy: column of the data set}."""
    del given
    pictures = "observation.images."
    if not isinstance(value, Mapping) or not all(str(new).startswith(pictures) for new in value.values()):
        raise ConfigError(
            f"rename_map renames pictures, {{observation.images.front: observation.images.base_0_rgb}}, found {value!r}; "
            "for other columns type --embodiment.state COLUMN, --embodiment.action COLUMN"
        )
    return {str(new).removeprefix(pictures): str(old) for old, new in value.items()}


def _device(value: Any, given: Given) -> str | None:
    """Convert a device of torch to pi0fm's: every process takes the first GPU that it may see."""
    del given
    if value in ("cpu", "cuda", None):
        return None if value is None else str(value)
    kind, _, number = str(value).partition(":")
    if kind != "cuda" or not number.isdigit():
        raise ConfigError(f"pi0fm trains on GPUs with CUDA and on CPUs, found --policy.device {value}; leave it out, or type cpu")
    if int(number):
        raise ConfigError(
            f"a process takes the first GPU that it may see, found --policy.device {value}; type CUDA_VISIBLE_DEVICES={number} in front "
            "of the command, and --policy.device cuda"
        )
    return kind


def _job_folder(value: Any, given: Given) -> str | None:
    """Return the folder of a run that has a name and no folder."""
    return None if "output_dir" in given or "config_path" in given else f"outputs/{value}"


def _run_of_file(value: Any, given: Given) -> str:
    """Return the folder of the run that LeRobot's --config_path names, to be resumed."""
    path = Path(str(value))
    if str(given.get("resume")).lower() not in ("true", "auto"):
        raise ConfigError(
            f"a file of options stands first and is YAML, with pi0fm's words or LeRobot's, found {path}; type pi0fm train FILE.yaml"
        )
    run = next((folder for folder in (path, *path.parents) if (folder / "run.json").is_file()), None)
    if run is None:
        folder = str(path).partition("/checkpoints/")[0] if "/checkpoints/" in str(path) else "RUN"
        raise ConfigError(
            f"--config_path names a run of pi0fm to resume, found {path}, which is below none; type --output_dir {folder} --resume true, "
            "or convert LeRobot's weights with pi0fm convert and start from them with --pretrained BUNDLE"
        )
    return str(run)


PEAKS = ("optimizer.learning_rate", "policy.optimizer_lr", "optimizer.lr", "scheduler.peak_lr")
HUB = IgnoredOption("nothing is uploaded", (False, None), "leave it out, then `hf upload REPO OUTPUT_DIR/bundle`")
LOADER = IgnoredOption("decoded pictures are kept on the disk, and threads of the one process read them")
NO_HUB_NAME = IgnoredOption("it names an upload, and nothing is uploaded")
RELATIVE = "type --embodiment.delta_actions pan,lift or 0,1"
SIMULATOR = RefusedOption("evaluate the bundle with `pi0fm eval BUNDLE --tasks ...`")
WHILE_IT_TRAINS = IgnoredOption("`pi0fm eval --follow.run OUTPUT_DIR` evaluates while a run trains with --bundle_every N")
DTYPE = TakenOption("precision", {"float32": "float32", "bfloat16": "bfloat16"}, "weights and moments are float32 in both")
ADAMW_EPSILON = IgnoredOption("it is 1e-8 here too", (1e-8, "1e-8", "1e-08"), "leave it out")
COMPILE = TakenOption("compile", note="each layer; pi0fm serve takes off, kernels and graph")

TRAIN: dict[str, str | TakenOption | IgnoredOption | RefusedOption] = {
    "batch_size": TakenOption("global_batch_size", note="over all workers together; LeRobot's is per process"),
    "log_freq": "log_every",
    "save_freq": "checkpoint_every",
    "save_checkpoint": IgnoredOption("a run can always be resumed", (True,), "--checkpoint_every N with a large N writes few"),
    "save_checkpoint_to_hub": HUB,
    "eval_steps": TakenOption("validation.every", note="with --validation.episodes N"),
    "max_eval_samples": TakenOption("validation.samples", lambda value, _: value or None),
    "dataset.eval_split": IgnoredOption("nothing is held out", (0, 0.0, None), "hold out episodes by number, --validation.episodes N"),
    "env_eval_freq": WHILE_IT_TRAINS,
    "eval_freq": WHILE_IT_TRAINS,
    "config_path": TakenOption("output_dir", _run_of_file, "with --resume true: the run that the file is in"),
    "tolerance_s": "dataset.tolerance_s",
    "rename_map": TakenOption("embodiment.cameras", _cameras, "camera of the policy -> column of the data set"),
    "job_name": TakenOption("output_dir", _job_folder, "outputs/JOB_NAME, where none is given"),
    "cudnn_deterministic": IgnoredOption("no convolution of the network has a choice that matters"),
    "prefetch_factor": LOADER,
    "persistent_workers": LOADER,
    "dataloader_multiprocessing_context": LOADER,
    "use_policy_training_preset": IgnoredOption("every option of the optimiser can be set"),
    "checkpoint_path": RefusedOption("--resume true continues from the newest checkpoint in --output_dir"),
    "dataset.repo_type": IgnoredOption("data sets are read from files", ("dataset", None), "leave it out"),
    "dataset.revision": RefusedOption("fetch it with `hf download REPO --repo-type dataset --revision R`, then type --dataset.root DIR"),
    "dataset.image_transforms.enable": "augment",
    "dataset.image_transforms": RefusedOption("type --augmentation.crop, .rotation, .brightness, ... for the strength of each change"),
    "dataset.use_imagenet_stats": IgnoredOption("pictures are scaled to [-1, 1], as released weights expect"),
    "dataset.video_backend": TakenOption("dataset.video_decoder", {"pyav": "pyav", "torchcodec": "torchcodec", None: None}),
    "dataset.return_uint8": IgnoredOption("pictures are bytes until they are on the device"),
    "dataset.depth_output_unit": IgnoredOption("depth is not read"),
    "dataset.streaming": TakenOption("dataset.cache_limit_gib", _flag("0"), "read from the videos, never kept decoded"),
    "policy.type": TakenOption("model.preset", {"pi0": "pi0", "pi05": "pi05", "tiny": "tiny"}),
    "policy.path": "pretrained",
    "policy.pretrained_path": "pretrained",
    "policy.pretrained_revision": RefusedOption("fetch that revision with `hf download`, then `pi0fm convert FOLDER`"),
    "policy.device": TakenOption("device", _device, "cpu, or cuda; for cuda:1 set CUDA_VISIBLE_DEVICES=1"),
    "policy.dtype": DTYPE,
    "policy.use_amp": TakenOption("precision", {True: "bfloat16", False: None}),
    "policy.use_peft": TakenOption("lora.rank", {True: 16, False: None}, "LeRobot's default rank; --peft.r sets another"),
    "policy.chunk_size": "model.action_horizon",
    "policy.n_action_steps": "execution_horizon",
    "policy.n_obs_steps": IgnoredOption("a policy sees one observation", (1,), "pi0 has no history"),
    "policy.max_state_dim": "model.state_dim",
    "policy.max_action_dim": "model.action_dim",
    "policy.tokenizer_max_length": "model.max_prompt_tokens",
    "policy.num_inference_steps": "flow.num_flow_steps",
    "policy.image_resolution": TakenOption("model.vision.image_size", lambda value, _: _side(value), "square pictures"),
    "policy.empty_cameras": IgnoredOption("a missing camera is masked, at any position"),
    "policy.input_features": RefusedOption("--embodiment.cameras.NAME COLUMN and --embodiment.state COLUMN choose columns"),
    "policy.output_features": RefusedOption("--embodiment.action COLUMN chooses the column"),
    "policy.normalization_mapping": RefusedOption("type --normalization z_score, or quantile"),
    "policy.use_relative_actions": IgnoredOption("actions stay absolute", (False,), RELATIVE),
    "policy.relative_exclude_joints": RefusedOption(RELATIVE),
    "policy.action_feature_names": IgnoredOption("names are read from the data set"),
    "policy.rtc_config": RefusedOption("train with --rtc.max_delay N, or serve with --guidance guided"),
    "policy.paligemma_variant": IgnoredOption("it is the preset's", ("gemma_2b",), "change sizes with --model.decoder.*"),
    "policy.action_expert_variant": IgnoredOption("it is the preset's", ("gemma_300m",), "change sizes with --model.decoder.*"),
    "policy.time_sampling_beta_alpha": IgnoredOption("time_density pi0 has it", (1.5,), "--flow.time_density names other densities"),
    "policy.time_sampling_beta_beta": IgnoredOption("time_density pi0 has it", (1, 1.0), "--flow.time_density names other densities"),
    "policy.time_sampling_scale": IgnoredOption("time_density pi0 has it", (0.999,), "--flow.time_density names other densities"),
    "policy.time_sampling_offset": IgnoredOption("time_density pi0 has it", (0.001,), "--flow.time_density names other densities"),
    "policy.min_period": IgnoredOption("it is the network's", (0.004, 4e-3, "4e-3"), "it is fixed, as in released weights"),
    "policy.max_period": IgnoredOption("it is the network's", (4, 4.0), "it is fixed, as in released weights"),
    "policy.gradient_checkpointing": TakenOption(
        "activation_checkpointing", {True: "full", False: "none"}, "`selective` is between the two"
    ),
    "policy.compile_model": COMPILE,
    "policy.compile_mode": IgnoredOption("layers are compiled in one way"),
    "policy.freeze_vision_encoder": TakenOption(
        "train_only", lambda value, given: "frozen_vision" if value and not given.get("policy.train_expert_only") else None
    ),
    "policy.train_expert_only": TakenOption("train_only", _flag("expert_only")),
    "policy.optimizer_lr": "optimizer.learning_rate",
    "policy.optimizer_betas": TakenOption("optimizer", lambda value, _: _betas(value), "both as one list"),
    "policy.optimizer_eps": ADAMW_EPSILON,
    "policy.optimizer_weight_decay": "optimizer.weight_decay",
    "policy.optimizer_grad_clip_norm": "optimizer.clip_norm",
    "policy.scheduler_warmup_steps": "optimizer.warmup_steps",
    "policy.scheduler_decay_steps": "optimizer.decay_steps",
    "policy.scheduler_decay_lr": TakenOption("optimizer.final_learning_rate_ratio", _final_ratio, "over the peak"),
    "optimizer.type": IgnoredOption("it is AdamW", ("adamw",), "leave it out"),
    "optimizer.lr": "optimizer.learning_rate",
    "optimizer.betas": TakenOption("optimizer", lambda value, _: _betas(value), "both as one list"),
    "optimizer.eps": ADAMW_EPSILON,
    "optimizer.grad_clip_norm": "optimizer.clip_norm",
    "scheduler.type": IgnoredOption("it is the cosine", ("cosine_decay_with_warmup",), "leave it out"),
    "scheduler.num_warmup_steps": "optimizer.warmup_steps",
    "scheduler.num_decay_steps": "optimizer.decay_steps",
    "scheduler.peak_lr": "optimizer.learning_rate",
    "scheduler.decay_lr": TakenOption("optimizer.final_learning_rate_ratio", _final_ratio, "over the peak"),
    "policy.push_to_hub": HUB,
    "policy.repo_id": NO_HUB_NAME,
    "policy.private": NO_HUB_NAME,
    "policy.tags": NO_HUB_NAME,
    "policy.license": NO_HUB_NAME,
    "peft.r": "lora.rank",
    "peft.lora_alpha": "lora.alpha",
    "peft.method_type": IgnoredOption("it is LoRA", ("LORA", "lora"), "leave it out"),
    "peft.init_type": IgnoredOption("adapters begin at 0", (None,), "leave it out"),
    "peft.target_modules": RefusedOption("type --lora.targets backbone,action_expert, or names of this network's layers"),
    "peft.full_training_modules": RefusedOption("parts of the network without an adapter train whole, as --train_only sets"),
    "wandb.enable": TakenOption("tracker", _flag("wandb"), "the run has output_dir's name"),
    "wandb.project": "tracker_project",
    "wandb.mode": IgnoredOption("it is wandb's usual one", ("online", None), "type WANDB_MODE=offline in front of the command"),
    "wandb.entity": IgnoredOption("it is wandb's usual one", (None,), "type WANDB_ENTITY=NAME in front of the command"),
    "wandb": IgnoredOption("--tracker wandb names the run, and uploads metrics alone"),
    "env": SIMULATOR,
    "eval": SIMULATOR,
    "job": RefusedOption("docs/scaling.md and deploy/ explain how to run on other machines"),
    "reward_model": RefusedOption("pi0fm trains no reward model"),
    "sample_weighting": RefusedOption("a mixture's entries have weights: --mixture.NAME.weight"),
}
"""`lerobot-train`'s options, without those of SAME. A policy's path is a bundle's; `pi0fm convert` makes one of LeRobot's weights."""

EVAL: dict[str, str | TakenOption | IgnoredOption | RefusedOption] = {
    "policy.path": "policy",
    "policy.device": TakenOption("device", note="of an evaluation in this process; on Ray --gpus_per_worker"),
    "policy.n_action_steps": "execution_horizon",
    "policy.num_inference_steps": "num_flow_steps",
    "policy.dtype": DTYPE,
    "policy.use_amp": TakenOption("precision", {True: "bfloat16", False: None}),
    "env.type": IgnoredOption("a task's name determines its suite"),
    "env.task": "tasks",
    "eval.n_episodes": TakenOption("episodes", note="of each task"),
    "eval.batch_size": TakenOption("environments_per_worker", lambda value, _: value or None),
    "eval.use_async_envs": IgnoredOption("environments of one worker step together, workers run in parallel"),
    "env.max_parallel_tasks": IgnoredOption("--num_workers sets how many run in parallel"),
    "job_name": IgnoredOption("output_dir names an evaluation"),
    "trust_remote_code": IgnoredOption("no third-party code is run", (False,), "a bundle holds none"),
    "rename_map": RefusedOption("type --cameras NAME=SOURCE:WIDTHxHEIGHT"),
}
"""`lerobot-eval`'s options."""

SERVE: dict[str, str | TakenOption | IgnoredOption | RefusedOption] = {
    "policy.path": "bundle",
    "policy.device": "device",
    "policy.dtype": DTYPE,
    "policy.num_inference_steps": "num_flow_steps",
    "policy.compile_model": TakenOption("compile", {True: "kernels", False: "off"}, "or graph, on a GPU"),
}
"""The policy's options of `lerobot-record` and of LeRobot's policy server."""


def _betas(value: Any) -> dict[str, float]:
    words = [word.strip("()[] ") for word in str(value).split(",")] if not isinstance(value, list | tuple) else value
    if len(words) != 2:
        raise ConfigError(f"betas are two numbers, [0.9, 0.95], found {value!r}")
    return {"beta1": float(words[0]), "beta2": float(words[1])}


def _side(value: Any) -> int:
    sides = {int(side) for side in (value if isinstance(value, list | tuple) else str(value).strip("()[] ").split(","))}
    if len(sides) != 1:
        raise ConfigError(f"image_resolution must be square here, [224, 224], found {value!r}")
    return sides.pop()


def page() -> str:
    """Return the tables of docs/from_lerobot.md."""
    found = [
        "## The same in both\n\n" + ", ".join(f"`--{name}`" for name in SAME) + ".\n",
        *(f"`--{name}` has two meanings: {text}.\n" for name, text in OTHERS.items()),
    ]
    for command, table in (("train", TRAIN), ("eval", EVAL), ("serve", SERVE)):
        found.append(f"## pi0fm {command}\n\n| LeRobot | pi0fm | |\n|---|---|---|")
        for name, word in table.items():
            to, note = _row(word)
            found.append(f"| `--{name}` | {to} | {note} |")
        found.append("")
    return "\n".join(found)


def _row(word: str | TakenOption | IgnoredOption | RefusedOption) -> tuple[str, str]:
    if isinstance(word, str):
        return f"`--{word}`", ""
    if isinstance(word, TakenOption):
        values = [f"{_yaml(key)}: {_yaml(value)}" for key, value in word.value.items()] if isinstance(word.value, Mapping) else []
        return f"`--{word.to}`", "; ".join([*filter(None, [word.note]), *([", ".join(values)] if values else [])])
    if isinstance(word, IgnoredOption):
        only = f"; only {', '.join(map(_yaml, word.only))}, else {word.instead}" if word.only else ""
        return "ignored", word.why + only
    return "refused", word.instead


if __name__ == "__main__":
    sys.stdout.write(page())
