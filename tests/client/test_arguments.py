"""Every argument of every public constructor is honoured, or refused at construction by one of the package's own errors."""

import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pi0fm_client
from pi0fm_client import AsyncPolicyClient, Executor, Limits, ObservationCheck, PolicyClient, RemotePolicy, errors
from pi0fm_client.errors import ConfigError, ObservationError, Pi0fmError
from pi0fm_client.types import ActionChunk

METADATA = {"action_horizon": 8, "robot_action_dim": 2, "state_dim": 3, "cameras": {"base": "image"}, "state_key": "state"}


class Policy:
    """Answers zeros."""

    metadata: Any = METADATA

    def infer(self, observation: Any) -> ActionChunk:
        return ActionChunk(np.zeros((8, 2), np.float32))


class Unshowable:
    """What not even an error message can show."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


NOBODY = "ws://127.0.0.1:9"
QUICK = {"connect_timeout_seconds": 0.01}
CONSTRUCTORS: list[tuple[Any, dict[str, Any]]] = [
    (AsyncPolicyClient, {"url": NOBODY}),
    (PolicyClient, {"url": NOBODY, **QUICK}),
    (RemotePolicy, {"url": NOBODY, **QUICK}),
    (Executor, {"policy": Policy(), "control_hz": 50, "initial_command": [0.0, 0.0]}),
    (ObservationCheck, {"metadata": METADATA}),
    (Limits.read, {"source": None, "action_dim": 2}),
    (Limits, dict.fromkeys(("low", "high", "velocity", "acceleration"), np.ones(2)) | {"increments": np.zeros(2, np.bool_)}),
]
WRONG: list[Any] = [
    *("abc", "c.pem", "", b"\xff", "ünïcode\n", "/no/such/file.json"),
    *(-1, 0, 1.5, 10**400, -(10**30), float("nan"), float("inf"), 1e300, 2j, True, None),
    *([9], [-1], [1.5], [0, 0], [[1], [2, 3]], ["x"], [None], [[]], (), {}, {"low": 1}, {1: 2}, {"a": object()}, {3}),
    *(np.zeros(7), np.array(["a"]), np.array([{}]), np.float32(0.5), np.zeros((2, 2)), np.array(3)),
    *(object(), Unshowable(), lambda: None, Path("nowhere.json"), Policy, type),
]


@pytest.mark.parametrize(("make", "usual"), CONSTRUCTORS, ids=lambda case: getattr(case, "__qualname__", ""))
def test_each_argument_is_honoured_or_refused_in_our_words(make: Any, usual: dict[str, Any]) -> None:
    names = [name for name in inspect.signature(make).parameters if name != "where"]
    assert len(names) >= 2 or make is Limits.read
    refused = 0
    for name in names:
        for value in WRONG:
            began = time.monotonic()
            try:
                made = make(**{**usual, name: value})
            except Pi0fmError as error:
                text, refused = str(error), refused + 1
                assert text and "\n" not in text and len(text) < 500 and "Traceback" not in text
            else:
                if make in (Executor, RemotePolicy, PolicyClient):
                    made.close()
                if make is Executor and name == "execution_horizon":
                    assert value is None or type(value) in (int, bool)
            assert time.monotonic() - began < 2
    assert refused > 20 * len(names) * 0.5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"initial_command": "abc"}, r"initial_command must be 2 finite numbers, found 'abc': type \[0\.0"),
        ({"relative_to_state": [9]}, r"relative_to_state must be dimensions below 2, .* found \[9\]"),
        ({"relative_to_state": [-1]}, r"relative_to_state must be dimensions below 2, .* found \[-1\]"),
        ({"execution_horizon": 1.5}, r"execution_horizon must be a whole number in 1 \.\. 8, found 1\.5: type 1"),
        ({"execution_horizon": True}, "execution_horizon must be a whole number"),
        ({"limits": 5}, "limits may hold low, high.*, found 5"),
        ({"limits": {"increments": [-1]}}, "limits: increments must be dimensions below 2"),
        ({"cameras": "base"}, "cameras must be a list of names, found 'base'"),
        ({"cameras": []}, "cameras must name one camera or more that suffice, found none"),
        ({"clock": 3}, "clock must be a function"),
        ({"policy": 3}, r"policy\.infer must be a function"),
    ],
)
def test_a_refusal_names_the_argument_and_what_to_type(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Executor(**{"policy": Policy(), "control_hz": 50, "initial_command": [0.0, 0.0], **options})


def test_a_path_is_no_tls_context() -> None:
    with pytest.raises(ConfigError, match=r"type tls=ssl\.create_default_context\(cafile='c\.pem'\)"):
        PolicyClient("wss://127.0.0.1:9", tls="c.pem")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"action_horizon": "16"},
        {"robot_action_dim": 0},
        {"extensions": [["x"]]},
        {"cameras": ["base"]},
        {"state_range": {"min": [0]}},
        {"limits": [1]},
        {"fps": "fast"},
    ],
)
def test_metadata_of_a_foreign_server_is_refused_where_it_is_read(wrong: dict[str, Any]) -> None:
    policy = Policy()
    policy.metadata = {**METADATA, **wrong}
    with pytest.raises(ConfigError):
        Executor(policy, control_hz=50, initial_command=[0.0, 0.0])


def test_the_errors_of_a_control_loop_are_names_of_the_package() -> None:
    assert pi0fm_client.ObservationError is ObservationError is errors.ObservationError
    assert all(getattr(pi0fm_client, name).__name__ == name for name in pi0fm_client.__all__)
