"""pi0fm's client for a robot's computer: ask a policy server for actions with numpy, msgpack and websockets alone.

    from pi0fm_client import Executor, PolicyClient
    with PolicyClient("ws://HOST:8000") as policy:
        chunk = policy.infer(observation)

It imports nothing of pi0fm, which stands on it for types, errors and messages. These names are loaded when they are first used, so that
`pi0fm_client.errors` costs no import of websockets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi0fm_client.client import AsyncPolicyClient, PolicyClient, RemotePolicy
    from pi0fm_client.errors import ConfigError, ObservationError, Pi0fmError, ServingError
    from pi0fm_client.execution import Executor
    from pi0fm_client.safety import Limits, ObservationCheck

_ERRORS = ("ConfigError", "ObservationError", "Pi0fmError", "ServingError")
_MODULES = {"Executor": "execution", "Limits": "safety", "ObservationCheck": "safety", **dict.fromkeys(_ERRORS, "errors")}
__all__ = [
    "AsyncPolicyClient",
    "ConfigError",
    "Executor",
    "Limits",
    "ObservationCheck",
    "ObservationError",
    "Pi0fmError",
    "PolicyClient",
    "RemotePolicy",
    "ServingError",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pi0fm_client.{_MODULES.get(name, 'client')}"), name)
