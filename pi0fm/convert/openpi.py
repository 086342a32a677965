"""What openpi keeps beside its weights, which is little: most of a policy is said in its code.

Owns: config.json of its PyTorch form, assets/NAME/norm_stats.json. Does not know: weights, the way back (convert/export).

    DIR/model.safetensors                PyTorch, with or without config.json
    DIR/params/                          JAX; DIR may also be params/ itself
    DIR/assets/NAME/norm_stats.json      statistics; the robot's padding may be in them
"""

from pathlib import Path

from pi0fm.convert.facts import ForeignFacts
from pi0fm.convert.read import read_json
from pi0fm.convert.stats import Columns, columns_of
from pi0fm_client.errors import BundleError

EPSILON = 1e-6  # openpi adds it to every scale


def read_openpi(path: Path, find_stats: bool = True) -> ForeignFacts:
    """What the directory says; without its statistics where others were chosen. Raises BundleError for those of several robots."""
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
        norm_floor=EPSILON,
        action_horizon=horizon,
        remarks=tuple(remarks),
    )


def _columns(path: Path) -> Columns | None:
    root = path if (path / "assets").is_dir() else path.parent
    found = sorted((root / "assets").rglob("norm_stats.json"))
    if len(found) > 1:
        listed = ", ".join(str(file.parent.relative_to(root)) for file in found)
        raise BundleError(f"{root} holds statistics of several robots: {listed}; choose with --norm_stats FILE")
    return columns_of(read_json(found[0])) if found else None
