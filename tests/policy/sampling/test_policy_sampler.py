"""Tests that caching, compiling and recording a network change no chunk."""

import pytest
import torch
from small_pi0 import BOTH, LIKE_PI0, LIKE_PI05, network, observation, question

from pi0fm.flow.checks import FlowError
from pi0fm.flow.committed import held_rows
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.policy.sampling.cuda_graphs import KEPT, Graphs
from pi0fm.policy.sampling.sampler import Sampler, refuse_compile
from pi0fm_client.errors import ConfigError

CPU = torch.device("cpu")


def flow(solver="euler"):
    return FlowMatching.from_config(FlowConfig(solver=solver, num_flow_steps=4))


def made(config, compile="off", dtype=torch.float32):
    return Sampler(network(config), flow(), CPU, dtype, compile)


@pytest.mark.parametrize("name", list(BOTH))
def test_a_chunk_is_the_solver_s_on_the_plain_network(name):
    model, noise = network(BOTH[name]), question()[0]
    mask = torch.ones_like(noise, dtype=torch.bool)
    mask[..., -1] = False
    with torch.no_grad():
        cache = model.encode_prefix(observation())
        expected = flow().sample(lambda x, t: model.velocity(cache, observation().state, x, t), noise, mask=mask)
    sampler = Sampler(model, flow(), CPU, torch.float32)
    for _ in range(2):  # the second call finds its flow times made
        torch.testing.assert_close(sampler(observation(), noise, mask), expected, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_made_of_a_flow_time_is_made_once():
    sampler, noise = made(LIKE_PI05), question()[0]
    mask, calls = torch.ones_like(noise, dtype=torch.bool), []
    for norm in (module for name, module in sampler.model.named_modules() if name.endswith("modulation")):
        norm.register_forward_hook(lambda *_: calls.append(1))
    sampler(observation(), noise, mask)
    once = len(calls)
    sampler(observation(), noise, mask)
    assert once == len(calls) == 4 * (2 * LIKE_PI05.decoder.depth + 1)


@pytest.mark.parametrize(
    ("word", "device", "solver", "rule"),
    [
        ("kernel", "cpu", "euler", "did you mean 'kernels'"),
        ("graph", "cpu", "euler", "found device cpu; type --compile kernels"),
        ("graph", "cuda", "dopri5", "found dopri5; type --compile kernels"),
        ("graph", "cuda", "ancestral", "found ancestral"),
    ],
)
def test_what_cannot_be_compiled_is_refused(word, device, solver, rule):
    with pytest.raises(ConfigError, match=rule):
        refuse_compile(word, torch.device(device), flow(solver))


def test_a_chunk_that_is_not_finite_is_refused():
    sampler, noise = made(LIKE_PI0), question()[0]
    with pytest.raises(FlowError):
        sampler(observation(), torch.full_like(noise, torch.nan), torch.ones_like(noise, dtype=torch.bool))


def test_a_graph_sees_what_its_buffers_hold():
    """Each shape is recorded once; every call copies its inputs into the buffers, and its answer is its own."""
    sampler, recorded = made(LIKE_PI0), []

    def record(call):
        recorded.append(call)
        return call

    graphs = Graphs(sampler._recorded, CPU, record)
    seen, noise = observation(), question()[0]
    mask = torch.ones_like(noise, dtype=torch.bool)
    (first,), (second,) = (graphs(seen, (False, False), factor * noise, mask) for factor in (1, 2))
    torch.testing.assert_close(first, sampler(seen, noise, mask), rtol=0, atol=1e-6)
    torch.testing.assert_close(second, sampler(seen, 2 * noise, mask), rtol=0, atol=1e-6)
    assert len(recorded) == 1 and not torch.equal(first, second)
    mask[..., -1] = False
    assert (graphs(seen, (False, False), noise, mask)[0][..., -1] == 0).all()
    assert len(recorded) == 1
    chunk, spread = graphs(seen, (False, True), noise, mask)
    assert len(recorded) == 2 and torch.equal(chunk, graphs(seen, (False, False), noise, mask)[0]) and spread.shape == (3,)


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_a_graph_holds_the_rows_that_its_buffers_say(config):
    """One recording serves every delay, none too, and gives the chunk and the spread of the plain way."""
    recorded = []

    def record(call):
        recorded.append(call)
        return call

    sampler, seen, noise = made(config), observation(), question()[0]
    graphs, mask = Graphs(sampler._recorded, CPU, record), torch.ones_like(noise, dtype=torch.bool)
    actions = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    for delays in ([0, 1, 3], [2, 2, 2], [0, 0, 0]):
        held = held_rows(torch.tensor(delays), 4)
        found, expected = (
            graphs(seen, (False, True), noise, mask, actions, held),
            sampler.with_spread(seen, noise, mask, None, (actions, held)),
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        assert torch.equal(found[0][held], actions[held])
    torch.testing.assert_close(found[0], sampler(seen, noise, mask), rtol=0, atol=2e-6)
    assert len(recorded) == 1


def test_few_graphs_are_kept():
    recorded = []

    def record(call):
        recorded.append(call)
        return call

    graphs = Graphs(lambda seen, noise, mask: (noise + 1,), CPU, record)
    seen = observation()
    shapes = [torch.zeros(1, number, 1) for number in range(1, KEPT + 2)]
    for noise in (*shapes, shapes[-1], shapes[0]):
        assert torch.equal(graphs(seen, (), noise, noise.bool())[0], noise + 1)
    assert len(recorded) == KEPT + 2  # the first had left


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_a_recorded_chunk_is_the_plain_one():
    device = torch.device("cuda")
    plain, graph = (Sampler(network(LIKE_PI0), flow(), device, torch.float32, word) for word in ("off", "graph"))
    noise = question()[0]
    mask = torch.ones_like(noise, dtype=torch.bool)
    for factor in (1.0, 2.0):
        expected = plain(observation(), factor * noise, mask)
        torch.testing.assert_close(graph(observation(), factor * noise, mask), expected, rtol=0, atol=1e-4)
