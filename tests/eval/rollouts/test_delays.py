"""Tests of episodes whose simulator does not wait: equal commands without delay, reaction times in closed form, a grid with its report."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from eval_fakes import FRONT, HORIZON, FakeEnvironment, PointEnvironment, PointPolicy
from line_policy import SCALE, H, Lines

from pi0fm.cli.main import main
from pi0fm.eval.rollouts import delays
from pi0fm.eval.rollouts.delays import DelayGrid, RealtimeConfig, evaluate_in_real_time
from pi0fm.eval.rollouts.episode import Episode, RolloutSettings, noise_seed
from pi0fm.eval.rollouts.realtime import MODES, Timing, drive, reaction
from pi0fm.eval.rollouts.rollout import BatchedRollout, run_all
from pi0fm.flow.committed import CommittedVelocity, held_rows
from pi0fm.flow.guidance import GuidedVelocity, hold_weights
from pi0fm.flow.solver import integrate, uniform_grid
from pi0fm.policy.sampling.realtime import held_count
from pi0fm.sim import catalog
from pi0fm.sim.suite import Suite, Task
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import ActionChunk

HZ, EXECUTED = 20, 4
LINES = Lines((1.0, -1.0), 0.05)
LIMITS = {"increments": [0]}


class Led(PointPolicy):
    """The policy on a line, asked by a map of keys; its chunks may be led, which it leaves alone."""

    guidance = "guided"

    def observation(self, flat):
        from pi0fm_client.types import Observation

        return Observation({"base": flat["image"]}, flat["state"], flat["prompt"])

    def refuse_prefixes(self):
        if self.guidance == "hard_prefix":
            raise ConfigError("not trained for it")

    def infer_batch(self, observations, noise_seeds=None, prefixes=None):
        self.prefixes = prefixes
        return super().infer_batch(observations, noise_seeds)


def flat(environment):
    seen = environment.observe()
    return {"image": seen.images["base"], "state": seen.state, "prompt": seen.prompt}


def driven(mode="synchronous", delay=0.0, seed=3, fault=None, max_steps=40, policy=None):
    policy, environment = policy or Led(), PointEnvironment("a", max_steps=max_steps, **({} if fault is None else {"fault": fault}))

    def infer(message, step):
        return policy.infer_batch([policy.observation(message)], [noise_seed(0, "a", seed, step)])[0]

    found = drive(environment, seed, infer, flat, policy.metadata, Timing(mode, delay), EXECUTED, LIMITS, np.array([20.0]))
    return found, environment


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous", "guided"])
def test_without_delay_the_commands_are_those_of_a_simulator_that_waits(mode):
    kept = []

    def opened(task):
        kept.append(PointEnvironment(task, max_steps=40))
        return kept[-1]

    batch = BatchedRollout(opened, PointPolicy(), RolloutSettings(execution_horizon=EXECUTED), 1)
    (waited,) = run_all([Episode("a", 3)], batch)
    found, environment = driven(mode)
    assert found.outcome == waited.outcome and found.held == 0
    np.testing.assert_array_equal(environment.executed, kept[0].executed)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_reaction_is_the_delay_and_half_the_time_between_observations(steps):
    """A synchronous robot observes every delay + horizon steps, an asynchronous one every horizon steps."""
    stuck = lambda where, seed, step: None  # noqa: E731
    between = {"synchronous": EXECUTED + steps, "asynchronous": EXECUTED}
    for mode, period in between.items():
        found, _ = driven(mode, delay=1e3 * steps / HZ, fault=stuck, max_steps=200, seed=5)
        assert found.reaction_ms == pytest.approx(1e3 / HZ * (steps + period / 2), rel=0.35)
    assert reaction([(0, 2), (4, 6), (8, 10)]) == 2 + 4 / 2
    assert np.isnan(reaction([])) and np.isnan(reaction([(0, 1)]))


def test_a_synchronous_robot_stands_still_while_it_waits_and_others_only_at_first():
    still, _ = driven("synchronous", delay=100, max_steps=60, seed=5)
    assert still.held == pytest.approx(2 / (EXECUTED + 2), abs=0.06)
    for mode in ("asynchronous", "ensemble", "guided"):
        assert driven(mode, delay=100, max_steps=60, seed=5)[0].held < still.held / 2


def test_a_delay_beyond_the_chunk_leaves_nothing_to_execute():
    found, environment = driven("asynchronous", delay=1e3 * (HORIZON + 1) / HZ)
    assert found.held == 1 and found.outcome == "failure" and not np.any(environment.executed)


def test_a_policy_that_refuses_stands_still_and_an_environment_that_breaks_is_a_crash():
    class Refusing(Led):
        def infer_batch(self, observations, noise_seeds=None, prefixes=None):
            raise ObservationError("too dark")

    for mode in ("synchronous", "asynchronous"):
        found, _ = driven(mode, policy=Refusing())
        assert found.outcome == "failure" and found.held == 1 and found.failures > 0 and found.answers == 0

    def breaks(where, seed, step):
        if step == 3:
            raise RuntimeError("simulation unstable")

    assert driven(fault=breaks)[0].outcome == "crash"


def test_own_time_is_below_a_millisecond_a_step(shapes_unchecked):
    assert min(driven("guided", delay=100, max_steps=200, seed=5)[0].own_ms for _ in range(3)) < 1


@pytest.fixture
def line(monkeypatch):
    suite = Suite(
        "line", "Line", {"a": Task("do a", 20), "b": Task("do b", 20)}, ("front",), FRONT, HZ, "point", ("x",), ("dx",), 60, False, (), "",
        lambda task, cameras, max_steps: PointEnvironment(task, max_steps=max_steps), -100.0, 100.0, (0,),
    )  # fmt: skip
    monkeypatch.setitem(catalog.SUITES, "line", suite)
    policy = Led(state_key="state", camera_sources={}, fps=HZ)
    monkeypatch.setattr(delays, "open_policy", lambda config: policy)
    monkeypatch.setattr(delays, "read_metadata", lambda config: policy.metadata)
    return policy


def test_the_grid_with_its_rows_figure_and_last_line(line, tmp_path):
    grid = DelayGrid(delays_ms=("0", "150", "measured"), modes=("synchronous", "guided"), jitter_ms=10)
    config = RealtimeConfig(policy="bundle", tasks="line/a,line/b", episodes=3, realtime=grid, output_dir=str(tmp_path / "out"))
    last, cells = evaluate_in_real_time(config)
    assert [(cell.mode, cell.asked_ms) for cell in cells] == [(m, d) for m in ("synchronous", "guided") for d in (0.0, 150.0, None)]
    assert all(cell.episodes == 6 for cell in cells) and last["by_suite"]["line"] == json.loads(json.dumps(last["cells"]))
    rows = pq.read_table(tmp_path / "out/episodes.parquet").to_pylist()
    assert len(rows) == 36 and {row["seed"] for row in rows} == {1, 2, 3} and {row["task"] for row in rows} == {"line/a", "line/b"}
    assert line.prefixes is not None
    page = (tmp_path / "out/report.html").read_text()
    assert "data:image/png;base64," in page and "150 ms" in page
    assert json.loads((tmp_path / "out/summary.json").read_text())["cells"] == last["cells"]


class Follower(FakeEnvironment):
    """A robot that is where it was told to be: action and state are its position."""

    def observe(self):
        seen = super().observe()
        return replace(seen, state=np.asarray(self.executed[-1] if self.executed else [0.0], np.float32))


class Lined(Led):
    """The policy of a known field, trained for delays of up to 4 steps: each chunk a line from the state, up or down by its noise."""

    def __init__(self):
        known = {"action_horizon": H, "rtc_max_delay": 4, "state_key": "state", "camera_sources": {}, "fps": HZ}
        super().__init__(**known)

    def refuse_prefixes(self):
        pass

    def infer_batch(self, observations, noise_seeds=None, prefixes=None):
        (seen,), (seed,), (prefix,) = observations, noise_seeds, prefixes
        noise = torch.randn(1, H, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        field = LINES
        if prefix is not None:
            rest = np.asarray(prefix.actions, np.float64)[np.minimum(np.arange(H), len(prefix.actions) - 1)]
            target = torch.from_numpy((rest - seen.state) / SCALE)[None]
            weights = hold_weights(H, prefix.inference_delay, H - len(prefix.actions))[None, :, None].double()
            held = CommittedVelocity(LINES, target, held_rows(torch.tensor([held_count(prefix, 4)]), H))
            field = held if self.guidance == "hard_prefix" else GuidedVelocity(LINES, target, weights)
        chunk = integrate(field, noise, uniform_grid(10))
        chunk = field.placed(chunk) if isinstance(field, CommittedVelocity) else chunk
        return [ActionChunk((chunk[0].numpy() * SCALE + seen.state).astype(np.float32))]


def test_a_policy_trained_with_delays_is_drawn_under_hard_prefix_too_and_its_chunks_meet(line, monkeypatch, tmp_path):
    suite = replace(
        catalog.SUITES["line"], increments=(), build=lambda task, cameras, steps: Follower(task, cameras, max_steps=steps, dims=1)
    )
    monkeypatch.setitem(catalog.SUITES, "line", suite)
    policy = Lined()
    monkeypatch.setattr(delays, "open_policy", lambda config: policy)
    monkeypatch.setattr(delays, "read_metadata", lambda config: policy.metadata)
    grid = DelayGrid(delays_ms=("0", "100"))
    words = {"tasks": "line/a", "episodes": 4, "max_steps": 60, "execution_horizon": 8, "output_dir": str(tmp_path)}
    last, cells = evaluate_in_real_time(RealtimeConfig(policy="bundle", realtime=grid, **words))
    found = {(cell.mode, cell.asked_ms): cell for cell in cells}
    assert {mode for mode, _ in found} == {"synchronous", "asynchronous", "guided", "hard_prefix"}
    hard, free = found["hard_prefix", 100.0], found["asynchronous", 100.0]
    assert free.jump > 1.3 * free.change and hard.jump < 1.1 * hard.change and hard.jump < 0.8 * free.jump
    assert found["hard_prefix", 0.0].jump == found["asynchronous", 0.0].jump, "without a delay no row is held"
    assert last["by_suite"]["line"] == [cell.json() for cell in cells] and "hard_prefix" in (tmp_path / "report.html").read_text()


def test_what_is_refused(line, tmp_path, capsys):
    words = ["eval", "--policy", "bundle", "--tasks", "line/a", "--output_dir", str(tmp_path / "out")]
    for more, said in (
        (["--realtime.modes", "guiding"], "guided"),
        (["--realtime.modes", "hard_prefix"], "not trained for it"),
        (["--realtime.delays_ms", "-5"], "milliseconds"),
        (["--realtime.jitter_ms", "1", "--dataset.root", "x"], "leave all but one out"),
        (["--realtime.jitter_ms", "1", "--num_workers", "2"], "unknown option num_workers"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert set(MODES) == {"synchronous", "asynchronous", "ensemble", "guided", "guided_no_jacobian", "hard_prefix"}
