"""Tests of a run on two robots that share only the network: one curve, one state, one bundle for both."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset
import torch
from small_runs import differing, start, start_and_die

import pi0fm
from pi0fm.cluster import caching
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import DatasetConfig, MixtureEntry
from pi0fm.data.loading.loader import micro_batches
from pi0fm.data.loading.mixture import MixtureCollator
from pi0fm.data.order.orders import deal
from pi0fm.models.config import LoraConfig
from pi0fm.policy.saved import bundle
from pi0fm.train import loop
from pi0fm.train.components import ValidationConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import open_data
from pi0fm_client.errors import ConfigError, DatasetError
from pi0fm_client.types import Observation

OFTEN = ValidationConfig(every=2, episodes=1, samples=4, probes=1, num_flow_steps=1, likelihood=True)
PROMPT = "sort the parts"
# The arm comes first, and sees with base and wrist; the crane's own order is front, wrist.
CAMERAS = {"front": "observation.images.front", "wrist": "observation.images.hook"}


@pytest.fixture(scope="session")
def crane_root(tmp_path_factory) -> Path:
    """Another robot: 20 frames a second, state 2, action 5, two cameras, two episodes of one task, a weight for each frame."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("crane") / "set"
    picture = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    numbers = {name: {"dtype": "float32", "shape": shape, "names": None} for name, shape in (("action", (5,)), ("care", (1,)))}
    features = {"observation.state": {"dtype": "float32", "shape": (2,), "names": None}, **numbers}
    data = LeRobotDataset.create("local/crane", fps=20, features=features | dict.fromkeys(CAMERAS.values(), picture), root=root)
    random = np.random.default_rng(1)
    for length in (8, 6):
        for row in range(length):
            frame = {"observation.state": random.normal(size=2), "action": 9 * random.normal(size=5), "care": np.array([1.0 + (row == 0)])}
            frame = {name: value.astype(np.float32) for name, value in frame.items()}
            frame |= {column: random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for column in CAMERAS.values()}
            data.add_frame(frame | {"task": PROMPT})
        data.save_episode()
    data.finalize()
    return root


@pytest.fixture(scope="session")
def mixed(configure, crane_root, frames) -> Callable[..., TrainConfig]:
    """`mixed(folder, steps=2, crane={"weight": 2.0}, ...)`: two thirds of the arm, one third of the crane."""

    def configured(folder: Path, crane: dict | None = None, **change) -> TrainConfig:
        one = configure(folder)
        both = {"base": "observation.images.base", "wrist": "observation.images.wrist"}
        own = DatasetConfig(root=crane_root, cache_dir=frames)
        entries = {
            "arm": MixtureEntry(one.dataset, Embodiment("arm", both, delta_actions=(0,)), weight=2.0),
            "crane": replace(MixtureEntry(own, Embodiment("crane", CAMERAS)), **(crane or {})),
        }
        base = {"steps": 4, "global_batch_size": 6, "checkpoint_every": 2, "dataset": DatasetConfig(), "embodiment": Embodiment()}
        return configure(folder, **base | {"mixture": entries} | change)

    return configured


@pytest.fixture(autouse=True)
def fast(shapes_unchecked):
    """Runs of many small steps."""


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory) -> loop.TrainResult:
    """Four steps without a break, validated after 2 and 4; its folder is not to be changed."""
    return start(mixed(tmp_path_factory.mktemp("runs") / "whole", validation=OFTEN))


@pytest.fixture(scope="session")
def curve(curve):
    """Training's lines alone."""

    def read(folder: Path) -> list[dict[str, float]]:
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: line[name] for name in ("step", "loss", "grad_norm", "learning_rate")} for line in lines if "loss" in line]

    return read


