"""pi0fm: train, serve and evaluate pi0-style flow-matching robot policies.

    import pi0fm
    policy = pi0fm.load("outputs/quickstart/train/bundle")
    chunk = policy.infer(observation)

Nothing heavy is imported before it is used: a robot's computer has `pi0fm_client` alone, without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from pi0fm.policy.local import LocalPolicy

__all__ = ["__version__", "load"]


def load(path: "str | Path", **options: Any) -> "LocalPolicy":
    """Load the policy in the bundle at `path`; the options are the fields of `LoadOptions` and `guidance` (policy/load_options.py)."""
    from pi0fm.policy.saved import bundle

    return bundle.load(path, **options)


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pi0fm.machine import release

    return release()
