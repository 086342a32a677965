"""The options of a run's components: optimiser, sharding, adaptation, validation, training for real-time chunking.

Owns: the dataclasses, their allowed values and ranges. Does not know: the components. torch is not imported, so that a command line is
read quickly.
"""

from dataclasses import dataclass, field
from typing import get_args

from pi0fm.flow.config import SOLVERS
from pi0fm.models.config import CHECKPOINTING, LoraConfig
from pi0fm.models.parts import PARTS, Part
from pi0fm.options import nearest, option
from pi0fm_client.errors import ConfigError

TRAINED: dict[str, frozenset[Part]] = {
    "full": frozenset(PARTS),
    "frozen_vision": frozenset(get_args(Part)) - {"vision"},
    "expert_only": frozenset({"action_expert", "projections"}),
}
AUTO, NONE, GRADIENTS, FULL = "auto", "none", "gradients", "full"
SHARDS = (AUTO, NONE, GRADIENTS, FULL)
OWN = "pretrained"  # --tokenizer pretrained, --prompt_dialect pretrained: the bundle's
FIXED_IN_FLOW = ("path", "prediction")  # by the weights of a bundle to start from


@dataclass(frozen=True)
class ParallelConfig:
    """Sharding of the state over workers. Raises ConfigError for an unknown value, or for replicas of a state that is not sharded."""

    shard: str = option(
        AUTO,
        "what is sharded over the workers: none, gradients (weights are gathered once a step), full (a layer's weights are gathered "
        "twice a step: least memory); auto takes the first that fits",
    )
    replicas: int = option(1, "copies of a sharded state, each held by workers / replicas workers, best those of one machine")
    accumulate_whole: bool = option(
        False, "with several micro batches a step, reduce sharded gradients once at its end: less traffic, 4 bytes for each weight"
    )

    def __post_init__(self) -> None:
        if self.shard not in SHARDS:
            raise ConfigError(f"parallel.shard must be one of {', '.join(SHARDS)}, found {self.shard!r}")
        if self.replicas < 1:
            raise ConfigError(f"parallel.replicas must be >= 1, found {self.replicas}; type --parallel.replicas 1")
        given = "replicas" if self.replicas > 1 else "accumulate_whole" if self.accumulate_whole else None
        if self.shard == NONE and given:
            raise ConfigError(
                f"parallel.{given} needs a sharded state, found parallel.shard none; leave it out, or type --parallel.shard full"
            )

    @property
    def cuts(self) -> bool:
        """Whether any of the state is sharded, once `auto` is resolved."""
        return self.shard in (GRADIENTS, FULL)

    def refuse_for(self, world_size: int) -> None:
        """Raise ConfigError if `world_size` workers cannot share the state as configured."""
        if world_size == 1 and self.cuts:
            raise ConfigError(f"a state is sharded over two or more workers, found one for parallel.shard {self.shard}; leave it out")
        each, left = divmod(world_size, self.replicas)
        if left or (each == 1 and self.replicas > 1):
            raise ConfigError(
                f"the workers must be shared out evenly, two or more to a replica, found {world_size} for parallel.replicas "
                f"{self.replicas}; type --parallel.replicas 1, or another number of workers"
            )

    def workers_of_a_state(self, world_size: int) -> int:
        """Number of workers that hold one copy of the state together, each a part."""
        return world_size // self.replicas if self.cuts else 1


DDP = ParallelConfig(NONE)


