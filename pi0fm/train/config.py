"""The options of a training run.

Owns: `TrainConfig` and its ranges, the network that it names, which options may change on resume. Does not know: how a run is started.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi0fm import options
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import AugmentConfig, DatasetConfig, LoaderConfig, MixtureEntry, refuse_entries
from pi0fm.data.order.split import micro_steps, split
from pi0fm.data.pictures.resizing import RESIZES, Resize
from pi0fm.data.prompt import BYTES, OPENPI, refuse_dialect
from pi0fm.flow.config import FlowConfig
from pi0fm.models.config import ADAPTABLE, LoraConfig, Pi0Config, preset
from pi0fm.options import option
from pi0fm.policy.load_options import PRECISIONS
from pi0fm.train.components import FREE_AT_RESUME as FREE_IN_VALIDATION
from pi0fm.train.components import Adaptation, OptimizerConfig, ParallelConfig, RtcConfig, ValidationConfig
from pi0fm.train.watch.trackers import refuse_unknown
from pi0fm_client.errors import ConfigError

if TYPE_CHECKING:  # importing torch takes longer than reading options: only the code that computes imports it
    import torch

    from pi0fm.train.plan.memory import MemoryEstimate
    from pi0fm.train.state import StateConfig
    from pi0fm.train.watch.guard import GuardConfig
    from pi0fm.train.watch.log import LogConfig

FREE_AT_RESUME = (
    *("output_dir", "resume", "steps", "log_every", "checkpoint_every", "bundle_every", "keep_checkpoints", "micro_batch_size", "threads"),
    *("resume_changed", "checkpoint_dir", "on_nonfinite", "activation_checkpointing", "loader", "parallel", "hang_seconds", "tracker"),
    *("tracker_project", "device"),
)
ON_NONFINITE = ("stop", "skip")
FREE_IN_GROUPS = (
    *(f"dataset.{name}" for name in ("repo_id", "root", "cache_dir", "video_decoder")),  # the data are compared instead (checkpoint/facts)
    "optimizer.decay_steps",
    *(f"validation.{name}" for name in FREE_IN_VALIDATION),
)


@dataclass(frozen=True)
class TrainConfig:
    """Options of one run. Splitting the global batch over workers and micro batches changes only speed and memory."""

    output_dir: Path = option(Path("outputs/train"), "folder of the run: checkpoints, metrics, and the bundle at the end")
    resume: str = option("false", "true resumes from the newest checkpoint in output_dir; auto does if it holds this run")
    resume_changed: bool = option(False, "resume although options or the data set changed; the differences are printed")
    seed: int = option(0, "fixes initial weights, order of the data, noise and flow times")
    steps: int = option(30_000, "optimiser steps")
    global_batch_size: int = option(32, "samples a step over all workers")
    flow_draws_per_observation: int = option(1, "pairs of noise and flow time that train on one encoding of each observation")
    micro_batch_size: int | None = option(None, "most samples in a forward pass; empty takes a worker's whole share")
    dataset: DatasetConfig = option(DatasetConfig, "")
    embodiment: Embodiment = option(Embodiment, "")
    mixture: dict[str, MixtureEntry] = option(
        dict, "several data sets in place of dataset.* and embodiment.*, each under a NAME that serve, eval and load take as --robot NAME"
    )
    pretrained: Path | None = option(None, "bundle to start from, such as pi0fm convert writes; empty starts from random weights")
    pretrained_norm_stats: bool = option(False, "keep the bundle's statistics of state and action instead of the data set's")
    train_only: str = option("full", "full, frozen_vision (all but the vision tower) or expert_only (action expert, state, actions, time)")
    lora: LoraConfig = option(LoraConfig, "")
    frozen_bfloat16: bool = option(False, "keep frozen matrices in bfloat16, in a run that computes in bfloat16: half their memory")
    activation_checkpointing: str = option(
        "none", "none, selective (recomputes attention and activations) or full (recomputes each layer): the same numbers, less memory"
    )
    device: str | None = option(None, "cpu or cuda; a GPU where there is one when not given")
    compile: bool = option(False, "compile each layer: a minute at the start, then fewer and larger kernels on a GPU; rounding differs")
    parallel: ParallelConfig = option(ParallelConfig, "")
    model: dict[str, Any] = option(lambda: {"preset": "tiny"}, "preset (tiny, pi0, pi05), and any field of it to change")
    flow: FlowConfig = option(FlowConfig, "")
    rtc: RtcConfig = option(RtcConfig, "")
    optimizer: OptimizerConfig = option(OptimizerConfig, "")
    ema_decay: float | None = option(0.999, "decay of the moving average of the weights that goes into the bundle; null for none")
    precision: str = option("auto", "auto (bfloat16 where the hardware has it), float32 or bfloat16; weights and moments are float32")
    normalization: str = option("z_score", "z_score or quantile (q01..q99 to [-1, 1]) of state and action")
    norm_floor: float = option(0.01, "least spread that a dimension is divided by, as a share of its range")
    resize: Resize | None = option(
        None,
        "antialias (openpi's) or plain (LeRobot's) where pictures are scaled down; empty takes the pretrained bundle's, else antialias",
    )
    tokenizer: str = option(BYTES, "byt5, the directory of a tokenizer, or pretrained: the one of the bundle to start from")
    prompt_dialect: str = option(OPENPI, "format of the prompt: openpi, lerobot or openpi_stateless; pretrained takes the bundle's")
    augment: bool = option(False, "augment the pictures at random, each sample differently; augmentation.* sets the strength")
    augmentation: AugmentConfig = option(AugmentConfig, "")
    loader: LoaderConfig = option(LoaderConfig, "")
    validation: ValidationConfig = option(ValidationConfig, "")
    execution_horizon: int = option(8, "actions executed of each chunk before planning again, kept in the bundle")
    camera_sources: dict[str, str] = option(dict, "camera -> SOURCE:WIDTHxHEIGHT in a simulator, kept in the bundle")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    tracker: tuple[str, ...] = option(("tensorboard",), "trackers of metrics, one or more of tensorboard, trackio, wandb, mlflow, or []")
    tracker_project: str = option("pi0fm", "project in trackio, wandb and mlflow")
    checkpoint_every: int = option(1000, "steps between checkpoints")
    bundle_every: int = option(0, "steps between bundles in output_dir/bundles, for pi0fm eval --follow.run; 0 writes one at the end only")
    checkpoint_dir: str = option("", "folder or s3://BUCKET/PREFIX that all workers see; empty takes output_dir/checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept")
    on_nonfinite: str = option("stop", "on a loss or gradient that is not finite: stop, or skip the step; output_dir/faults gets its batch")
    hang_seconds: float = option(900.0, "seconds without a step until the run is ended, with every worker's stacks in output_dir/hangs")
    threads: int | None = option(None, "CPU threads of each worker; empty takes its share of the machine")

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "global_batch_size",
            "flow_draws_per_observation",
            "execution_horizon",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, found {getattr(self, name)}")
        if self.bundle_every < 0:
            raise ConfigError(f"bundle_every must be >= 0, found {self.bundle_every}; type 0 for a bundle at the end alone")
        for name in ("micro_batch_size", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, found {getattr(self, name)}")
        object.__setattr__(self, "resume", self.resume.lower())  # an unquoted true in YAML is a boolean
        older = {"true": "full", "false": "none"}  # values of older configurations
        recomputed = self.activation_checkpointing.lower()
        object.__setattr__(self, "activation_checkpointing", older.get(recomputed, recomputed))
        if self.resume not in ("true", "false", "auto"):
            raise ConfigError(f"resume must be true, false or auto, found {self.resume!r}")
        if self.on_nonfinite not in ON_NONFINITE:
            raise ConfigError(f"on_nonfinite must be {' or '.join(ON_NONFINITE)}, found {self.on_nonfinite!r}")
        if self.augmentation != AugmentConfig() and not self.augment:
            raise ConfigError("augmentation.* sets how pictures are changed, but augment is false; type --augment true, or leave them out")
        if self.hang_seconds <= 0:
            raise ConfigError(f"hang_seconds must be above 0, found {self.hang_seconds:g}; leave it out for 900")
        refuse_unknown(self.tracker)
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, found {self.seed}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay must lie in (0, 1) or be null, found {self.ema_decay}")
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(
                f"device must be cpu or cuda, of which a process takes the first GPU that it may see, found {self.device!r}; type "
                "CUDA_VISIBLE_DEVICES=N in front of the command for another"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.normalization not in ("z_score", "quantile"):
            raise ConfigError(f"normalization must be z_score or quantile, found {self.normalization!r}")
        if not 0 < self.norm_floor < 1:
            raise ConfigError(f"norm_floor is a share of a dimension's range, above 0 and below 1, found {self.norm_floor}; type 0.01")
        if self.resize not in (None, *RESIZES):
            raise ConfigError(f"resize must be one of {', '.join(RESIZES)}, found {self.resize!r}; leave it out for antialias")
        network = self.network()
        if self.execution_horizon > network.action_horizon:
            raise ConfigError(
                f"execution_horizon must be <= the model's action_horizon {network.action_horizon}, found {self.execution_horizon}"
            )
        if not 0 <= self.rtc.max_delay < network.action_horizon:
            raise ConfigError(
                f"rtc.max_delay must lie in 0..{network.action_horizon - 1}, since one row of a chunk or more is predicted, "
                f"found {self.rtc.max_delay}; type the most control steps that pass while a chunk is inferred"
            )
        if self.prompt_dialect != "pretrained":
            refuse_dialect(self.prompt_dialect, network.state_input == "prompt")
        if self.compile and self.parallel.cuts:
            raise ConfigError(
                f"compile needs a state that is not sharded, found parallel.shard {self.parallel.shard}; leave one out, or "
                "type --parallel.shard none"
            )
        self._refuse_fine_tuning(network)
        self._refuse_with_mixture()
        refuse_entries(self.mixture)

    def _refuse_with_mixture(self) -> None:
        """Raise ConfigError for an option of a single data set in a run with a mixture, where each entry sets it."""
        for name in ("dataset", "embodiment", "camera_sources") if self.mixture else ():
            given = _changed_from_default(name, getattr(self, name))
            if given:
                raise ConfigError(
                    f"{given} is of one data set, but the run has a mixture of {', '.join(self.mixture)}; "
                    f"type --mixture.{next(iter(self.mixture))}.{given} instead"
                )

    def entries(self) -> dict[str, MixtureEntry]:
        """Return the data sets by name; without a mixture, `dataset` and `embodiment` under the empty name."""
        return self.mixture or {"": MixtureEntry(self.dataset, self.embodiment, camera_sources=self.camera_sources)}

    def _refuse_fine_tuning(self, network: Pi0Config) -> None:
        """Raise ConfigError for contradictory options of fine-tuning, before any data is opened."""
        if self.pretrained_norm_stats and self.pretrained is None:
            raise ConfigError(
                "pretrained_norm_stats keeps a bundle's statistics, found no bundle; type --pretrained BUNDLE, or leave it out"
            )
        if self.frozen_bfloat16 and self.precision == "float32":
            raise ConfigError("frozen_bfloat16 needs a run that computes in bfloat16, found precision float32; type --precision bfloat16")
        if self.frozen_bfloat16 and self.validation.every and self.validation.likelihood:
            raise ConfigError(
                "a log-likelihood needs float32, but frozen_bfloat16 keeps weights in bfloat16; type --validation.likelihood false"
            )
        if self.lora.rank and not set(self.lora.targets) <= set(ADAPTABLE):  # names of layers, checked against the network
            from pi0fm.train.start.adaptation import refuse_for

            refuse_for(replace(network, action_horizon=1, max_prompt_tokens=1), self.adaptation())  # lengths change no module
        self.adaptation()

    def adaptation(self) -> Adaptation:
        """Return which parameters train, and how they are kept. Raises ConfigError for options that exclude each other."""
        return Adaptation(self.train_only, self.lora, self.frozen_bfloat16, self.activation_checkpointing, self.compile)

    @property
    def checkpoint_place(self) -> Path | str:
        """Folder or URL of this run's checkpoints."""
        return self.checkpoint_dir or self.output_dir / "checkpoints"

    def network(self) -> Pi0Config:
        """Return the preset with its changed fields. Raises ConfigError for an unknown preset or field."""
        tree = dict(self.model)
        base = preset(str(tree.pop("preset", "tiny")))
        tree = options.merge(options.encode(base), tree)
        return options.decode(Pi0Config, tree, "model.", ("model.preset",), options.ALL_OPTIONS)

    def micro_steps(self, world_size: int) -> int:
        """Number of micro batches per step of each of `world_size` workers. Raises ConfigError for a global batch that cannot be split."""
        return micro_steps(self.global_batch_size, world_size, self.micro_batch_size)

    def largest_micro_batch(self, world_size: int) -> int:
        """Number of samples in the largest forward pass. Raises what `micro_steps` raises."""
        parts = (split(self.global_batch_size, rank, world_size, self.micro_batch_size) for rank in range(world_size))
        return max(count for part in parts for _, count in part)

    def state(self) -> "StateConfig":
        """Return the options of the training state, which is not sharded while `auto` is undecided."""
        from pi0fm.train.state import StateConfig

        return StateConfig(self.seed, self.optimizer, self.adaptation(), self.ema_decay, self.parallel)

    def memory(self, cameras: int, world_size: int, device: "torch.device") -> "MemoryEstimate":
        """Estimate the memory that one of `world_size` workers takes on its device; an undecided `auto` counts as none."""
        from pi0fm.policy.device import compute_dtype
        from pi0fm.train.plan.memory import estimate

        return estimate(
            self.network(),
            self.adaptation(),
            cameras=cameras,
            micro_batch=self.largest_micro_batch(world_size),
            flow_draws=self.flow_draws_per_observation,
            by_row=self.rtc.max_delay > 0,
            averaged=self.ema_decay is not None,
            accumulates=self.micro_steps(world_size) > 1,
            validated=self.validation.every > 0,
            computes=compute_dtype(self.precision, device),
            device=device.type,
            parallel=self.parallel,
            world_size=world_size,
        )

    def log(self, full_speed: float | None = None) -> "LogConfig":
        """Return the options of the metrics log. full_speed: see LogConfig."""
        from pi0fm.train.watch.log import LogConfig

        return LogConfig(self.log_every, self.steps, self.global_batch_size, full_speed)

    def guard(self) -> "GuardConfig":
        """Return the options of checkpoints and of losses that are not finite."""
        from pi0fm.train.watch.faults import FaultConfig
        from pi0fm.train.watch.guard import GuardConfig

        faults = FaultConfig(self.output_dir / "faults", self.on_nonfinite == "skip", self.global_batch_size, self.micro_batch_size)
        return GuardConfig(self.output_dir, self.steps, self.checkpoint_every, faults)


