"""Overhead of the policy server with one robot, and its gain by batching with eight robots, on loopback.

Owns: the two servers, the robots that query them, the figures. Does not know: how either server works.

    overhead_ms          one robot at 20 Hz: from sending an observation to receiving its reply, without the policy's `infer_ms`
    throughput_ratio_8   eight robots that ask again at once: replies per second / those of a server of openpi's design, which infers for
                         one connection at a time in its event loop; the same bundle, frames, clients and threads, alternating
    batch_gain_8         time of eight inferences one after the other / time of one batch of eight, in one process without a server
    loop_rate_ratio      a 50-Hz control loop of the executor with 100 ms of delay added to each reply: its commands per second / 50
    bare_loop_rate_ratio the same for a loop that only sleeps: the rate that this machine reaches at that time
    expired_applied      commands of the control loop applied more than EXPIRED control steps from their intended time
    hold_after_steps     after the server was killed: control steps from the time of the last action to the standstill
    fairness_8           eight robots on our server: replies to the robot that got the fewest / mean replies

Servers and robots are separate processes. A frame holds three pictures of 224 x 224 pixels and is packed once, to keep the robots' work
small. The policy is random, of the tiny preset.
"""

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as websocket_server
from websockets.sync.client import connect

from pi0fm.bench import soak
from pi0fm.bench.config import ServingOptions
from pi0fm.bench.harness.cases import CAMERAS, random_network, random_robot
from pi0fm.bench.harness.measure import BenchReport
from pi0fm.flow.config import FlowConfig
from pi0fm.models.config import preset
from pi0fm.policy.saved import bundle
from pi0fm.processes import end_with_parent
from pi0fm.serve import server
from pi0fm.serve.app import create_app
from pi0fm.serve.limits import ServingLimits
from pi0fm_client import Executor, PolicyClient, wire
from pi0fm_client.types import ActionChunk

SIDE, WIDTH = 224, 7
ROBOTS, HZ = 8, 20.0
LOOP_HZ, LOOP_DELAY = 50.0, 0.1
EXPIRED = 1.5  # control steps: observation and command may each come 0.75 before or 0.5 after the start of their step
SETTLING = 10  # warm-up requests
# a server that infers for one connection at a time makes the last of eight wait for its handshake
CONNECTION: dict[str, Any] = {"compression": None, "max_size": None, "proxy": None, "ping_interval": None, "open_timeout": 60}


def measure(options: ServingOptions) -> BenchReport:
    """Measure both servers and the control loop."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        _save_random_policy(path, options.num_flow_steps)
        gain = _batch_gain(path, options)
        with (
            _server_process(_serve_ours, path, options.threads) as ours,
            _server_process(_serve_one_at_a_time, path, options.threads) as theirs,
        ):
            overhead, inside = _lone_robot(ours, options.seconds)
            counts = [[_robots(url, options.seconds) for url in (ours, theirs)] for _ in range(options.rounds)]
    loop = _control_loop(options.seconds)
    answers = np.array(counts, dtype=np.float64)  # [rounds, servers, robots]
    rates = answers.sum(axis=2) / options.seconds
    mine = answers[:, 0].sum(axis=0)
    return BenchReport(
        {
            "overhead_ms": {name: float(np.quantile(overhead, share)) for name, share in (("p50", 0.5), ("p99", 0.99))},
            "server_overhead_ms": {name: float(np.quantile(inside, share)) for name, share in (("p50", 0.5), ("p99", 0.99))},
            "throughput_ratio_8": float(np.median(rates[:, 0] / rates[:, 1])),
            "batch_gain_8": gain,
            "fairness_8": float(mine.min() / mine.mean()),
            **loop,
            "answers_per_second": {"ours": float(np.median(rates[:, 0])), "one_at_a_time": float(np.median(rates[:, 1]))},
            "requests_of_the_lone_robot": len(overhead),
            "seconds": options.seconds,
            "rounds": options.rounds,
            "threads": options.threads,
        }
    )


def _batch_gain(path: Path, options: ServingOptions) -> float:
    """Median ratio of the time of ROBOTS inferences to that of one batch of as many, alternating."""
    policy = bundle.load(path, threads=options.threads)
    observation = policy.observation(wire.unpack(_frame()))

    def seconds(batch: int) -> float:
        began = time.perf_counter()
        for _ in range(ROBOTS // batch):
            policy.infer_batch([observation] * batch)
        return time.perf_counter() - began

    ratios: list[float] = []
    until = time.perf_counter() + options.seconds
    while time.perf_counter() < until or len(ratios) < 3:
        ratios.append(seconds(1) / seconds(ROBOTS))
    return float(np.median(ratios[1:]))


def _lone_robot(url: str, seconds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each request at HZ in addition to `infer_ms`: measured at the robot, and within the server."""
    frame = _frame()
    seen: list[float] = []
    inside: list[float] = []
    with connect(url, **CONNECTION) as robot:
        robot.recv()
        end = time.perf_counter() + seconds
        while (sent := time.perf_counter()) < end or len(seen) <= SETTLING:
            robot.send(frame)
            reply = robot.recv()
            taken = (time.perf_counter() - sent) * 1e3
            assert isinstance(reply, bytes), reply
            found = wire.unpack(reply)
            infer = found["policy_timing"]["infer_ms"]
            seen.append(taken - infer)
            inside.append(found["server_timing"]["infer_ms"] - infer)
            time.sleep(max(0.0, sent + 1 / HZ - time.perf_counter()))
    return seen[SETTLING:], inside[SETTLING:]


