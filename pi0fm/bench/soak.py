"""Endurance test of the policy server under faults for minutes: correct answers, no crash, constant memory, recovery.

Owns: the faults, a policy whose answers can be checked, the figures. Does not know: how the server handles faults.

    clean robots     query by pi0fm_client at HZ and check every number of every answer
    dirty robots     query by a plain WebSocket; one frame in 100 is damaged
    storms           200 sockets at once that send nothing or half a request and stay open, and upgraded ones that send nothing
    killed           connections that are reset in the middle of a frame
    paused           once, the model does not answer for `pause_seconds`: robots are refused, /healthz reports it, and all recover

    wrong_answers      wrong answers to clean requests and to undamaged ones of dirty robots
    recovery_seconds   from the end of the pause to the first right answer of the slowest clean robot; chunk_seconds: a chunk's duration
    memory_mb          resident memory of the server: medians of the second tenth of the time and of the last
"""

import asyncio
import os
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, Pipe
from typing import Any, ClassVar

import numpy as np
import psutil
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from pi0fm import progress
from pi0fm.bench.config import SoakOptions
from pi0fm.bench.harness.measure import BenchReport
from pi0fm.processes import end_with_parent
from pi0fm.serve import server
from pi0fm.serve.app import create_app
from pi0fm.serve.limits import ServingLimits
from pi0fm_client import PolicyClient, wire
from pi0fm_client.errors import ObservationError, ServingError
from pi0fm_client.types import ActionChunk, Observation

CLEAN, DIRTY, HZ = 4, 4, 10.0
GARBAGE = 0.01  # of a dirty robot's frames
STORM, STORM_SECONDS = 200, 10.0
SIDE = 64


class StepPolicy:
    """Policy with actions[h] = (state[0] + h, state[1]): state[0] identifies the request, state[1] the robot.

    An inference takes `seconds`; `pause` delays all inferences.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "action_horizon": 16,
        "robot_action_dim": 2,
        "state_dim": 2,
        "cameras": {"base": "observation.images.base"},
        "state_key": "observation.state",
        "image_size": [SIDE, SIDE],
        "embodiment": "steps",
        "fps": HZ,
    }

    def __init__(self, seconds: float) -> None:
        self._seconds, self._until = seconds, 0.0

    def pause(self, seconds: float) -> None:
        """Answer nothing for `seconds`."""
        self._until = time.monotonic() + seconds

    def observation(self, flat: Mapping[str, Any]) -> Observation:
        """Return the observation in a flat map. Raises ObservationError for wrong contents."""
        state, picture = flat.get("observation.state"), flat.get("observation.images.base")
        if not isinstance(state, np.ndarray) or state.shape != (2,) or state.dtype.kind != "f" or not np.isfinite(state).all():
            raise ObservationError("observation.state must be two finite numbers")
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3:
            raise ObservationError("observation.images.base must be a picture")
        return Observation({"base": picture}, state.astype(np.float64), str(flat.get("prompt", ""))[:100])  # type: ignore[arg-type]

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        """Infer a chunk for each observation."""
        began = time.perf_counter()
        time.sleep(max(self._seconds, self._until - time.monotonic()))
        found = [expected(*observation.state) for observation in observations]
        return [ActionChunk(actions, {"infer_ms": 1e3 * (time.perf_counter() - began)}) for actions in found]


def expected(step: float, robot: float) -> Any:
    """Return the actions of a StepPolicy."""
    rows = np.arange(StepPolicy.metadata["action_horizon"], dtype=np.float64)
    return np.stack([step + rows, np.full_like(rows, robot)], axis=1).astype(np.float32)


def message(step: float, robot: float) -> dict[str, Any]:
    """Return the observation with that state."""
    picture = np.full((SIDE, SIDE, 3), int(step) % 256, np.uint8)
    return {"observation.images.base": picture, "observation.state": np.array([step, robot], np.float32), "prompt": "go on"}


@contextmanager
def step_server(seconds: float, pause_seconds: float = 0.0) -> Iterator[tuple[str, Any]]:
    """Run a server of StepPolicy and give its address and process; SIGUSR1 pauses its model."""
    ours, theirs = Pipe()
    process = get_context("spawn").Process(target=_serve, args=(os.getpid(), seconds, pause_seconds, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv(), process
    finally:
        process.kill()
        process.join()


def _serve(parent: int, seconds: float, pause_seconds: float, ready: Connection) -> None:
    end_with_parent(parent)
    policy, options, bound = StepPolicy(seconds), ServingLimits(), server.bind("127.0.0.1", 0)
    signal.signal(signal.SIGUSR1, lambda *_: policy.pause(pause_seconds))
    app = create_app(policy, options)
    asyncio.run(server.serve(server.make_server(app, options), app, bound, lambda _: ready.send(server.url_of(bound))))


@dataclass
class _Soak:
    """State shared by all threads. right: by clean robot, the times of its right answers."""

    url: str
    end: float
    counts: Counter[str] = field(default_factory=Counter)
    right: list[list[float]] = field(default_factory=lambda: [[] for _ in range(CLEAN)])
    health: list[float] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def running(self) -> bool:
        return time.monotonic() < self.end

    def count(self, **counts: int) -> None:
        self.counts.update(counts)


def measure(options: SoakOptions) -> BenchReport:
    """Run the robots and all faults at once."""
    with step_server(0.005, options.pause_seconds) as (url, process):
        soak = _Soak(url, time.monotonic() + options.seconds)
        work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(_storms, (soak,)), (_kills, (soak,)), (_health, (soak,))]
        work += [(_clean_robot, (soak, number)) for number in range(CLEAN)]
        work += [(_dirty_robot, (soak, number)) for number in range(DIRTY)]
        threads = [threading.Thread(target=target, args=arguments, daemon=True) for target, arguments in work]
        for thread in threads:
            thread.start()
        memory, resumed = _watch(soak, process, options)
        for thread in threads:
            thread.join(30)
        alive = process.is_alive()
    tenth = max(1, len(memory) // 10)
    begin, last = np.median(memory[tenth : 2 * tenth]), np.median(memory[-tenth:])
    recovered = [next((moment - resumed for moment in moments if moment > resumed), float("inf")) for moments in soak.right]
    return BenchReport(
        {
            "seconds": options.seconds,
            "crashed": not alive,
            "wrong_answers": soak.counts["wrong"],
            "recovery_seconds": max(recovered),
            "chunk_seconds": StepPolicy.metadata["action_horizon"] / HZ,
            "memory_mb": {"begin": float(begin), "end": float(last)},
            "healthz_ms": {name: float(np.quantile(soak.health, share)) for name, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0))},
            "right_answers": soak.counts["right"],
            "not_answered": soak.counts["not_answered"],
            "done_to_it": {name: soak.counts[name] for name in ("garbage_frames", "storms", "silent_sockets", "killed_in_a_frame")},
        }
    )


def _watch(soak: _Soak, process: Any, options: SoakOptions) -> tuple[list[float], float]:
    """Sample the server's memory every 0.5 s and pause its model once; returns MiB, and the time when the pause ended."""
    memory: list[float] = []
    began, resumed = time.monotonic(), float("inf")
    seen = psutil.Process(process.pid)
    with progress.step("soak", options.seconds) as step:
        while soak.running() and process.is_alive():
            passed = time.monotonic() - began
            if resumed == float("inf") and passed > options.seconds / 3:
                os.kill(process.pid, signal.SIGUSR1)
                resumed = time.monotonic() + options.pause_seconds
            memory.append(seen.memory_info().rss / 2**20)
            time.sleep(0.5)
            step.advance(int(time.monotonic() - began) - int(passed), f"{soak.counts['right']} right, {soak.counts['wrong']} wrong")
    return memory, resumed


