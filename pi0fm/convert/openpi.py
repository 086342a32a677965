"""openpi's files besides the weights; most facts about its policies are in its code.

Owns: reading and writing its PyTorch form's config.json and assets/NAME/norm_stats.json. Does not know: weights.

    DIR/model.safetensors                PyTorch, with or without config.json
    DIR/params/                          JAX; DIR may also be params/ itself
    DIR/assets/NAME/norm_stats.json      statistics, possibly with padding dimensions
"""

from pathlib import Path

from pi0fm import files
from pi0fm.convert.export import variants
from pi0fm.convert.facts import ForeignFacts
from pi0fm.convert.stats import Columns, columns_of, written_stats
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.prompt import STATELESS
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.policy.saved.manifest import read_json
from pi0fm.progress import say
from pi0fm_client.errors import BundleError

EPSILON = 1e-6  # openpi adds it to every deviation and range


def read_openpi(path: Path, find_stats: bool = True) -> ForeignFacts:
    """Read the directory's facts. find_stats: with its statistics. Raises BundleError for statistics of several robots."""
    horizon = read_json(path / "config.json").get("action_horizon") if (path / "config.json").is_file() else None
    if horizon is not None and not isinstance(horizon, int):
        raise BundleError(f"{path / 'config.json'}: action_horizon must be a number, found {horizon!r}; type --action_horizon")
    remarks = ["openpi's weights do not say which actions were trained as differences: --embodiment.delta_actions does"]
    if horizon is None:
        remarks.append("openpi's weights do not say their action_horizon: 50, unless --action_horizon says another")
    return ForeignFacts(
        peer="openpi",
        where=str(path),
        columns=_columns(path) if find_stats else None,
        norm_epsilon=EPSILON,
        action_horizon=horizon,
        remarks=tuple(remarks),
    )


def write_openpi(aside: Path, config: PolicyConfig, stats: NormStats) -> None:
    """Write the files besides the weights, as openpi's converter does."""
    model = config.model
    tree = {"action_dim": model.action_dim, "action_horizon": model.action_horizon, **variants(model), "precision": "float32"}
    files.write_json(aside / "config.json", tree)
    written = written_stats(stats, config, EPSILON)
    columns = {
        theirs: {name: written[ours][name].tolist() for name in ("mean", "std", "q01", "q99") if name in written[ours]}
        for ours, theirs in (("state", "state"), ("action", "actions"))
    }
    files.write_json(aside / "assets" / config.embodiment.name / "norm_stats.json", {"norm_stats": columns})
    if config.prompt_dialect == STATELESS:
        say("openpi must be told that no prompt holds the state: discrete_state_input=False in its configuration")


def _columns(path: Path) -> Columns | None:
    root = path if (path / "assets").is_dir() else path.parent
    found = sorted((root / "assets").rglob("norm_stats.json"))
    if len(found) > 1:
        listed = ", ".join(str(file.parent.relative_to(root)) for file in found)
        raise BundleError(f"{root} holds statistics of several robots: {listed}; choose with --norm_stats FILE")
    return columns_of(read_json(found[0])) if found else None
