"""Tests that LeRobot's PI0 and PI05, saved and converted, give the same actions, and so does a bundle loaded by LeRobot.

Both sides get the same pictures, states, sentences and noise, in robot units at both ends: normalisation, prompt and relative actions
are compared too.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shrunk_pi05
import small_tokenizer
import torch
from lerobot.policies.factory import make_pre_post_processors
from numpy.typing import NDArray
from safetensors.torch import load_file, load_model
from small_pi0 import resized

from pi0fm.bench.harness.peer import RobotFeatures, image_key
from pi0fm.convert.config import ConvertConfig
from pi0fm.convert.conversion import convert
from pi0fm.data.columns.norm_stats import ColumnStats
from pi0fm.data.order.counter import draw
from pi0fm.policy.saved import bundle
from pi0fm_client.types import Observation

SIZE = resized(
    vision={"depth": 2, "patch_size": 8, "image_size": 16}, decoder={"num_heads": 8}, vocab_size=48, max_prompt_tokens=64, action_dim=6
)
ROBOT = RobotFeatures(("base", "wrist"), 4, 4)
RELATIVE = {"use_relative_actions": True, "relative_exclude_joints": ["grip"], "action_feature_names": ["x", "y", "z", "Gripper"]}
KINDS = ("pi0", "pi05")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Theirs:
    """LeRobot's policy and processors."""

    policy: Any
    before: Any
    after: Any

    def act(self, observation: Observation, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """A chunk [H, A] in robot units; pictures [3, h, w] in [0, 1], as LeRobot's robots give them."""
        batch: dict[str, Any] = {"observation.state": torch.from_numpy(observation.state), "task": observation.prompt}
        for name, picture in observation.images.items():
            batch[image_key(name)] = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        chunk = self.policy.predict_action_chunk(self.before(batch), noise=torch.from_numpy(noise)[None])
        return self.after(chunk)[0].numpy()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer.write(tmp_path_factory.mktemp("words") / "tokenizer", 48)


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(kind, tokenizer, tmp_path_factory) -> tuple[Theirs, Path]:
    """A policy in memory, and what LeRobot's save_pretrained makes of it."""
    random = np.random.default_rng(3)
    draws = {column: random.normal(0.3, 1.5, (200, 4)).astype(np.float32) for column in ("observation.state", "action")}
    stats = {
        column: {
            "mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0),
            "q01": np.quantile(values, 0.01, 0), "q99": np.quantile(values, 0.99, 0),
        }
        for column, values in draws.items()
    }  # fmt: skip
    config = shrunk_pi05.make_config(kind, SIZE, ROBOT, **RELATIVE)
    theirs = Theirs(shrunk_pi05.make_policy(kind, config, SIZE), *shrunk_pi05.make_processors(kind, config, stats, tokenizer))
    path = tmp_path_factory.mktemp("lerobot") / "pretrained_model"
    theirs.policy.save_pretrained(path)
    theirs.before.save_pretrained(path)
    theirs.after.save_pretrained(path)
    return theirs, path


@pytest.fixture(scope="module")
def converted(saved, tmp_path_factory) -> Path:
    """The bundle; nothing is typed but the heads of a tower that is not SigLIP's, cameras and tokenizer come from LeRobot's files."""
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    convert(ConvertConfig(source=saved[1], output_dir=path, vision_heads=2))
    return path


def observations() -> list[Observation]:
    """One with both cameras, one without the second; one with a sentence that openpi would write otherwise."""
    random = np.random.default_rng(4)

    def one(*cameras: str, prompt: str = "lift the red cup") -> Observation:
        images = {camera: random.integers(0, 256, (16, 16, 3), dtype=np.uint8) for camera in cameras}
        return Observation(images, random.normal(size=4).astype(np.float32), prompt)

    return [one("base", "wrist"), one("base"), one("base", "wrist", prompt=" lift_the\nred  cup \n")]


def assert_same_actions(theirs: Theirs, path: Path) -> None:
    ours = bundle.load(path, device="cpu", precision="float32")
    for seed, observation in enumerate(observations()):
        found = ours.infer_batch([observation], [seed])[0].actions
        expected = theirs.act(observation, draw(seed, 0, 0, 0, (SIZE.action_horizon, SIZE.action_dim))[0])
        assert np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_a_converted_policy_acts_as_lerobots(kind, saved, converted):
    assert_same_actions(saved[0], converted)
    config, _ = bundle.read(converted)
    assert config.embodiment.cameras == {"base": "observation.images.base", "wrist": "observation.images.wrist"}
    assert config.embodiment.delta_actions == (0, 1, 2)
    assert config.normalization == {"pi0": "z_score", "pi05": "quantile"}[kind]
    assert config.prompt_dialect == "lerobot"
    assert (config.model.action_horizon, config.execution_horizon, config.model.max_prompt_tokens) == (4, 4, 64)


def test_lerobot_loads_an_exported_bundle_and_acts_as_it(kind, saved, converted, tmp_path, capsys):
    """LeRobot's own from_pretrained, which would hand back random weights without an error."""
    path = tmp_path / "lerobot"
    convert(ConvertConfig(source=converted, output_dir=path, to="lerobot", any_size=True))
    policy = shrunk_pi05.POLICIES[kind].from_pretrained(path, size=SIZE)
    assert "All keys loaded successfully" in capsys.readouterr().out
    before, after = make_pre_post_processors(policy.config, str(path))
    assert_same_actions(Theirs(policy.eval(), before, after), converted)


def test_an_export_has_the_keys_and_shapes_of_lerobots_class(saved, converted, tmp_path):
    path = tmp_path / "lerobot"
    convert(ConvertConfig(source=converted, output_dir=path, to="lerobot", any_size=True))
    exported = load_file(path / "model.safetensors")
    expected = saved[0].policy.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == {name: tuple(t.shape) for name, t in expected.items()}


def test_openpis_loader_takes_an_export(kind, saved, converted, tmp_path):
    """openpi loads with safetensors' strict load_model into a class that ties lm_head and embed_tokens; it refuses a file with both."""
    path = tmp_path / "openpi"
    convert(ConvertConfig(source=converted, output_dir=path, to="openpi", any_size=True, prompt_dialect="openpi"))
    core = copy.deepcopy(saved[0].policy.model)
    core.paligemma_with_expert.paligemma.lm_head.weight = core.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight
    for parameter in core.parameters():
        torch.nn.init.zeros_(parameter)
    missing, unexpected = load_model(core, path / "model.safetensors", strict=True)
    assert not missing
    assert not unexpected
    observation = observations()[0]
    noise = draw(5, 0, 0, 0, (SIZE.action_horizon, SIZE.action_dim))[0]
    expected = saved[0].act(observation, noise)
    loaded = copy.deepcopy(saved[0].policy)
    loaded.model = core.eval()
    assert np.array_equal(Theirs(loaded, saved[0].before, saved[0].after).act(observation, noise), expected)


def test_a_robot_narrower_than_the_network_with_names_of_its_own(kind, converted, tmp_path):
    """pi0fm holds the dimensions that a robot lacks at 0, LeRobot lets noise flow there: an export makes it harmless.

    LeRobot sees no column called `image`: it is asked under the camera's name.
    """
    config, stats = bundle.read(converted)
    narrow = ColumnStats(**{name: getattr(stats.action, name)[:3] for name in stats.to_json()["action"]})
    names = {"cameras": {"base": "image", "wrist": "wrist_image"}, "state": "state"}
    robot = dataclasses.replace(config.embodiment, robot_action_dim=3, delta_actions=(), **names)
    changed = dataclasses.replace(config, embodiment=robot, padded_noise=False, tokenizer=str(converted / "tokenizer"))
    bundle.save(tmp_path / "narrow", load_file(converted / "model.safetensors"), changed, dataclasses.replace(stats, action=narrow))
    convert(ConvertConfig(source=tmp_path / "narrow", output_dir=tmp_path / "lerobot", to="lerobot", any_size=True))
    policy = shrunk_pi05.POLICIES[kind].from_pretrained(tmp_path / "lerobot", size=SIZE).eval()
    before, after = make_pre_post_processors(policy.config, str(tmp_path / "lerobot"))
    assert_same_actions(Theirs(policy, before, after), tmp_path / "narrow")