def test_micro_batches_change_nothing(mixed, curve, whole, tmp_path):
    start(mixed(tmp_path / "split", validation=replace(OFTEN, every=0), micro_batch_size=3))
    for ours, theirs in zip(curve(tmp_path / "split"), curve(whole.bundle.parent), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one(mixed, curve, whole, tmp_path):
    """It dies in its fourth step, one after its checkpoint."""
    config = mixed(tmp_path / "broken", validation=OFTEN)
    start_and_die(config, 3)
    found = start(replace(config, resume="true"))
    assert differing(found.bundle, whole.bundle) == []
    assert curve(config.output_dir) == curve(whole.bundle.parent)


def test_each_entry_is_validated_under_its_name(whole):
    lines = [json.loads(line) for line in (whole.bundle.parent / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "loss" not in line]
    metrics = {f"validation_{metric}/{name}" for metric in ("nll", "nll_per_dim", "loss", "error") for name in ("arm", "crane")}
    assert [line["step"] for line in found] == [2, 4]
    assert all(line.keys() - {"step"} == metrics for line in found)
    assert len({line[metric] for line in found for metric in metrics}) == 16
    for name in ("arm", "crane"):
        assert bundle.read(whole.bundle, name)[0].training["held_out_episodes"]


def test_the_bundle_serves_both_robots(whole, crane_root):
    assert sorted(path.name for path in whole.bundle.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "norm_stats.json",
        "reference.safetensors",
        "robots.json",
    ]
    random = np.random.default_rng(0)
    arm, crane, usual = (pi0fm.load(str(whole.bundle), device="cpu", robot=name) for name in ("arm", "crane", None))
    view = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    near = Observation({"base": view, "wrist": view}, np.zeros(4, np.float32), "press the button")
    far = Observation({"wrist": view, "front": view}, np.zeros(2, np.float32), PROMPT)
    assert arm.infer_batch([near], [1])[0].actions.shape == (4, 3)
    assert crane.infer_batch([far], [1])[0].actions.shape == (4, 5)
    assert np.array_equal(usual.infer_batch([near], [1])[0].actions, arm.infer_batch([near], [1])[0].actions)
    assert (arm.metadata["robot"], crane.metadata["robot"], usual.metadata["robot"]) == ("arm", "crane", "arm")
    assert arm.metadata["robots"] == ["arm", "crane"]
    assert (arm.metadata["fps"], crane.metadata["fps"]) == (10, 20)
    seeds = {"press the button": [100, 102], "open_the drawer ": [101, 101]}
    assert bundle.read(whole.bundle, "arm")[0].demonstration_seeds == seeds
    assert bundle.read(whole.bundle, "crane")[0].demonstration_seeds == {}
    assert crane.metadata["demonstration_seeds"] == seeds, "one network saw all of them"
    assert crane.metadata["training"]["dataset"] == str(crane_root)
    assert crane.metadata["training"]["mixture"] == "arm 66.7 %, crane 33.3 %"


def test_a_robot_is_given_its_cameras_in_the_order_of_its_training(whole, mixed, tmp_path):
    """Where a picture stands decides the positions of its tokens, so the crane's wrist comes first, as in the mixture's batches."""
    data = open_data(mixed(tmp_path / "any"))
    assert data.training.cameras == ("base", "wrist", "front")
    assert list(bundle.read(whole.bundle, "crane")[0].embodiment.cameras) == ["wrist", "front"]
    batch = data.training(0, 6)
    which, _ = deal(data.training.weights, np.arange(6))
    assert batch.observation.image_mask.tolist() == [[[True, True, False], [False, True, True]][part] for part in which]


def test_shares_match_the_weights_and_each_has_its_own_statistics(mixed, tmp_path):
    data = open_data(mixed(tmp_path / "any"))
    seen = torch.cat([data.training(first, 30).observation.image_mask for first in range(0, 300, 30)])
    assert abs(int(seen[:, 0].sum()) - 200) <= 1
    arm, crane = data.parts
    assert (arm.stats.num_frames, crane.stats.num_frames) == (28, 14)
    assert crane.stats.action.std.mean() > 3
    assert data.num_cameras == 3
    assert data.describe() == "arm 66.7 % of samples from 28 frames at 10 fps, crane 33.3 % of samples from 14 frames at 20 fps"
    assert arm.training.seed != crane.training.seed


def test_a_mixture_of_one_is_the_run_without_a_mixture(configure, curve, tmp_path):
    """Bitwise equal, except for the name."""
    plain = start(configure(tmp_path / "plain", steps=2))
    one = configure(tmp_path / "one")
    entry = MixtureEntry(one.dataset, one.embodiment)
    named = start(configure(tmp_path / "one", steps=2, dataset=DatasetConfig(), embodiment=Embodiment(), mixture={"arm": entry}))
    assert differing(named.bundle, plain.bundle) == []
    assert curve(tmp_path / "one") == curve(tmp_path / "plain")
    assert not (plain.bundle / "robots.json").exists()
    assert bundle.robot_names(named.bundle) == ("arm",)
    assert bundle.robot_names(plain.bundle) == ("robot",)


def test_filters_and_sample_weights_reach_the_run(configure, mixed, tmp_path):
    one = configure(tmp_path / "any")
    entry = MixtureEntry(one.dataset, one.embodiment, exclude_episodes=(1,), min_frames=8)
    data = open_data(configure(tmp_path / "any", dataset=DatasetConfig(), embodiment=Embodiment(), mixture={"arm": entry}))
    (arm,) = data.parts
    assert np.unique(arm.training.source.episode[arm.training.source.frames]).tolist() == [0]
    assert arm.stats.num_frames == tiny_dataset.LENGTHS[0]
    careful = open_data(mixed(tmp_path / "any", crane={"weight_column": "care"})).parts[1]
    index = careful.training.samples_at(np.arange(16)).index  # the weights of 14 frames sum to 16
    assert (np.isin(careful.training.source.frames[index], (0, 8)).mean() > 0.2) and careful.order is not None
    with pytest.raises(ConfigError, match=r"^mixture\.arm: exclude_episodes must lie in 0\.\.2, found \[7\]"):
        bad = {"arm": replace(entry, exclude_episodes=(7,))}
        open_data(configure(tmp_path / "any", dataset=DatasetConfig(), embodiment=Embodiment(), mixture=bad))


def test_what_changed_is_refused_by_its_entry(mixed, tmp_path, capsys):
    def run(**change):
        return mixed(tmp_path / "run", steps=1, resume="auto", **change)

    start(run())
    with pytest.raises(ConfigError, match=r"mixture\.crane\.weight was 1\.0, now 2\.0; .* --resume_changed true"):
        start(run(crane={"weight": 2.0}))
    config = run()
    swapped = replace(config, mixture=dict(reversed(config.mixture.items())))
    with pytest.raises(ConfigError, match="mixture was 'arm, crane', now 'crane, arm'"):
        start(swapped)
    real = open_data

    def changed(config, checked):
        data = real(config)
        crane = data.parts[1]
        action = crane.training.source.action.copy()
        action[3, 0] += np.float32(1e-3)
        moved = replace(crane, training=replace(crane.training, source=replace(crane.training.source, action=action)))
        return replace(data, parts=(data.parts[0], moved))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "open_data", changed)
        with pytest.raises(DatasetError, match=r"trained on: mixture\.crane\.columns was \w+, now \w+; .* --resume_changed true"):
            start(run())
        capsys.readouterr()
        start(replace(run(crane={"weight": 2.0}), resume_changed=True))
    said = capsys.readouterr().err
    assert "goes on with changes: mixture.crane.columns was" in said
    assert "mixture.crane.weight was 1.0, now 2.0" in said


def test_every_entry_is_refused_by_its_name(mixed, tmp_path):
    """Before a video of any entry is decoded."""
    with pytest.raises(
        DatasetError, match=r"^mixture\.crane: dataset\.root must be the folder of a LeRobot data set, but /nowhere does not"
    ):
        open_data(mixed(tmp_path / "any", crane={"dataset": DatasetConfig(root=Path("/nowhere"))}))
    narrow = tiny_dataset.NETWORK | {"action_dim": 4}
    with pytest.raises(ConfigError, match=r"^mixture\.crane: the robot's action is 5 wide, the model's 4"):
        open_data(mixed(tmp_path / "any", model=narrow))
    with pytest.raises(DatasetError, match=r"^mixture\.crane: .* has no column 'cares' to weigh samples by: .*care"):
        open_data(mixed(tmp_path / "any", crane={"weight_column": "cares"}))
    with pytest.raises(ConfigError, match=r"^mixture\.crane: validation\.episodes must leave every task an episode"):
        open_data(mixed(tmp_path / "any", validation=OFTEN, crane={"exclude_episodes": (1,)}))


def test_statistics_of_a_mixtures_bundle_are_kept_by_name(mixed, configure, whole, tmp_path):
    again = {"pretrained": whole.bundle, "pretrained_norm_stats": True, "lora": LoraConfig()}
    arm, crane = open_data(mixed(tmp_path / "any", **again)).parts
    for part in (arm, crane):
        assert part.stats.to_json() == bundle.read(whole.bundle, part.name)[1].to_json()
    with pytest.raises(ConfigError, match=r"those of arm, crane, found a run without names; write its data set as mixture\.arm"):
        open_data(configure(tmp_path / "any", **again))
    config = mixed(tmp_path / "any", **again)
    with pytest.raises(ConfigError, match=r"^mixture\.crate: .*found mixture\.crate: did you mean 'crane'"):
        open_data(replace(config, mixture={"arm": config.mixture["arm"], "crate": config.mixture["crane"]}))


def test_one_entry_may_be_streamed_beside_one_that_is_cached(mixed, configure, tmp_path):
    """Any number of workers finds the same samples, and the stream's pictures are those of the cache."""
    config = mixed(tmp_path / "any")
    arm = replace(config.mixture["arm"], embodiment=configure(tmp_path / "any").embodiment)
    streamed = replace(arm, dataset=replace(arm.dataset, cache_limit_gib=1e-6))
    mixture = replace(config, mixture={"arm": streamed, "crane": config.mixture["crane"]})
    part = open_data(mixture).parts[0].training
    assert part.cache.look_ahead and not open_data(config).parts[0].training.cache.look_ahead
    (whole,) = micro_batches(open_data(mixture).training, 1, 2, 6, 0, 1, 6)
    halves = [batch for rank in range(2) for batch in micro_batches(open_data(mixture).training, 1, 2, 6, rank, 2, 3)]
    assert torch.equal(whole.actions, torch.cat([half.actions for half in halves]))
    assert torch.equal(whole.observation.images, torch.cat([half.observation.images for half in halves]))
    frames = part.source.frames[part.samples_at(np.arange(4)).index]
    cached = open_data(replace(config, mixture={"arm": arm})).parts[0].training.cache
    assert np.array_equal(part.cache.gather(frames), cached.gather(frames))
    with pytest.raises(ConfigError, match=r"^mixture\.arm: held-out .* raise --mixture\.arm\.dataset\.cache_limit_gib"):
        open_data(replace(mixture, validation=OFTEN))


def test_the_caches_of_all_entries_are_built_ahead(mixed, tmp_path):
    """What a node does; tests/journeys runs it as a task of Ray."""
    entries = mixed(tmp_path / "any", crane={}).entries().values()
    elsewhere = [replace(entry, dataset=replace(entry.dataset, cache_dir=tmp_path / "cache")) for entry in entries]
    seconds, digests = caching.build(elsewhere, 32)
    assert seconds > 0 and len(digests) == 2
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_a_mixture_is_a_collator_of_all_its_parts(mixed, tmp_path):
    data = open_data(mixed(tmp_path / "any"))
    assert isinstance(data.training, MixtureCollator)
    batch = data.training(0, 6)
    assert data.training.valid_elements(0, 6) == int(batch.action_mask.sum())
    elsewhere = pickle.loads(pickle.dumps(data.training))(0, 6)  # as in a worker process of the loader
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch.tensors(), elsewhere.tensors(), strict=True))
