"""Tests of the solver errors on fields with a known flow, of the observations, and of the command from a bundle to a figure."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture
from learning_help import SeededArm
from smooth_network import smooth_in_time

from pi0fm.bench.flow_steps import SolverError, cheapest, errors, find_reference, from_dataset, from_simulator, observed_order, settings
from pi0fm.cli.main import main
from pi0fm.data.chain import Chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.prompt import PromptTokenizer, load_tokenizer
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.sim import catalog
from pi0fm.train.data import policy_config
from pi0fm_client.errors import ConfigError

FLOW = FlowMatching.from_config(FlowConfig())
pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # thousands of evaluations


def chunks(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MIXTURE = GaussianMixture(chunks(3, 4, 2, seed=1), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 1.0)
NOISE = chunks(5, 4, 2)
EVERYTHING = torch.ones_like(NOISE, dtype=torch.bool)


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return MIXTURE.velocity(FLOW.path, x, t)


def row(solver: str, evaluations: int, rms: float, tolerance: float | None = None) -> SolverError:
    return SolverError(solver, evaluations, tolerance, evaluations, rms, 2 * rms, (rms, 3 * rms))


def test_the_slopes_of_the_table_are_the_orders_of_the_solvers():
    reference, floor = find_reference(FLOW, velocity, NOISE, EVERYTHING, 96)
    assert 0 < floor < 1e-7
    rows = errors(FLOW, velocity, NOISE, EVERYTHING, reference, settings((16, 32, 64), (1e-3, 1e-6), 10), lambda x: x)
    for solver, order in {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}.items():
        assert observed_order(rows, solver, floor) == pytest.approx(order, abs=0.2)
    assert observed_order(rows, "dopri5", floor) is None
    coarse, fine = (found for found in rows if found.solver == "dopri5")
    assert fine.rms < 1e-5 < coarse.rms < 5e-2
    assert coarse.evaluations < fine.evaluations


def test_every_budget_is_spent_exactly_and_counted():
    compared = settings((4, 6, 3, 4), (1e-2,), 7)
    assert [setting[:2] for setting in compared] == [
        *(("euler", 3), ("euler", 4), ("euler", 6)),
        *(("midpoint", 2), ("midpoint", 3), ("heun", 2), ("heun", 3), ("rk4", 1), ("dopri5", 7)),
    ]
    reference, _ = find_reference(FLOW, velocity, NOISE, EVERYTHING, 32)
    rows = errors(FLOW, velocity, NOISE, EVERYTHING, reference, compared, lambda x: x)
    assert [found.evaluations for found in rows[:-1]] == [3, 4, 6, 4, 6, 4, 6, 4]
    assert rows[-1].evaluations > 6


def test_errors_in_both_units_and_only_over_real_entries():
    """A field of 1 in every entry, and a reference that is off by a known amount."""
    mask = EVERYTHING.clone()
    mask[:, :, 1] = False
    exact, _ = find_reference(FLOW, lambda x, t: torch.ones_like(x), NOISE, mask, 2)
    exact[0, 0, 0] += 0.3
    exact[:, :, 1] += 99.0
    (found,) = errors(FLOW, lambda x, t: torch.ones_like(x), NOISE, mask, exact, [("euler", 1, None)], lambda x: 10 * x[..., :1])
    assert found.largest == pytest.approx(0.3)
    assert found.rms == pytest.approx(0.3 / math.sqrt(20))
    assert found.robot_rms_per_chunk == pytest.approx((1.5, 0, 0, 0, 0), abs=1e-9)


def test_the_cheapest_reaches_the_tolerance_and_stays_there():
    rows = [
        *(row("euler", 2, 0.01), row("euler", 4, 0.5), row("euler", 8, 0.04), row("euler", 16, 0.02)),
        *(row("heun", 4, 0.2), row("heun", 8, 0.03)),
        *(row("rk4", 4, 0.9), row("rk4", 8, 0.9)),
        *(row("dopri5", 3, 0.001, tolerance=0.1), row("dopri5", 30, 1e-6, tolerance=1e-5)),
    ]
    found = cheapest(rows, 0.05, own_tolerance=1e-5)
    assert list(found) == ["heun", "euler", "dopri5"], "fewest evaluations first, then the smallest error; rk4 never gets there"
    assert (found["euler"].evaluations, found["heun"].evaluations, found["dopri5"].evaluations) == (8, 8, 30)
    assert cheapest(rows, 1e-9, own_tolerance=1e-5) == {}
    assert cheapest([row("euler", 4, math.nan)], 0.05, 1e-5) == {}


def test_the_order_is_not_read_off_rounding():
    rows = [row("heun", 2**k, max(4.0**-k, 1e-3)) for k in range(1, 12)]
    assert observed_order(rows, "heun", floor=1e-3) == pytest.approx(2)
    assert observed_order(rows, "heun", floor=0.1) is None


METADATA = {
    "demonstration_seeds": {"reach-v3": [5, 9], "door-open-v3": [5, 12], "fold the towel": [0, 3]},
    "camera_sources": {"base": "corner2:32x48"},
    "execution_horizon": 2,
}


@pytest.fixture
def arms(monkeypatch) -> list[SeededArm]:
    """The environments that were made; an episode of an odd seed is over after three actions."""
    made: list[SeededArm] = []

    def make(task, cameras):
        made.append(SeededArm(task, cameras, max_steps=7))
        return made[-1]

    monkeypatch.setattr(catalog, "open_environment", make)
    return made


def policy(**changes) -> SimpleNamespace:
    def infer_batch(observations, noise_seeds):
        assert len(observations) == len(noise_seeds) == 1
        return [SimpleNamespace(actions=np.zeros((4, 4), np.float32))]

    return SimpleNamespace(metadata=METADATA | changes, infer_batch=infer_batch)


def test_starts_and_the_way_from_there_at_seeds_behind_the_demonstrations(arms):
    told: list[int] = []
    found = from_simulator(policy(), 9, seed=0, advance=told.append)
    assert sum(told) == len(found) == 9
    assert [arm.task for arm in arms] == ["reach-v3", "door-open-v3"]
    seen = [(int(one.images["base"][0, 0, 0]), int(one.state[0])) for one in found]
    # seed 10 lasts for 7 steps of which 6 are seen; 11 and 13 end with their third, after the second look
    assert seen == [(10, 0), (10, 2), (10, 4), (10, 6), (11, 0), (13, 0), (13, 2), (14, 0), (14, 2)]
    assert found[0].images["base"].shape == (48, 32, 3)
    assert len(from_simulator(policy(), 1, 0, lambda _: None)) == 1
    assert len(arms) == 3, "fewer observations than tasks open fewer"


@pytest.mark.parametrize("change", [{"camera_sources": {}}, {"demonstration_seeds": {}}, {"demonstration_seeds": {"fold": [0, 3]}}])
def test_a_bundle_that_names_no_simulator_needs_a_data_set(change):
    with pytest.raises(ConfigError, match=r"names no task and camera of a simulator.*type --dataset\.root DIRECTORY"):
        from_simulator(policy(**change), 1, 0, lambda _: None)


def test_frames_of_a_data_set_in_the_middle_of_equal_stretches(learning_run):
    embodiment = Embodiment(cameras={"base": "observation.images.base"}, state_dim=4, robot_action_dim=4)
    reader = Chain(embodiment, (), PromptTokenizer(load_tokenizer("byt5", 384), 32), image_size=32)
    found, everything = (from_dataset(reader, learning_run().dataset, count) for count in (4, 1000))
    assert len(everything) == 48
    for one, expected in zip(found, (everything[index] for index in (6, 18, 30, 42)), strict=True):
        assert np.array_equal(one.state, expected.state)
        assert np.array_equal(one.images["base"], expected.images["base"])
        assert one.images["base"].shape == (32, 32, 3)
    assert {one.prompt for one in everything} == {"move the hand to the goal", "open the door"}


@pytest.fixture(scope="module")
def saved(learning_run, tmp_path_factory):
    """A random policy that names no task of a simulator."""
    run = learning_run()
    source = open_source(run.dataset, run.embodiment)
    settled = replace(policy_config(run, source), demonstration_seeds={})
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("steps") / "bundle", Pi0(settled.model)
    smooth_in_time(model)
    bundle.save(path, model.state_dict(), settled, source.norm_stats(settled.model.action_horizon))
    return path


@pytest.fixture
def command(saved, recorded_root, learning_run, tmp_path):
    data = f"--root {recorded_root} --dataset.cache_dir {learning_run().dataset.cache_dir} --output_dir {tmp_path / 'out'}"
    return ["flow", "steps", str(saved), *data.split(), "--dopri5_tolerances", "0.01", "--device", "cpu", "--threads", "1"]


def test_a_bundle_becomes_a_table_a_figure_and_a_line(command, tmp_path, capsys):
    words = "--observations 3 --evaluations 4,8,16,32 --reference_steps 64 --tolerance 1.0"
    assert main([*command, *words.split()]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert set(result["error"]) == {"euler", "midpoint", "heun", "rk4", "dopri5"}
    assert list(result["error"]["euler"]) == ["4", "8", "16", "32"]
    for solver in ("euler", "midpoint", "heun", "rk4"):
        falling = list(result["error"][solver].values())
        assert falling[-1] < falling[0]
    best = result["cheapest"]
    assert best["rms"] <= 1.0 and best["tolerance"] == 1.0
    assert best["options"] == f"--solver {best['solver']} --num_flow_steps {best['num_flow_steps']}"
    assert best["options"] in captured.err
    written = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert {name: written[name] for name in result} == result
    assert len(written["rows"]) == 4 * 4 + 2
    assert all(len(found["robot_rms_per_chunk"]) == 3 for found in written["rows"])
    assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_tolerance_that_nothing_reaches_is_said(command, capsys):
    words = "--observations 1 --evaluations 1 --reference_steps 4 --tolerance 1e-12"
    assert main([*command, *words.split()]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["cheapest"] == {"tolerance": 1e-12, "solver": None}
    assert "no setting reaches 1e-12: type a larger --tolerance" in captured.err
