"""Tests of learning rate and average against closed forms, and of the optimiser and its groups against torch's."""

import copy
import math

import pytest
import torch
from torch import nn

from pi0fm.train.components import OptimizerConfig
from pi0fm.train.ema import Ema
from pi0fm.train.optim import ClippedAdamW, learning_rate, make_optimizer, set_learning_rate
from pi0fm_client.errors import ConfigError


def rates(steps: int, **change: object) -> list[float]:
    config = OptimizerConfig(**({"learning_rate": 2.0, "final_learning_rate_ratio": 0.1, "warmup_steps": 10} | change))
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_then_half_a_cosine():
    found = rates(200)
    assert found[:10] == pytest.approx([2 * (step + 1) / 11 for step in range(10)])
    assert found[10] == 2.0
    assert found[-1] == pytest.approx(0.2)
    middle = 10 + (199 - 10) / 3  # a third of the way: cos(pi / 3) = 1/2
    assert found[int(middle)] == pytest.approx(2 * (0.1 + 0.9 * 0.75), rel=1e-3)
    for step in range(10, 200):
        expected = 2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 189)))
        assert found[step] == pytest.approx(expected)


def test_a_short_run_warms_up_for_a_tenth_at_most():
    assert max(rates(50, warmup_steps=1000)) == rates(50, warmup_steps=1000)[5] == 2.0
    assert rates(1) == [2.0]
    assert all(rate > 0 for rate in rates(3))


def test_without_warm_up_it_starts_at_the_peak():
    assert rates(100, warmup_steps=0)[0] == 2.0
    assert rates(100, warmup_steps=0, final_learning_rate_ratio=1.0) == [2.0] * 100


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"clip_norm": 0.0},
        {"final_learning_rate_ratio": 1.1},
        {"warmup_steps": -1},
        {"weight_decay": -1.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
    ],
)
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)


def pair() -> tuple[nn.Module, ClippedAdamW, nn.Module, torch.optim.AdamW]:
    """One network twice: with ours, and with torch's AdamW of the same numbers."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 40), nn.LayerNorm(40), nn.Linear(40, 2))
    theirs = copy.deepcopy(ours)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.01)
    groups = [{"params": [p for p in theirs.parameters() if (p.ndim >= 2) == matrix], "weight_decay": 0.01 * matrix} for matrix in (1, 0)]
    return ours, make_optimizer(config, ours), theirs, torch.optim.AdamW(groups, lr=0.1, betas=(config.beta1, config.beta2))


def give(model: nn.Module, seed: int, size: float) -> None:
    """A gradient whose norm is `size` in all."""
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(parameter.shape, generator=random) for parameter in model.parameters()]
    norm = nn.utils.get_total_norm(drawn)
    for parameter, gradient in zip(model.parameters(), drawn, strict=True):
        parameter.grad = gradient * (size / norm)


def test_a_step_is_torchs_clipping_and_torchs_adamw():
    """Over steps whose gradient is shorter, longer and much longer than the bound; the norm told is that before clipping."""
    ours, optimizer, theirs, reference = pair()
    for step, size in enumerate((0.3, 5.0, 1.0, 400.0, 1e-3)):
        give(ours, step, size)
        give(theirs, step, size)
        norm = optimizer.clip(1.0)
        assert float(norm) == pytest.approx(size, rel=1e-5)
        optimizer.step()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert {float(state["step"]) for state in optimizer.state.values()} == {5.0}


def test_a_bound_holds_for_one_step():
    ours, optimizer, theirs, reference = pair()
    give(ours, 0, 8.0)
    optimizer.clip(1.0)
    optimizer.step()
    give(theirs, 0, 1.0)
    reference.step()
    for model in (ours, theirs):
        give(model, 1, 8.0)
    optimizer.step()
    reference.step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight_no_moment_and_no_count(wrong):
    model, found, twin, _ = pair()
    expected = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.01), twin)
    for seed, spoilt in ((0, False), (1, True), (2, False)):
        for network, optimizer in ((model, found), (twin, expected)):
            give(network, seed, 1.0)
            if spoilt:
                network[2].bias.grad[0] = wrong
            if not spoilt or optimizer is found:
                assert bool(optimizer.clip(0.5).isfinite()) is not spoilt
                optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert all(torch.equal(found.state[ours][name], expected.state[theirs][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert float(found.state[model[0].weight]["step"]) == 2.0


def test_a_parameter_without_a_gradient_stays():
    model, optimizer, _, _ = pair()
    before = model[0].weight.detach().clone()
    give(model, 0, 1.0)
    model[0].weight.grad = None
    optimizer.clip(1.0)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[0].bias.grad, torch.zeros(40)) and optimizer.state[model[0].bias]["exp_avg"].any()


def test_state_survives_torchs_own_dictionary():
    """accelerate sends it to the device that way."""
    ours, optimizer, _, _ = pair()
    twin = copy.deepcopy(ours)
    for step in range(3):
        if step == 2:
            twin.load_state_dict(ours.state_dict())
            other = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.01), twin)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            give(twin, step, 3.0)
            other.clip(1.0)
            other.step()
        give(ours, step, 3.0)
        optimizer.clip(1.0)
        optimizer.step()
    assert all(torch.equal(found, expected) for found, expected in zip(twin.parameters(), ours.parameters(), strict=True))
    assert {float(state["step"]) for state in other.state.values()} == {3.0}


def test_a_closure_is_refused():
    with pytest.raises(TypeError, match="no closure"):
        pair()[1].step(lambda: 0.0)


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].weight.data.fill_(1.0)
    model[1].weight.data.fill_(1.0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, torch.full((2, 3), 1 - 0.1 * 0.5))
    torch.testing.assert_close(model[1].weight, torch.ones(2))


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in make_optimizer(OptimizerConfig(), model).param_groups] == [1, 0]


def test_the_rate_of_every_group_is_set():
    optimizer = make_optimizer(OptimizerConfig(), nn.Linear(3, 2))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_average_closed_form():
    """Each update weighs the old average by min(decay, (1 + n) / (10 + n))."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema, expected = Ema(model, 0.5), 0.0
    for step in range(40):
        model.weight.data.fill_(float(step + 1))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
        assert float(ema.weights()["weight"]) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(39, rel=1e-3)  # of a line that rises by 1, an average with decay 1/2 is 1 behind


def test_the_average_forgets_its_random_start():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1e6)
    ema = Ema(model, 0.999)
    model.weight.data.fill_(1.0)
    for step in range(100):
        ema.update(step)
    assert float(ema.weights()["weight"]) == pytest.approx(1.0, abs=1e-3)


def test_without_decay_the_weights_themselves():
    model = nn.Linear(2, 2)
    ema = Ema(model, None)
    assert ema.average == {}
    model.weight.data.fill_(3.0)
    ema.update(0)
    assert (ema.weights()["weight"] == 3.0).all()
