"""The bundle that a run starts from.

Owns: which options must agree between bundle and run, and which are the run's. Does not know: what trains, the weights.

    the bundle's; another value is refused by name                network, path and prediction of the flow, normalisation, prompt dialect,
                                                                  tokenizer
    the run's, independent of the bundle                          robot, horizon, longest prompt, time density, solver, camera sources
    the data set's, unless pretrained_norm_stats                  statistics of state and action
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pi0fm import options
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.prompt import BYTES, load_tokenizer
from pi0fm.models.config import PRESETS, Pi0Config
from pi0fm.options import nearest
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.train.components import FIXED_IN_FLOW, OWN
from pi0fm_client.errors import ConfigError

FIXED = ("normalization", "prompt_dialect")


@dataclass(frozen=True)
class Pretrained:
    """Bundle that was checked against its manifest."""

    path: Path
    policy: PolicyConfig
    stats: NormStats

    def tokenizer(self) -> str:
        """Return the value of --tokenizer that selects this bundle's."""
        return BYTES if self.policy.tokenizer == BYTES else str(self.path / self.policy.tokenizer)


def open_pretrained(path: Path | None) -> Pretrained | None:
    """Open the bundle at `path`; None without a path. Raises BundleError for a damaged bundle."""
    return None if path is None else Pretrained(path, *bundle.read(path))


def resolve_tokenizer(name: str, pretrained: Pretrained | None) -> str:
    """Return the run's tokenizer, resolving `pretrained` to the bundle's. Raises ConfigError for `pretrained` without a bundle."""
    return name if name != OWN else _require_pretrained("tokenizer", pretrained).tokenizer()


def resolve_dialect(word: str, pretrained: Pretrained | None) -> str:
    """Return the run's prompt dialect, resolving `pretrained` to the bundle's. Raises ConfigError for `pretrained` without a bundle."""
    return word if word != OWN else _require_pretrained("prompt_dialect", pretrained).policy.prompt_dialect


def refuse_other_policy(pretrained: Pretrained, run: PolicyConfig) -> None:
    """Raise ConfigError that names every difference between the bundle's network and the run's."""
    theirs = pretrained.policy
    network = _differences(_fixed_network(theirs.model), _fixed_network(run.model), "model.")
    rest = [
        *_differences({name: getattr(theirs.flow, name) for name in FIXED_IN_FLOW}, vars(run.flow), "flow."),
        *_differences({name: getattr(theirs, name) for name in FIXED}, {name: getattr(run, name) for name in FIXED}, ""),
    ]
    if network or rest:
        listed = "; ".join(f"{name} is {old!r} there, {new!r} here" for name, old, new in [*network, *rest][:8])
        typed = [f"--model.preset {_preset_of(theirs.model) or '(and its fields)'}"] if network else []
        typed += [f"--{name} {old}" for name, old, _ in rest]
        raise ConfigError(f"the run must fit the bundle {pretrained.path} that it starts from: {listed}; type {' '.join(typed)}")
    _refuse_other_tokens(pretrained, run)


def pretrained_stats(pretrained: Pretrained, entry: str, run: PolicyConfig) -> NormStats:
    """Return the bundle's statistics for a run's data set: of the robot with the entry's name, or of the only robot without a mixture.

    Raises ConfigError for an ambiguous robot, or statistics of another width than the robot.
    """
    known = bundle.robot_names(pretrained.path)
    whose = f"pretrained_norm_stats keeps a robot's statistics by its name, {pretrained.path} holds those of {', '.join(known)}"
    if entry and entry not in known:
        raise ConfigError(f"{whose}, found mixture.{entry}: {nearest(entry, known)}; leave it out to compute them from the data sets")
    if not entry and len(known) > 1:
        raise ConfigError(f"{whose}, found a run without names; write its data set as mixture.{known[0]}, or as that of another robot")
    stats = bundle.read(pretrained.path, entry)[1] if entry else pretrained.stats
    for what, column, width in zip(("state", "action"), (stats.state, stats.action), run.embodiment.dims(), strict=True):
        if len(column.mean) != width:
            raise ConfigError(
                f"pretrained_norm_stats needs statistics of the robot's {what}, {width} wide, found {len(column.mean)} in "
                f"{pretrained.path}; leave it out, so that they are computed from the data set"
            )
    return stats


def _require_pretrained(option: str, pretrained: Pretrained | None) -> Pretrained:
    if pretrained is None:
        raise ConfigError(f"{option} {OWN} needs a bundle to take it from, found none; type --pretrained BUNDLE")
    return pretrained


def _fixed_network(config: Pi0Config) -> dict[str, Any]:
    # lengths, which shape no weight, are the run's
    return options.flat(options.encode(replace(config, action_horizon=1, max_prompt_tokens=1)))


def _preset_of(config: Pi0Config) -> str | None:
    return next((name for name, known in PRESETS.items() if _fixed_network(known) == _fixed_network(config)), None)


def _refuse_other_tokens(pretrained: Pretrained, run: PolicyConfig) -> None:
    """Raise ConfigError for a tokenizer that gives any token another id than the bundle's."""
    own = pretrained.tokenizer()
    if own == run.tokenizer:
        return
    size = run.model.vocab_size
    if BYTES in (own, run.tokenizer) or load_tokenizer(own, size).get_vocab() != load_tokenizer(run.tokenizer, size).get_vocab():
        raise ConfigError(
            f"the run must have the tokenizer of the bundle {pretrained.path} that it starts from, found {run.tokenizer!r}; "
            f"type --tokenizer {OWN}"
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    return [(f"{prefix}{name}", value, ours.get(name)) for name, value in theirs.items() if ours.get(name) != value]
