"""Tests of damaged frames: each is answered or its connection closed, without leaks or growth."""

import gc
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_policy_server import actions_of, observation_bytes, talk, text_bytes
from websockets.exceptions import ConnectionClosed

from pi0fm.serve.door import RequestReader
from pi0fm_client import wire
from pi0fm_client.errors import ObservationError

FRAMES = [
    observation_bytes(),
    observation_bytes(**{wire.REQUEST_ID: b"\x07", wire.SESSION: text_bytes("arm"), wire.DEADLINE_MS: b"\xcd\x10\x00"}),
    observation_bytes(noise_seed=b"\x05", **{"observation.images.wrist": b"\x81" + text_bytes(wire.JPEG) + b"\xc4\x04\xff\xd8\xff\xe0"}),
]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20) | st.binary(max_size=11), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["prompt", "observation.state", "observation/state", "observation.images.front", wire.REQUEST_ID, wire.SESSION, wire.DEADLINE_MS, "x"]
)


@st.composite
def mutated(draw: Any) -> bytes:
    """A good frame with bytes changed, cut, repeated or put in; or a map of good keys and any values; or any bytes."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=300))
    if kind <= 3:
        return bytes(msgpack.packb(draw(st.dictionaries(KEYS, PLAIN, max_size=6))))
    frame = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(frame) - 1)))
        change = draw(st.integers(0, 3))
        if change == 0 and frame:
            frame[at] = draw(st.integers(0, 255))
        elif change == 1:
            del frame[at : at + draw(st.integers(1, 20))]
        elif change == 2:
            frame[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            frame[at:at] = frame[at : at + draw(st.integers(1, 40))]
    return bytes(frame)


def judged(door: RequestReader, frame: bytes) -> None:
    """The one thing that may come out of the door but an observation is an ObservationError, whose text is bounded."""
    try:
        asked = door.read(frame)
    except ObservationError as error:
        assert 0 < len(str(error)) < 4000, error
        return
    assert asked.deadline_ms is None or asked.deadline_ms > 0
    assert asked.request_id is None or 0 <= asked.request_id < 2**63


@seed(20)
@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_mutated_frames_at_the_door(small_policy: Any, frame: bytes) -> None:
    judged(door_of(small_policy), frame)


def door_of(small_policy: Any) -> RequestReader:
    if not doors:
        doors.append(RequestReader(small_policy.in_memory().observation, 1 << 20))
    return doors[0]


doors: list[RequestReader] = []


def by_numbers(random: np.random.Generator) -> bytes:
    """As `mutated`, a thousand times as fast."""
    frame = bytearray(FRAMES[random.integers(len(FRAMES))])
    for _ in range(random.integers(1, 5)):
        at, length = int(random.integers(len(frame) + 1)), int(random.integers(1, 40))
        change = random.integers(4)
        if change == 0:
            frame[at : at + 1] = random.bytes(1)
        elif change == 1:
            del frame[at : at + length]
        else:
            frame[at:at] = random.bytes(length) if change == 2 else frame[at : at + length]
    return bytes(frame)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_mutated_frames_at_the_door_grow_nothing(small_policy: Any) -> None:
    door, random = door_of(small_policy), np.random.default_rng(20)
    for _ in range(20_000):
        judged(door, by_numbers(random))
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100_000):
            judged(door, by_numbers(random))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20e6, grown  # the tokenizer keeps 4096 prompts


def test_mutated_frames_over_the_socket_disturb_nobody(start_server: Any) -> None:
    server = start_server()
    random = np.random.default_rng(0)
    with talk(server.url) as neighbour:
        neighbour.recv()
        for turn in range(150):
            frame = bytearray(FRAMES[turn % len(FRAMES)])
            for at in random.integers(0, len(frame), 3):
                frame[at] = random.integers(256)
            with talk(server.url) as robot:
                robot.recv()
                robot.send(bytes(frame))
                try:
                    answer = robot.recv(timeout=5)
                    assert isinstance(answer, bytes) or answer.startswith(("error ", "internal error "))
                except ConnectionClosed:
                    pass
            if turn % 10 == 0:
                neighbour.send(observation_bytes(state=float(turn)))
                assert actions_of(neighbour.recv(timeout=5))[0, 0] == turn
