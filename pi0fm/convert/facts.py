"""Facts about a foreign policy besides its weights; options add to them and override them.

Owns: `ForeignFacts`, merging them into a `PolicyConfig`. Does not know: any peer's files, tensors.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from pi0fm.convert.config import ConvertConfig
from pi0fm.convert.names import Kind
from pi0fm.convert.stats import STAND_INS_FACT, Columns, columns_of, foreign_stats
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import ColumnStats, NormStats
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize
from pi0fm.data.prompt import BYTES, OPENPI, load_tokenizer, refuse_dialect
from pi0fm.flow.config import FlowConfig
from pi0fm.models.config import Pi0Config
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.policy.saved.manifest import read_json
from pi0fm.progress import say
from pi0fm_client.errors import ConfigError

NORMALIZATION: dict[Kind, str] = {"pi0": "z_score", "pi05": "quantile"}
PROMPT_TOKENS: dict[Kind, int] = {"pi0": 48, "pi05": 200}
DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ForeignFacts:
    """Facts in a directory; None for a missing one. columns: statistics by the peer's names. remarks: lines for the user."""

    peer: str
    where: str
    kind: Kind | None = None
    embodiment: Embodiment = field(default_factory=Embodiment)
    columns: Columns | None = None
    normalization: str | None = None
    norm_floor: float = 0.0
    norm_epsilon: float = 0.0
    resize: Resize = ANTIALIAS
    tokenizer: str | None = None
    prompt_dialect: str = OPENPI
    action_horizon: int | None = None
    execution_horizon: int | None = None
    max_prompt_tokens: int | None = None
    num_flow_steps: int | None = None
    state_dim: int | None = None
    image_size: int | None = None
    ties_embedding: bool = True
    remarks: tuple[str, ...] = ()


def policy_config(options: ConvertConfig, facts: ForeignFacts, model: Pi0Config, kind: Kind) -> tuple[PolicyConfig, NormStats]:
    """Return the bundle's configuration and statistics. Raises ConfigError for a fact that neither source nor options give."""
    usual = vars(Embodiment())
    typed = {name: value for name, value in vars(options.embodiment).items() if value != usual[name]}
    embodiment = replace(facts.embodiment, **typed)
    lacking = [name for name, known in (("cameras", embodiment.cameras), ("statistics", facts.columns)) if not known]
    if lacking and options.norm_stats is None and not typed:
        say(f"{facts.where} does not say {' and '.join(lacking)}: the bundle is for training, and a run takes them from its data set")
        return _base(options, facts, model, kind)
    if not embodiment.cameras:
        raise ConfigError(
            f"{facts.where} does not say its cameras; type them in the order of training: "
            "--embodiment.cameras '{base: observation.images.base}'"
        )
    columns, where = facts.columns, facts.where
    if options.norm_stats is not None:
        columns, where = columns_of(read_json(options.norm_stats)), str(options.norm_stats)
    if columns is None:
        raise ConfigError(
            f"{facts.where} holds no statistics of state and action; type --norm_stats FILE (norm_stats.json, meta/stats.json)"
        )
    normalization = options.normalization or facts.normalization or NORMALIZATION[kind]
    widths = {"state": embodiment.state_dim, "action": embodiment.robot_action_dim}
    stats, stand_ins = foreign_stats(columns, normalization, widths, where)
    training = {"converted_from": f"{facts.peer} {kind}"}
    if stand_ins:
        training[STAND_INS_FACT] = ",".join(stand_ins)
        say(f"absent from the statistics, and not read by {normalization}: {', '.join(stand_ins)}; neighbouring ones replace them")
    stated = _policy_without_robot(options, facts, model, kind)
    robot = replace(embodiment, state_dim=len(stats.state.mean), robot_action_dim=len(stats.action.mean))
    return replace(stated, embodiment=robot, normalization=normalization, fps=options.fps, training=training), stats


def _base(options: ConvertConfig, facts: ForeignFacts, model: Pi0Config, kind: Kind) -> tuple[PolicyConfig, NormStats]:
    """Return configuration and statistics of a bundle without a robot, which can be trained from but not served."""
    normalization = options.normalization or facts.normalization or NORMALIZATION[kind]
    stated = _policy_without_robot(options, facts, model, kind)
    policy = replace(stated, normalization=normalization, training={"converted_from": f"{facts.peer} {kind}"})
    load_tokenizer(policy.tokenizer, model.vocab_size)  # refuses a tokenizer that does not fit
    nothing = ColumnStats(*(np.zeros(0, np.float32) for _ in fields(ColumnStats)))
    return policy, NormStats(nothing, nothing, 0)


def _policy_without_robot(options: ConvertConfig, facts: ForeignFacts, model: Pi0Config, kind: Kind) -> PolicyConfig:
    """Return the policy configuration from source and options, without robot and statistics."""
    horizon = options.execution_horizon or facts.execution_horizon or 8
    if horizon > model.action_horizon and options.execution_horizon:
        raise ConfigError(
            f"execution_horizon must be at most action_horizon {model.action_horizon}, found {horizon}; "
            f"type --execution_horizon {model.action_horizon}"
        )
    dialect = options.prompt_dialect or facts.prompt_dialect
    refuse_dialect(dialect, model.state_input == "prompt")
    if facts.peer == "openpi" and kind == "pi05" and options.prompt_dialect is None:
        say("openpi's weights do not say whether prompts hold the state: they do, unless --prompt_dialect openpi_stateless (pi05_libero)")
    return PolicyConfig(
        model=model,
        flow=FlowConfig(num_flow_steps=options.num_flow_steps or facts.num_flow_steps or 10),
        embodiment=Embodiment(),
        norm_floor=options.norm_floor or facts.norm_floor,
        norm_epsilon=facts.norm_epsilon,
        norm_rule="absolute",
        resize=facts.resize,
        tokenizer=_tokenizer(options, facts),
        prompt_dialect=dialect,
        execution_horizon=min(horizon, model.action_horizon),
        padded_noise=True,
    )


def _tokenizer(options: ConvertConfig, facts: ForeignFacts) -> str:
    chosen = options.tokenizer or facts.tokenizer
    if chosen and (chosen == BYTES or Path(chosen).is_dir()):
        return chosen
    found = f"names {facts.tokenizer!r}, which is not on this machine" if facts.tokenizer else "holds no tokenizer"
    if options.tokenizer:
        found = f"was given {options.tokenizer!r}, which is no directory"
    raise ConfigError(f"{facts.where} {found}; type --tokenizer DIR, for released weights the files of google/paligemma-3b-pt-224")
