"""pi0fm: train, serve and evaluate pi0-style flow-matching robot policies.

    import pi0fm
    policy = pi0fm.load("outputs/quickstart/train/bundle")
    chunk = policy.infer(observation)

Nothing heavy is imported before it is used: a robot's computer has `pi0fm_client` alone, without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi0fm.policy.local import LocalPolicy

__all__ = ["load"]


def load(path: str, **options: Any) -> "LocalPolicy":
    """The policy in the bundle at `path`; the options are those of `pi0fm.policy.bundle.load`."""
    from pi0fm.policy import bundle

    return bundle.load(path, **options)
