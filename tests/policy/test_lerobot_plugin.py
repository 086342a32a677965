"""Tests of a bundle as a LeRobot policy: the answers of the bundle's chain, and lerobot-eval from the command line."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_policies import observations, saved, small_policy

from pi0fm.policy.saved import bundle
from pi0fm_client.errors import BundleError, ConfigError, ObservationError
from pi0fm_client.types import ActionPrefix

__all__ = ["observations", "saved", "small_policy"]
ROOT = Path(__file__).resolve().parents[2] / "lerobot_plugin"


@pytest.fixture(scope="module")
def plugin(saved):
    """`plugin(**options)`: config, policy, both processors, as LeRobot's factory makes them."""
    pytest.importorskip("lerobot")
    sys.path.insert(0, str(ROOT))
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    import lerobot_policy_pi0fm  # noqa: F401 - registers itself, as LeRobot's discovery makes it do

    def made(**options):
        config = make_policy_config("pi0fm", **{"bundle": str(saved), "device": "cpu", **options})
        return config, get_policy_class("pi0fm").from_pretrained(None, config=config), *make_pre_post_processors(config)

    yield made
    sys.path.remove(str(ROOT))


def batch_of(seen):
    """LeRobot's batch of observations that hold both cameras."""
    pictures = {
        f"observation.images.{name}": torch.stack([torch.from_numpy(one.images[name]).permute(2, 0, 1).float() / 255 for one in seen])
        for name in seen[0].images
    }
    return {**pictures, "observation.state": torch.from_numpy(np.stack([one.state for one in seen])), "task": [one.prompt for one in seen]}


def test_actions_are_those_of_the_bundles_own_chain(plugin, saved, observations):
    _, policy, before, after = plugin(noise_seed=5)
    seen = [observations[0], observations[0]]
    expected = np.stack([chunk.actions for chunk in bundle.load(saved, device="cpu").infer_batch(seen, [5, 5])])
    batch = before(batch_of(seen))
    for row in (0, 1, 0):  # execution_horizon 2, then a new chunk
        action = after(policy.select_action(batch))
        assert action.dtype == torch.float32
        np.testing.assert_array_equal(action.numpy(), expected[:, row])
    policy.reset()
    np.testing.assert_array_equal(policy.select_action(batch).numpy(), expected[:, 0])


def test_seeds_are_drawn_from_torchs_generator(plugin, observations):
    _, policy, before, _ = plugin(n_action_steps=1)
    batch = before(batch_of(observations[:1]))
    torch.manual_seed(3)
    first, second = policy.select_action(batch), policy.select_action(batch)
    torch.manual_seed(3)
    assert torch.equal(policy.select_action(batch), first) and not torch.equal(first, second)


def test_a_robots_own_names_are_mapped_and_a_camera_may_be_missing(plugin, saved, observations):
    config, policy, before, _ = plugin(noise_seed=5, rename_map={"observation.image": "observation.images.base"})
    assert set(config.input_features) == {"observation.image", "observation.images.wrist", "observation.state"}
    assert config.input_features["observation.image"].shape == (3, 32, 32) and config.output_features["action"].shape == (3,)
    batch = batch_of(observations[1:2])  # base alone
    batch["observation.image"] = batch.pop("observation.images.base")
    expected = bundle.load(saved, device="cpu").infer_batch(observations[1:2], [5])[0].actions
    np.testing.assert_array_equal(policy.predict_action_chunk(before(batch))[0].numpy(), expected)


def test_real_time_chunking_leads_to_the_remainder_without_lerobots_padding(plugin, saved, observations):
    _, policy, before, _ = plugin(noise_seed=5)
    left = np.array([[1.0, 0.5, -2.0], [1.5, 0.25, -1.0]], np.float32)
    expected = bundle.load(saved, device="cpu").infer_batch(observations[:1], [5], prefixes=[ActionPrefix(left, 1)])[0].actions
    padded = torch.zeros(4, 3)
    padded[:2] = torch.from_numpy(left)
    assert policy.supports_rtc()
    found = policy.predict_action_chunk(before(batch_of(observations[:1])), inference_delay=1, prev_chunk_left_over=padded)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def test_what_it_cannot_do_is_refused(plugin, observations, tmp_path):
    for options, line in (
        ({"bundle": ""}, "bundle must name"),
        ({"n_action_steps": 9}, r"must lie in 1\.\.4, found 9"),
        ({"rename_map": {"a": "b"}}, "maps 'a' to 'b'; the bundle has "),
    ):
        with pytest.raises(ConfigError, match=line):
            plugin(**options)
    with pytest.raises(BundleError):
        plugin(bundle=str(tmp_path))
    _, policy, before, _ = plugin()
    with pytest.raises(ConfigError, match="trained by pi0fm train"):
        policy.forward({})
    batch = batch_of(observations[:1])
    with pytest.raises(ObservationError, match=r"float \[B, 3, height, width\]"):
        policy.select_action(before({**batch, "observation.images.base": batch["observation.images.base"].to(torch.uint8)}))
    del batch["observation.state"]
    with pytest.raises(ObservationError, match=r"needs 'observation\.state'"):
        policy.select_action(before(batch))


