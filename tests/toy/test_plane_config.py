"""The options of the demo: honoured, or refused by name."""

import pytest

from pi0fm import options
from pi0fm.toy.config import SECONDS, DemoConfig
from pi0fm_client.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--dataset", "moon"], "unknown dataset 'moon': did you mean 'moons'"),
        (["--method", "flows"], "unknown method 'flows': did you mean 'flow'"),
        (["--path", "condot"], "path 'condot': did you mean 'cond_ot'"),
        (["--time_density", "unifrom"], "time_density 'unifrom': did you mean 'uniform'"),
        (["--prediction", "speed"], "unknown flow option prediction 'speed'"),
        (["--loss_weighting", "max"], "unknown flow option loss_weighting 'max'"),
        (["--solver", "rk5"], "solver 'rk5': did you mean 'rk4'"),
        (["--method", "cnf", "--path", "cond_ot"], "--path is flow matching's, found it with --method cnf"),
        (["--method", "diffusion", "--prediction", "noise"], "--prediction is flow matching's"),
        (["--seconds", "0"], "seconds must be above 0, found 0"),
        (["--seconds", "nan"], "seconds must be above 0, found nan"),
        (["--steps", "0"], "steps of training must be at least 1, found 0"),
        (["--steps", "9", "--seconds", "9"], "seconds or steps, not both"),
        (["--seed", "-1"], "seed must be at least 0, found -1"),
        (["--sead", "1"], "unknown option sead: did you mean 'seed'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(words, line):
    with pytest.raises(ConfigError) as caught:
        options.parse(DemoConfig, words)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_word_reaches_the_flow():
    words = ["--path=vp", "--prediction=data", "--time_density=logit_normal", "--loss_weighting=likelihood", "--solver=heun", "--steps=7"]
    config = options.parse(DemoConfig, words)
    ours, cnf, diffusion = (method.flow for method in config.methods())
    assert (type(ours.path).__name__, type(ours.time_density).__name__) == ("VPDiffusion", "LogitNormal")
    assert (ours.prediction, ours.loss_weighting, ours.solver) == ("data", "likelihood", "heun")
    assert (type(cnf.path).__name__, cnf.prediction, cnf.solver) == ("CondOT", "velocity", "heun")
    assert (type(diffusion.path).__name__, diffusion.prediction, diffusion.solver) == ("VPDiffusion", "noise", "heun")
    assert config.budget.steps == 7


def test_left_alone_it_compares_all_three_on_moons():
    config = DemoConfig()
    assert config.dataset == "moons"
    assert [method.name for method in config.methods()] == ["flow_matching", "cnf", "diffusion"]
    assert config.budget.seconds == SECONDS
    assert [method.name for method in DemoConfig(method="cnf").methods()] == ["cnf"]