@dataclass
class _Delayed:
    """Policy with LOOP_DELAY seconds added to each answer."""

    policy: PolicyClient

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**self.policy.metadata, "fps": LOOP_HZ}

    def infer(self, observation: Mapping[str, Any]) -> ActionChunk:
        time.sleep(LOOP_DELAY)
        return self.policy.infer(observation)


def _control_loop(seconds: int) -> dict[str, Any]:
    """Drive a robot whose actions are their intended times, in control steps, and kill the server at the end."""
    bare = _loop_rate(seconds, lambda: None, lambda: time.sleep(1 / LOOP_HZ - time.monotonic() % (1 / LOOP_HZ)))
    with (
        soak.step_server(0.002) as (url, process),
        PolicyClient(url, timeout_seconds=1.0) as policy,
        Executor(_Delayed(policy), control_hz=LOOP_HZ, initial_command=[0.0, 0.0], execution_horizon=8) as executor,
    ):
        began, expired, last = time.monotonic(), 0, 0.0

        def step() -> float:
            """Apply one command; returns the time, in control steps."""
            nonlocal expired, last
            executor.observe(lambda: soak.message((time.monotonic() - began) * LOOP_HZ, 0.0))
            action, now = executor.next(), (time.monotonic() - began) * LOOP_HZ
            if not executor.command.held:
                expired += abs(now - action[0]) > EXPIRED
                last = float(action[0])
            return now

        rate, holds = _loop_rate(seconds, step, executor.pace), executor.report.holds
        process.kill()
        until = time.monotonic() + 5
        while (now := step()) and not executor.command.held and time.monotonic() < until:
            executor.pace()
    figures = {"loop_rate_ratio": rate, "bare_loop_rate_ratio": bare, "expired_applied": int(expired)}
    return figures | {"hold_after_steps": now - last, "loop_holds": holds}


def _loop_rate(seconds: int, step: Callable[[], object], pace: Callable[[], object]) -> float:
    """Rate of a loop relative to LOOP_HZ."""
    began, steps = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        step()
        steps += 1
        pace()
    return steps / passed / LOOP_HZ


def _robots(url: str, seconds: int) -> list[int]:
    """Number of replies to each of ROBOTS in `seconds`."""
    frame = _frame()

    def ask(_: int) -> int:
        with connect(url, **CONNECTION) as robot:
            robot.recv()
            robot.send(frame)
            assert isinstance(reply := robot.recv(), bytes), reply
            count, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                robot.send(frame)
                assert isinstance(reply := robot.recv(), bytes), reply
                count += 1
        return count

    with ThreadPoolExecutor(ROBOTS) as threads:
        return list(threads.map(ask, range(ROBOTS)))


@contextmanager
def _server_process(target: Any, path: Path, threads: int) -> Iterator[str]:
    """Run a server in a separate process and give its address."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(os.getpid(), path, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()  # EOFError if the server could not start; it has printed why
    finally:
        process.kill()
        process.join()


def _serve_ours(parent: int, path: Path, threads: int, ready: Connection) -> None:
    end_with_parent(parent)
    policy, options, bound = bundle.load(path, threads=threads), ServingLimits(), server.bind("127.0.0.1", 0)
    app = create_app(policy, options)
    asyncio.run(server.serve(server.make_server(app, options), app, bound, lambda _: ready.send(server.url_of(bound))))


def _serve_one_at_a_time(parent: int, path: Path, threads: int, ready: Connection) -> None:
    """Run a minimal version of openpi's WebsocketPolicyServer."""
    end_with_parent(parent)
    policy = bundle.load(path, threads=threads)
    policy.infer(wire.unpack(_frame()))

    async def answer(robot: ServerConnection) -> None:
        await robot.send(wire.pack(policy.metadata))
        async for frame in robot:
            assert isinstance(frame, bytes)
            chunk = policy.infer(wire.unpack(frame))
            await robot.send(wire.pack({"actions": chunk.actions, "policy_timing": dict(chunk.timings)}))

    async def main() -> None:
        async with websocket_server(answer, "127.0.0.1", 0, compression=None, max_size=None) as running:
            ready.send(f"ws://127.0.0.1:{running.sockets[0].getsockname()[1]}")
            await running.serve_forever()

    asyncio.run(main())


def _frame() -> bytes:
    random = np.random.default_rng(0)
    pictures = {f"observation.images.{name}": random.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for name in CAMERAS}
    return wire.pack({**pictures, "observation.state": np.zeros(WIDTH, np.float32), "prompt": "press the button"})


def _save_random_policy(path: Path, num_flow_steps: int) -> None:
    config, stats = random_robot(preset("tiny"), len(CAMERAS), flow=FlowConfig(num_flow_steps=num_flow_steps))
    bundle.save(path, random_network(config.model, torch.device("cpu")).state_dict(), config, stats)
