"""Evaluated policy: a bundle in this process, or a server.

Owns: `PolicyChoice`, opening it, its metadata. Does not know: the evaluation.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pi0fm.options import option, required
from pi0fm.policy.load_options import TOKEN_VARIABLE, LoadOptions
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Policy


@dataclass(frozen=True, kw_only=True)
class PolicyChoice(LoadOptions):
    """Options that choose a policy and load it. Raises ConfigError for an option that belongs to a server."""

    policy: str = required(f"a bundle's directory, or the ws:// address of a server, whose key is in ${TOKEN_VARIABLE}")
    threads: int | None = option(1, "CPU threads per inference; another number changes the order of sums, and so the results")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [field.name for field in fields(LoadOptions) if getattr(self, field.name) != getattr(type(self), field.name)]
        if self.remote and given:
            raise ConfigError(
                f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to the server {self.policy}, which runs the model; "
                "type it behind pi0fm serve"
            )

    @property
    def remote(self) -> bool:
        """Tell whether the policy is a server's address."""
        return self.policy.startswith(("ws://", "wss://"))


def open_policy(choice: PolicyChoice, connections: int = 1) -> Policy:
    """Load the bundle, or connect to the server. Raises BundleError, ServingError, ConfigError."""
    if choice.remote:
        from pi0fm_client.client import RemotePolicy

        return RemotePolicy(choice.policy, connections=connections, token=os.environ.get(TOKEN_VARIABLE))
    from pi0fm.policy.saved import bundle

    return bundle.load(choice.policy, choice)


def read_metadata(choice: PolicyChoice) -> dict[str, Any]:
    """Read the policy's metadata without its weights. Raises as `open_policy`."""
    if choice.remote:
        from pi0fm_client.client import RemotePolicy

        remote = RemotePolicy(choice.policy, connections=1, token=os.environ.get(TOKEN_VARIABLE))
        try:
            return dict(remote.metadata)
        finally:
            remote.close()
    from pi0fm.policy.saved import bundle

    return bundle.metadata(Path(choice.policy), choice.robot)
