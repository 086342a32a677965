"""Tests of a calibrated policy's alarm over the network: sent only to clients with extensions."""

import numpy as np
import pytest
from test_policy_server import talk
from test_realtime_chunking import request

from pi0fm.policy.saved.calibration import Calibration
from pi0fm_client import PolicyClient, wire


@pytest.fixture
def calibrated(small_policy):
    """Any spread raises its alarm."""
    plain = small_policy.in_memory()
    alarm = Calibration(0.0, 0.1, 20, 90, 2, "demos", "0" * 16, "robot", "euler, 4 steps")
    network = (plain.model, plain.flow, plain.chain, {**plain.metadata, "alarm": alarm.metadata()}, plain.device, plain.dtype)
    return type(plain)(*network, alarm=alarm)


def replies(url, policy):
    with talk(url) as robot:
        greeting = wire.unpack(robot.recv())
        found = []
        for extra in ({}, {wire.REQUEST_ID: 7}, {wire.NUM_CANDIDATES: 2}):
            robot.send(wire.pack(request(policy, **extra)))
            found.append(wire.unpack(robot.recv(timeout=20)))
    return greeting, found


def test_the_alarm_and_the_uncertainty_go_to_those_who_sent_an_extension(start_server, calibrated):
    greeting, (old, named, candidates) = replies(start_server(calibrated).url, calibrated)
    assert greeting["alarm"] == {"threshold": 0.0, "false_alarm_rate": 0.1, "episodes": 20} and wire.ALARM in greeting[wire.EXTENSIONS]
    assert not any(key.startswith(wire.PREFIX) for key in old)
    assert named[wire.ALARM] == candidates[wire.ALARM] == 1 and named[wire.UNCERTAINTY] > 0
    np.testing.assert_allclose(old["actions"], named["actions"], atol=1e-5)


def test_a_policy_that_is_not_calibrated_tells_no_alarm(start_server, small_policy):
    plain = small_policy.in_memory()
    greeting, (_, named, _) = replies(start_server(plain).url, plain)
    assert wire.ALARM not in greeting[wire.EXTENSIONS] and wire.ALARM not in named and named[wire.UNCERTAINTY] > 0


def test_the_client_reads_it_from_a_chunk(start_server, calibrated):
    message = {key: value for key, value in request(calibrated).items() if key != "noise_seed"}
    with PolicyClient(start_server(calibrated).url, timeout_seconds=20.0) as client:
        assert client.infer(message).scores["alarm"] == 1.0