def _clean_robot(soak: _Soak, number: int) -> None:
    count = 0.0
    while soak.running():
        try:
            with PolicyClient(soak.url, timeout_seconds=2.0) as policy:
                while soak.running():
                    count += 1
                    began = time.monotonic()
                    try:
                        right = np.array_equal(policy.infer(message(count, number)).actions, expected(count, number))
                        soak.count(**{"right" if right else "wrong": 1})
                        soak.right[number].append(time.monotonic())
                    except ServingError:
                        soak.count(not_answered=1)
                    time.sleep(max(0.0, began + 1 / HZ - time.monotonic()))
        except ServingError:
            soak.count(not_answered=1)


def _dirty_robot(soak: _Soak, number: int) -> None:
    random, count, own = np.random.default_rng(number), 0.0, 100.0 + number
    while soak.running():
        with suppress(OSError, WebSocketException), connect(soak.url, compression=None, proxy=None, open_timeout=5) as robot:
            robot.recv(timeout=5)
            while soak.running():
                count += 1
                frame = bytearray(wire.pack(message(count, own)))
                damaged = random.random() < GARBAGE
                if damaged:
                    soak.count(garbage_frames=1)
                    for place in random.integers(0, len(frame), 20):
                        frame[place] = random.integers(0, 256)
                    frame = frame[: random.integers(1, len(frame) + 1)]
                robot.send(bytes(frame))
                reply = robot.recv(timeout=2)
                if not damaged and isinstance(reply, bytes):
                    right = np.array_equal(wire.unpack(reply)["actions"], expected(count, own))
                    soak.count(**{"right" if right else "wrong": 1})
                time.sleep(1 / HZ)


def _storms(soak: _Soak) -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    heads = (b"", b"GET / HT", upgrade, upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    while soak.running():
        soak.count(storms=1)
        held = []
        for number in range(STORM):
            with suppress(OSError):
                one = socket.create_connection(("127.0.0.1", soak.port), timeout=2)
                one.sendall(heads[number % len(heads)])
                held.append(one)
                soak.count(silent_sockets=1)
        time.sleep(STORM_SECONDS / 2)
        for one in held:
            one.close()
        time.sleep(STORM_SECONDS / 2)


def _kills(soak: _Soak) -> None:
    """Reset a connection in the middle of a frame every second."""
    frame = wire.pack(message(0.0, 999.0))
    while soak.running():
        with suppress(OSError, WebSocketException):
            robot = connect(soak.url, compression=None, proxy=None, open_timeout=5)
            robot.recv(timeout=5)
            head = b"\x82\xfe" + struct.pack(">H", len(frame)) + b"\x00\x00\x00\x00"  # a masked binary frame, its mask zero
            robot.socket.sendall(head + frame[: len(frame) // 2])
            robot.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset, as a kill does
            robot.socket.close()
            soak.count(killed_in_a_frame=1)
        time.sleep(1.0)


def _health(soak: _Soak) -> None:
    """Request /healthz every 0.25 s; 503 counts as an answer."""
    while soak.running():
        began = time.monotonic()
        with suppress(OSError):
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(soak.url.replace("ws://", "http://") + "/healthz", timeout=20).close()  # noqa: S310 - our own
            soak.health.append(1e3 * (time.monotonic() - began))
        time.sleep(0.25)
