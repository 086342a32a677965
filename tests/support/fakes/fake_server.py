"""A small numpy policy, and a server of it on a free port, in a thread of this process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import uvicorn

from pi0fm.serve import server as serving
from pi0fm.serve.app import create_app
from pi0fm.serve.limits import ServingLimits
from pi0fm_client.errors import ObservationError
from pi0fm_client.types import ActionChunk, Observation

POISON = 666.0
METADATA = {
    "action_horizon": 4,
    "robot_action_dim": 3,
    "state_dim": 3,
    "cameras": {"front": "observation.images.front", "wrist": "observation.images.wrist"},
    "state_key": "observation.state",
    "image_size": [8, 8],
    "embodiment": "fake",
}


@dataclass
class FakePolicy:
    """actions[h, a] = state[a] + h + the front image's first byte + noise(seed); a state that starts with POISON raises.

    An inference takes `seconds`, and waits for the gate, which a test may close. A chunk has `horizon` rows.
    """

    seconds: float = 0.0
    horizon: int = 4
    metadata: dict[str, Any] = field(default_factory=lambda: dict(METADATA))
    batches: list[tuple[int, list[int] | None]] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.metadata["action_horizon"] = self.horizon

    def observation(self, message: Mapping[str, Any]) -> Observation:
        state = message.get("observation.state")
        if not isinstance(state, np.ndarray) or state.shape != (3,):
            raise ObservationError("observation.state must be float32 [3]: send one number for each joint")
        images = {name: message[key] for name, key in METADATA["cameras"].items() if key in message}
        return Observation(images, state.astype(np.float32), str(message.get("prompt", "")))

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        self.batches.append((len(observations), None if noise_seeds is None else list(noise_seeds)))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        assert self.gate.wait(20)
        return [
            self._chunk(observation, None if noise_seeds is None else noise_seeds[index]) for index, observation in enumerate(observations)
        ]

    def _chunk(self, observation: Observation, seed: int | None) -> ActionChunk:
        if observation.state[0] == POISON:
            raise RuntimeError("secret internals at /srv/weights")
        steps = np.arange(self.horizon, dtype=np.float32)[:, None]
        noise = 0.0 if seed is None else np.random.default_rng(seed).normal()
        front = float(observation.images["front"][0, 0, 0]) if "front" in observation.images else 0.0
        return ActionChunk((observation.state + steps + front + noise).astype(np.float32), {"infer_ms": self.seconds * 1e3})


@dataclass
class RunningServer:
    url: str
    policy: FakePolicy
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def leaving() -> Iterator[list[threading.Thread]]:
    """Threads of servers that were told to stop. They are awaited at the end, so that no test pays for a graceful shutdown."""
    threads: list[threading.Thread] = []
    yield threads
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def start_server(leaving: list[threading.Thread]) -> Iterator[StartServer]:
    """`start_server(policy, port=0, **create_app_options)` returns when the server is ready; every server ends with the test."""
    running: list[RunningServer] = []

    def start(policy: Any = None, *, port: int = 0, **options: Any) -> RunningServer:
        policy = policy or FakePolicy()
        seconds = getattr(policy, "seconds", 0.0)
        if isinstance(policy, FakePolicy):
            policy.seconds = 0.0  # the warm-up need not be slow
        if "token" in options:
            options["tokens"] = [options.pop("token")]
        own = {name: options.pop(name) for name in ("tokens", "keys", "admin_token", "load", "log", "live") if name in options}
        certificates = options.pop("certificates", None)
        limits = ServingLimits(**options)
        app = create_app(policy, limits, **own)
        server = serving.make_server(app, limits, certificates)
        bound = serving.bind("127.0.0.1", port)
        url, ready = serving.url_of(bound, encrypted=certificates is not None), threading.Event()

        def work() -> None:
            asyncio.run(serving.serve(server, app, bound, lambda seconds: ready.set()))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert ready.wait(10)
        if isinstance(policy, FakePolicy):
            policy.batches.clear()
            policy.seconds = seconds
        running.append(RunningServer(url, policy, server, thread))
        return running[-1]

    yield start
    for one in running:
        one.server.should_exit = True
        leaving.append(one.thread)


@pytest.fixture
def fake_policy() -> type[FakePolicy]:
    return FakePolicy