PROBE = '''
import os
from dataclasses import dataclass, field
import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

class Probe(gym.Env):
    """Shows noise, notes what it is told, succeeds at its fifth step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    task_description, task, _max_episode_steps = "press", "press", 6

    def __init__(self, **_):
        picture = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)
        spaces = {"pixels": gym.spaces.Dict(base=picture, wrist=picture), "agent_pos": gym.spaces.Box(-9, 9, (4,), np.float64)}
        self.observation_space, self.action_space = gym.spaces.Dict(spaces), gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.render_mode, self.rows = "rgb_array", []

    def _seen(self):
        pixels = {name: self.np_random.integers(0, 256, (40, 40, 3), np.uint8) for name in ("base", "wrist")}
        self.now = {"pixels": pixels, "agent_pos": self.np_random.normal(size=4)}
        return self.now

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.rows = []
        return self._seen(), {"is_success": False}

    def step(self, action):
        self.rows.append((self.now["pixels"]["base"], self.now["pixels"]["wrist"], self.now["agent_pos"], np.array(action)))
        done = len(self.rows) == 5
        if done:
            folder = os.environ["PROBE"]
            np.savez(os.path.join(folder, f"{len(os.listdir(folder))}.npz"), *[np.stack(part) for part in zip(*self.rows)])
        return self._seen(), float(done), done, False, {"is_success": done}

    def render(self):
        return self.now["pixels"]["base"]

@EnvConfig.register_subclass("probe")
@dataclass
class ProbeConfig(EnvConfig):
    task: str = "Probe-v0"
    features: dict = field(default_factory=lambda: {
        "action": PolicyFeature(FeatureType.ACTION, (3,)), "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
        "pixels/base": PolicyFeature(FeatureType.VISUAL, (40, 40, 3)), "pixels/wrist": PolicyFeature(FeatureType.VISUAL, (40, 40, 3))})
    features_map: dict = field(default_factory=lambda: {"action": "action", "agent_pos": "observation.state",
        "pixels/base": "observation.images.base", "pixels/wrist": "observation.images.wrist"})
    package_name = "lerobot_env_probe"
    gym_kwargs = {}

gym.register("lerobot_env_probe/Probe-v0", entry_point=Probe, max_episode_steps=6)
'''


@pytest.mark.journey
@pytest.mark.timeout(300)
def test_lerobot_eval_finds_the_plugin_and_runs_a_bundle(saved, tmp_path):
    """The plugin's own wheel, found by LeRobot by its name, in an environment that is a second such plugin."""
    pytest.importorskip("lerobot")
    site, notes, out = tmp_path / "site", tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, capture_output=True, check=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    (site / "lerobot_env_probe-0.1.dist-info").mkdir()
    (site / "lerobot_env_probe-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_env_probe\nVersion: 0.1\n")
    (site / "lerobot_env_probe.py").write_text(PROBE)
    words = ["--policy.type=pi0fm", f"--policy.bundle={saved}", "--policy.noise_seed=7", "--policy.device=cpu", "--env.type=probe"]
    words += ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false", f"--output_dir={out}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]), "PROBE": str(notes)}
    done = subprocess.run(
        [sys.executable, "-m", "lerobot.scripts.lerobot_eval", *words],
        env=environment,
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    overall = json.loads((out / "eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 2 and overall["pc_success"] == 100.0
    policy = bundle.load(saved, device="cpu")
    for file in sorted(notes.glob("*.npz"))[:2]:
        base, wrist, state, action = np.load(file).values()
        for step in (0, 2, 4):  # execution_horizon 2
            flat = {
                "observation.images.base": base[step],
                "observation.images.wrist": wrist[step],
                "observation.state": state[step],
                "prompt": "press",
            }
            expected = policy.infer(flat, noise_seed=7).actions
            np.testing.assert_allclose(action[step : step + 2], expected[: len(action[step : step + 2])], atol=1e-4)