@dataclass(frozen=True)
class Adaptation:
    """Which parameters train, and how they are kept in memory. Raises ConfigError for an unknown value or an impossible combination."""

    train_only: str = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    frozen_bfloat16: bool = False
    activation_checkpointing: str = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.train_only not in TRAINED:
            raise ConfigError(f"train_only must be a known word, found {self.train_only!r}: {nearest(self.train_only, list(TRAINED))}")
        if self.frozen_bfloat16 and self.train_only == "full" and not self.lora.rank:
            raise ConfigError(
                "frozen_bfloat16 halves what is frozen, but train_only full without lora freezes nothing; leave it out, or type "
                "--lora.rank 16"
            )
        if self.activation_checkpointing not in CHECKPOINTING:
            found = self.activation_checkpointing
            raise ConfigError(f"activation_checkpointing must be a known word, found {found!r}: {nearest(str(found), CHECKPOINTING)}")
        for target in self.lora.targets if self.lora.rank else ():
            self.refuse_frozen(target, {part for part in PARTS if part == target})

    def refuse_frozen(self, target: str, parts: set[Part]) -> None:
        """Raise ConfigError for an adapter's target in a frozen part. parts: those that the target selects."""
        contradicted = sorted(parts - TRAINED[self.train_only])
        if contradicted:
            raise ConfigError(
                f"lora.targets must be in trained parts, found {target!r} in {', '.join(contradicted)}, which train_only {self.train_only} "
                "freezes; type --train_only full, or other targets"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Options of AdamW and its learning rate, with openpi's defaults."""

    learning_rate: float = option(2.5e-5, "peak learning rate; configs/tiny.yaml, for the preset tiny, sets 1e-3")
    final_learning_rate_ratio: float = option(0.1, "learning rate at the last step over the peak")
    warmup_steps: int = option(1000, "steps from 0 to the peak; a tenth of the run at most")
    decay_steps: int | None = option(None, "steps until the final rate, which then stays; empty takes the run's steps")
    beta1: float = option(0.9, "decay of the mean gradient")
    beta2: float = option(0.95, "decay of the mean squared gradient")
    weight_decay: float = option(1e-10, "decay of the matrices towards 0; norms and biases have none")
    clip_norm: float = option(1.0, "largest norm of the gradient; a longer one is scaled down")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ConfigError(f"learning_rate and clip_norm must be > 0, found {self.learning_rate} and {self.clip_norm}")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise ConfigError(f"final_learning_rate_ratio must lie in [0, 1], found {self.final_learning_rate_ratio}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ConfigError(f"decay_steps must be >= 1, found {self.decay_steps}; leave it out for the run's steps")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError(f"warmup_steps and weight_decay must be >= 0, found {self.warmup_steps} and {self.weight_decay}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1 and beta2 must lie in [0, 1), found {self.beta1} and {self.beta2}")


FREE_AT_RESUME = ("every", "samples", "likelihood", "probes", "num_flow_steps", "solver")


@dataclass(frozen=True)
class ValidationConfig:
    """Episodes held out of training, and how they are evaluated. Raises ConfigError for a value out of range."""

    every: int = option(0, "optimiser steps between two validations; the last step is validated too; 0 for none")
    episodes: int = option(0, "episodes of each data set held out of training and its statistics, chosen by the seed over all tasks")
    samples: int = option(64, "held-out chunks of each data set that are evaluated, always the same; all of them where there are fewer")
    likelihood: bool = option(False, "compute the log-likelihood of these chunks too, at many times the cost of loss and error")
    probes: int = option(2, "with likelihood, random probes of Hutchinson's divergence for each chunk")
    num_flow_steps: int = option(16, "with likelihood, steps of the integral from a chunk back to its noise")
    solver: str = option("midpoint", "with likelihood, ODE solver of that integral: euler, midpoint, heun, rk4, dopri5")

    def __post_init__(self) -> None:
        for name, least in {"every": 0, "episodes": 0, "samples": 1, "probes": 1, "num_flow_steps": 1}.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"validation.{name} must be >= {least}, found {value}; type --validation.{name} {least} or leave it out")
        if self.solver not in SOLVERS:
            known = nearest(self.solver, SOLVERS)
            raise ConfigError(
                f"validation.solver must be a solver of an ODE, since a density needs a path back, found {self.solver!r}: {known}"
            )
        usual = {"probes": 2, "num_flow_steps": 16, "solver": "midpoint"}
        unread = [name for name, value in usual.items() if getattr(self, name) != value]
        if unread and not self.likelihood:
            raise ConfigError(f"validation.{unread[0]} is for the log-likelihood, which is off; type --validation.likelihood true")
        if self.every and not self.episodes:
            raise ConfigError(
                f"validation.every {self.every} needs episodes to validate on, found validation.episodes 0; type --validation.episodes 6"
            )


@dataclass(frozen=True)
class RtcConfig:
    """Training for real-time chunking (flow/committed.py)."""

    max_delay: int = option(0, "for real-time chunking: train with the first 0 to this many rows of a chunk given; 0 trains without")
