"""Tests of `pi0fm doctor --suite` on a recording with its simulator, and on one with a planted fault."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_dataset

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.chosen import pictures_at
from pi0fm.demos.config import DatasetName, DemosConfig
from pi0fm.demos.record import record_here
from pi0fm.doctor.environment import PolicyAndData, environment_findings
from pi0fm.flow.config import FlowConfig
from pi0fm.policy.saved.bundle import PolicyConfig

TASK = "metaworld/drawer-open-v3"
FACTS = {"robot_action_dim": 4, "state_dim": 4, "fps": 80.0, "execution_horizon": 8, "cameras": {"base": "observation.images.base"}}
pytestmark = [pytest.mark.journey, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(data set, pictures of the episodes' first rows)."""
    root = tmp_path_factory.mktemp("demos") / "drawer"
    record_here(DemosConfig(tasks=TASK, episodes=2, noise=0.0, num_workers=0, dataset=DatasetName(root=str(root))))
    config = DatasetConfig(root=root)
    source = open_source(config, Embodiment())
    begins = np.flatnonzero(np.diff(source.episode, prepend=-1))
    return source, pictures_at(source, config, begins, 64)


def judged(source, task=TASK, max_steps=None, pictures=None, chain=None, **facts) -> dict[str, str]:
    low, high = np.quantile(source.action, (0.01, 0.99), axis=0).astype(np.float32)
    found = environment_findings(task, max_steps, PolicyAndData(FACTS | facts, chain, source, low, high, source.tasks), pictures)
    return {finding.kind: finding.severity for finding in found if finding.severity != "note"}


def chain_of(source, shift=0.0):
    """A chain with the data set's statistics, its state's mean shifted."""
    stats = source.norm_stats(4)
    stats = replace(stats, state=replace(stats.state, mean=stats.state.mean + np.float32(shift)))
    return PolicyConfig(tiny_dataset.network(), FlowConfig(), source.embodiment).chain(stats)


def test_a_healthy_recording(recorded):
    source, pictures = recorded
    assert judged(source, pictures=pictures, chain=chain_of(source)) == {}
    assert judged(source, "metaworld", pictures=pictures) == {}


@pytest.mark.parametrize(
    "change",
    [lambda p: p[:, :, ::-1, ::-1], lambda p: p[:, :, ::-1], lambda p: p[:, :, :, ::-1], lambda p: p[..., ::-1]],
    ids=["turned round", "upside down", "mirrored", "blue first"],
)
def test_pictures_in_another_orientation_or_order_of_colours(recorded, change):
    assert judged(recorded[0], pictures=change(recorded[1]))["picture"] == "error"


def test_cameras_that_show_what_another_should(recorded):
    source, pictures = recorded
    cameras = {"base": "observation.images.base", "top": "observation.images.top"}
    two = replace(source, embodiment=replace(source.embodiment, cameras=cameras))
    sources = {"base": "topview:96x96", "top": "corner2:96x96"}
    kinds = judged(two, pictures=np.concatenate([pictures, np.zeros_like(pictures)], 1), camera_sources=sources, cameras=cameras)
    assert kinds["swapped cameras"] == "error"


@pytest.mark.parametrize(
    ("dim", "change", "kind"),
    [
        (3, lambda a: -a, "replay"),
        (2, lambda a: (a + 1) / 2, "action range"),
        (0, lambda a: 40 * a, "action range"),
        (1, lambda a: -a, "replay"),
    ],
    ids=["gripper turned round", "from 0 to 1", "other units", "y turned round"],
)
def test_actions_that_the_environment_means_otherwise(recorded, dim, change, kind):
    source = recorded[0]
    action = source.action.copy()
    action[:, dim] = change(action[:, dim])
    assert kind in judged(replace(source, action=action))


def test_facts_that_do_not_match(recorded):
    source = recorded[0]
    assert judged(source, fps=10.0)["rate"] == "error"
    assert judged(source, robot_action_dim=7)["width"] == "error"
    assert judged(source, state_dim=8)["width"] == "error"
    assert judged(source, max_steps=20)["step limit"] == "error"
    assert judged(source, execution_horizon=200)["execution horizon"] == "warning"
    assert judged(source, cameras={"wrist": "observation.images.wrist"})["camera"] == "error"
    assert judged(source, "metaworld/button-press-v3")["prompt"] == "warning"


def test_a_state_from_another_source(recorded):
    source = recorded[0]
    assert judged(source, chain=chain_of(source, shift=3.0), state_range={})["state"] == "error"