def refuse_other_run(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    """Raise ConfigError that names the options that differ between the run in `where` and the new one, except those that may change.

    Under `resume_changed` nothing is refused; the run prints the differences when it resumes.
    """
    differences = [] if new.get("resume_changed") else changed_options(old, new)
    if differences:
        raise ConfigError(
            f"{where} holds a run with another configuration: {'; '.join(differences)}; "
            "resume it as it was, choose another output_dir, or add --resume_changed true"
        )


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Format `NAME was X, now Y` for every option that differs between two runs and may not change on resume.

    An option unknown to the old run counts as its default. Of a mixture the names of the entries are compared, in order, then the options
    of entries that both have.
    """
    known = options.flat(options.encode(TrainConfig()))
    both = (old.get("mixture") or {}).keys() & (new.get("mixture") or {}).keys()
    flat_old, flat_new = (known | _comparable(tree, both) for tree in (old, new))
    return [
        f"{name} was {flat_old.get(name)!r}, now {flat_new.get(name)!r}"
        for name in sorted(flat_old.keys() | flat_new.keys())
        if (name in known or name.split(".")[0] in ("model", "embodiment", "camera_sources", "mixture"))
        and name.split(".")[0] not in FREE_AT_RESUME
        and re.sub(r"^mixture\.\w+\.", "", name) not in FREE_IN_GROUPS
        and flat_old.get(name) != flat_new.get(name)
    ]


def _comparable(tree: Mapping[str, Any], entries: Collection[str]) -> dict[str, Any]:
    """Flatten the options of a run to dotted names; of its mixture the names in order, and the options of `entries`."""
    mixture = tree.get("mixture") or {}
    flat = options.flat({name: value for name, value in tree.items() if name != "mixture"}) | {"mixture": ", ".join(mixture)}
    defaults = options.encode(MixtureEntry())
    for name in entries:
        flat |= options.flat(options.merge(defaults, mixture[name]), f"mixture.{name}.")
    return flat


def _changed_from_default(name: str, value: Any) -> str | None:
    """Return the dotted name of the first option in a group that differs from its default."""
    default = options.flat(options.encode(TrainConfig()))
    return next((key for key, found in options.flat({name: options.encode(value)}).items() if found != default.get(key)), None)
