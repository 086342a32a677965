"""Tests of `pi0fm bench simulation`: the same episodes on both sides, in the given number of environments."""

import pytest
from eval_fakes import FakeEnvironment

from pi0fm.bench import simulation
from pi0fm.bench.config import SimulationOptions
from pi0fm.sim import catalog
from pi0fm_client.errors import ConfigError


def test_both_sides_run_the_same_episodes_with_the_same_actions(monkeypatch):
    opened = []

    class Kept(FakeEnvironment):
        def __init__(self, task, max_steps):
            super().__init__(task, max_steps=max_steps)
            self.sequences = {}
            opened.append(self)

        def step(self, action):
            result = super().step(action)
            self.sequences.setdefault(self.resets[-1], set()).update({tuple(each) for each in self.executed})
            return result

    monkeypatch.setattr(catalog, "open_environment", Kept)
    options = SimulationOptions(tasks=("reach-v3",), environments=3, max_steps=5, execution_horizon=2, rounds=2)
    figures = simulation.measure(options).figures
    row = figures["tasks"]["metaworld/reach-v3"]
    assert len(opened) == 4 and all(environment.closed == 1 for environment in opened), "three together, one alone"
    (alone,) = [environment for environment in opened if set(environment.resets) == {1, 2, 3}]
    together = {seed: actions for each in opened if each is not alone for seed, actions in each.sequences.items()}
    assert together == alone.sequences and all(len(actions) == 5 for actions in together.values())
    assert row["speed"] == pytest.approx(row["alone_ms_a_step"] / row["together_ms_a_step"], rel=0.5) and row["together_ms_a_step"] > 0


def test_what_is_refused():
    with pytest.raises(ConfigError, match="unknown Meta-World task 'reach': did you mean 'reach-v3'"):
        SimulationOptions(tasks=("reach",))
    with pytest.raises(ConfigError, match="max_steps must be from 1 to 500 in Meta-World, found 501"):
        SimulationOptions(tasks=("reach-v3",), max_steps=501)
    with pytest.raises(ConfigError, match="environments must be 2 or more, found 1"):
        SimulationOptions(environments=1)
