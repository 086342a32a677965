"""The learning rate and the average against their closed forms; the optimiser's groups."""

import math

import pytest
import torch
from torch import nn

from pi0fm.errors import ConfigError
from pi0fm.train.ema import Ema
from pi0fm.train.optim import OptimizerConfig, learning_rate, make_optimizer, set_learning_rate


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
