"""Tests of the rest of a robot's chunk, sent with its next observation: the server's answer is the guided policy's."""

import numpy as np
import pytest
from small_policies import small_policy
from test_policy_server import talk

from pi0fm.policy.load_options import GUIDED, HARD_PREFIX, WITHOUT_JACOBIAN
from pi0fm.serve import served
from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.metrics import Metrics
from pi0fm_client import wire
from pi0fm_client.types import ActionPrefix

__all__ = ["small_policy"]
PREFIX = np.array([[1.0, 0.5, -2.0], [1.5, 0.25, -1.0]], np.float32)


def request(policy, **extra):
    state = np.linspace(-1, 1, 4, dtype=np.float32)
    picture = np.full((20, 20, 3), 90, np.uint8)
    return {"observation.images.base": picture, "observation.state": state, "prompt": "press", "noise_seed": 3, **extra}


def ask(server, message):
    with talk(server.url) as robot:
        greeting = wire.unpack(robot.recv())
        robot.send(wire.pack(message))
        answer = robot.recv(timeout=20)
    return greeting, answer if isinstance(answer, str) else wire.unpack(answer)["actions"]


@pytest.fixture(scope="module")
def policy(small_policy):
    return small_policy.in_memory()


def test_a_chunk_over_the_network_is_led_as_one_in_this_process(start_server, policy):
    server = start_server(policy)
    greeting, led = ask(server, request(policy, **{wire.ACTION_PREFIX: PREFIX, wire.INFERENCE_DELAY: 1}))
    assert {wire.ACTION_PREFIX, wire.INFERENCE_DELAY} <= set(greeting[wire.EXTENSIONS])
    flat = {key: value for key, value in request(policy).items() if key != "noise_seed"}
    observation = policy.observation(flat)
    expected = policy.infer_batch([observation], [3], prefixes=[ActionPrefix(PREFIX, 1)])[0].actions
    np.testing.assert_allclose(led, expected, atol=1e-5)
    free = ask(server, request(policy))[1]
    np.testing.assert_allclose(free, policy.infer_batch([observation], [3])[0].actions, atol=1e-5)
    assert np.abs(led - free).max() > 1e-2


def test_a_policy_that_was_trained_for_it_keeps_the_rows_that_are_executed_meanwhile(start_server, small_policy):
    plain = small_policy.in_memory()
    network = (plain.model, plain.flow, plain.chain, plain.metadata, plain.device, plain.dtype)
    server = start_server(type(plain)(*network, guidance=HARD_PREFIX, max_delay=1))
    greeting, held = ask(server, request(plain, **{wire.ACTION_PREFIX: PREFIX, wire.INFERENCE_DELAY: 1}))
    assert wire.ACTION_PREFIX in greeting[wire.EXTENSIONS] and np.array_equal(held[:1], PREFIX[:1])
    later = ask(server, request(plain, **{wire.ACTION_PREFIX: PREFIX, wire.INFERENCE_DELAY: 2}))[1]
    np.testing.assert_allclose(later, held, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({wire.INFERENCE_DELAY: 1}, "pi0fm/action_prefix must be an array, found NoneType"),
        ({wire.ACTION_PREFIX: "all"}, "must be an array, found str"),
        ({wire.ACTION_PREFIX: PREFIX[:, :2]}, "an action prefix must be numbers [1 to 4, 3], found float32 [2, 2]"),
        ({wire.ACTION_PREFIX: PREFIX * np.inf}, "must be finite"),
        ({wire.ACTION_PREFIX: PREFIX * 1e30}, "near the data set's actions, found -2e+30 in row 0"),
        ({wire.ACTION_PREFIX: PREFIX, wire.INFERENCE_DELAY: 3}, "within its action prefix of 2 rows, found 3"),
        ({wire.ACTION_PREFIX: PREFIX, wire.INFERENCE_DELAY: -1}, "pi0fm/inference_delay must be a whole number"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused_at_the_door(start_server, policy, extra, line):
    assert line in ask(start_server(policy), request(policy, **extra))[1]


@pytest.mark.parametrize(
    ("guidance", "compiled", "led", "told"),
    [
        (WITHOUT_JACOBIAN, "kernels", {"guidance": WITHOUT_JACOBIAN, "compile": "off"}, "computed without --compile kernels"),
        (HARD_PREFIX, "kernels", {"guidance": HARD_PREFIX, "compile": "kernels"}, None),
        (GUIDED, "off", {"guidance": GUIDED, "compile": "off"}, None),
        (GUIDED, "kernels", None, "no real-time chunking: guided needs the derivative of a velocity that is not compiled"),
    ],
)
def test_a_chunk_that_is_led_says_whether_it_is_compiled(small_policy, caplog, guidance, compiled, led, told):
    plain = small_policy.in_memory()
    network = (plain.model, plain.flow, plain.chain, plain.metadata, plain.device, plain.dtype)
    policy = type(plain)(*network, guidance=guidance, max_delay=1)
    policy.sampler.compile = compiled  # nothing is inferred here, so nothing needs a compiler
    with caplog.at_level("WARNING", served.__name__):
        serving = served.Serving(policy, ServingLimits(), Metrics(), None, lambda _: [])
    try:
        assert wire.unpack(serving.now.greeting).get("realtime") == led
        assert [told in record.getMessage() for record in caplog.records] == ([True] if told else [])
    finally:
        serving.now.batcher.close()


def test_a_policy_that_cannot_be_led_knows_no_such_extension(start_server):
    """Of another path; the fake one has no way to take a prefix at all."""
    server = start_server()
    message = {"observation.state": np.zeros(3, np.float32), "prompt": "x", wire.ACTION_PREFIX: PREFIX}
    greeting, answer = ask(server, message)
    assert wire.ACTION_PREFIX not in greeting[wire.EXTENSIONS] and "unknown extension 'pi0fm/action_prefix'" in answer
