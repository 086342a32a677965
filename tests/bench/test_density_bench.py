"""The measurement of a density's cost: what it compares and what it says, not how fast this machine is."""

import json

import pytest

from pi0fm import options
from pi0fm.bench import density
from pi0fm.bench.density import DensityConfig, random_policy
from pi0fm.bench.paired import Ratio
from pi0fm.cli import bench_density as command
from pi0fm.models.presets import preset
from pi0fm_client.errors import ConfigError

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # the checks would be most of the time


def test_both_sides_take_the_same_evaluations(monkeypatch):
    """Every comparison runs each side; the network's calls are counted."""
    counts = []

    def counting(first, second, rounds):
        both = []
        for work in (first, second):
            before = len(calls)
            work()
            both.append(len(calls) - before)
        counts.append(both)
        return Ratio(1.0, 1.0, 1.0, 1.0, 1.0)

    calls = []

    def spied(config):
        policy = random_policy(config)
        policy.model.action_out.register_forward_hook(lambda *_: calls.append(1))
        return policy

    monkeypatch.setattr(density, "paired_ratio", counting)
    monkeypatch.setattr(density, "random_policy", spied)
    density.measure(DensityConfig(num_flow_steps=2, solver="heun"))
    assert counts == [[4, 4], [4, 4], [4, 4]]
    assert DensityConfig(num_flow_steps=2, solver="heun").evaluations == 4


def test_the_random_policy_is_the_tiny_preset_in_robot_units_of_four():
    policy = random_policy(DensityConfig())
    assert policy.model.config == preset("tiny")
    assert policy.metadata["robot_action_dim"] == 4


def test_the_last_line_says_the_ratio_its_interval_and_the_machine(capsys):
    result = command.run(options.parse(command.Options, ["--rounds", "1", "--num_flow_steps", "1"], command.ALIASES))
    assert result == json.loads(json.dumps(result))
    assert set(result) >= {"ratio", "interval", "one_pass", "call", "evaluations", "num_probes", "machine", "versions"}
    assert result["interval"][0] <= result["ratio"] <= result["interval"][1]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "1 evaluations on each side" in printed.err


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"rounds": 0}, "--rounds must be 1 or more, found 0"),
        ({"num_probes": -1}, "--num_probes must be 0 or more"),
        ({"solver": "dopri5"}, "same evaluations on both sides, found 'dopri5'"),
    ],
)
def test_options_out_of_range(wrong, rule):
    with pytest.raises(ConfigError, match=rule):
        DensityConfig(**wrong)
