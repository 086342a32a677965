"""The bundle that a run leaves.

Owns: its name in the output folder, and what becomes of an earlier one. Does not know: its files (policy/bundle.py).
"""

from pathlib import Path

from pi0fm.policy import bundle
from pi0fm.train.data import RunData
from pi0fm.train.state import TrainState
from pi0fm.train.watch.faults import full_disk_named
from pi0fm_client.errors import BundleError


def write_bundle(path: Path, state: TrainState, data: RunData) -> None:
    """Write the state's averaged weights and what the data sets say to a new bundle; one of fewer steps is kept under its steps."""
    if path.exists():
        path.rename(_name_of_earlier(path))
    with full_disk_named(path):
        bundle.save(path, state.bundle_weights(), data.policy, data.parts[0].stats, data.robots())


def _name_of_earlier(path: Path) -> Path:
    try:
        steps = bundle.read(path)[0].training["steps"]
    except BundleError:
        steps = "unreadable"  # kept all the same: the run that just ended must not fail for it
    aside, count = path.with_name(f"{path.name}-{steps}"), 1
    while aside.exists():
        aside, count = path.with_name(f"{path.name}-{steps}.{count}"), count + 1
    return aside
