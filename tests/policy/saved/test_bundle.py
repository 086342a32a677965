"""Tests of bundles: they load as saved, and anything else is refused in one line."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

import pi0fm
from pi0fm import files
from pi0fm.policy.device import is_out_of_memory
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.manifest import write_manifest
from pi0fm_client import Executor
from pi0fm_client.errors import BundleError, ConfigError, ObservationError, OutputError
from pi0fm_client.types import Observation

FILES = ["config.json", "manifest.json", "model.safetensors", "norm_stats.json"]
OLD = Path(__file__).parent / "format_2"
FLAT = {
    "observation/images/base": np.zeros((32, 32, 3), np.uint8),
    "observation/state": np.zeros(4, np.float32),
    "prompt": "press",
}


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.load(path, device="cpu", precision="float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(small_policy, saved, observations):
    """The same actions before and after, for the same noise."""
    assert sorted(path.name for path in saved.iterdir()) == FILES
    loaded = bundle.load(saved, device="cpu", precision="float32")
    for seed, observation in enumerate(observations):
        before = small_policy.in_memory().infer_batch([observation], [seed])[0]
        assert np.array_equal(loaded.infer_batch([observation], [seed])[0].actions, before.actions)
    own = {"identity", "state_range"}
    assert {name: value for name, value in loaded.metadata.items() if name not in own} == small_policy.config.metadata()
    assert loaded.metadata["identity"] == bundle.identity(saved)
    assert bundle.read(saved)[0] == small_policy.config


def test_metadata_says_what_a_caller_must_know(small_policy, saved):
    known = bundle.load(saved, device="cpu").metadata
    expected = {
        "action_horizon": 4,
        "execution_horizon": 2,
        "robot_action_dim": 3,
        "state_dim": 4,
        "num_flow_steps": 4,
        "image_size": [32, 32],
    }
    assert {name: known[name] for name in expected} == expected
    assert known["cameras"] == {"base": "observation.images.base", "wrist": "observation.images.wrist"}
    assert known["state_range"] == {"min": small_policy.stats.state.min.tolist(), "max": small_policy.stats.state.max.tolist()}
    assert json.loads(json.dumps(known)) == known


def test_a_policy_of_this_process_drives_a_robot(saved):
    """The executor knows sizes, cameras and the training's states from the bundle alone."""
    policy = pi0fm.load(str(saved), device="cpu")
    with Executor(policy, control_hz=10, initial_command=np.zeros(3), cameras=["base"]) as executor:
        with pytest.raises(ObservationError, match=r"observation\.state\[0\] was .* in training, found 1000"):
            executor.observe({**FLAT, "observation/state": np.full(4, 1000.0)})
        for _ in range(60):
            executor.observe(FLAT)
            executor.next()
            executor.pace()
            if executor.report.chunks >= 2:
                break
        assert executor.report.chunks >= 2 and executor.report.failures == 0


def test_three_lines_of_python(saved):
    policy = pi0fm.load(str(saved), device="cpu")
    chunk = policy.infer(FLAT)
    assert chunk.actions.shape == (4, 3)
    assert chunk.actions.dtype == np.float32
    assert chunk.timings["infer_ms"] > 0


@pytest.mark.parametrize(
    "change",
    [
        {"observation/images/bose": FLAT["observation/images/base"]},
        {"observation/state": np.zeros(3)},
        {"observation/state": np.full(4, np.nan)},
    ],
)
def test_a_flat_map_with_a_fault_is_refused(saved, change):
    with pytest.raises(ObservationError):
        pi0fm.load(str(saved), device="cpu").infer(FLAT | change)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    assert f"lacks {name}" in refused(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_cut_file(copy, name, keep):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(keep * len(content))])
    assert ("not readable" if name == "manifest.json" else "it is cut") in refused(copy)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_changed_file_of_the_same_size(copy, name):
    """Whatever its size: a single bit of the weights."""
    content = bytearray((copy / name).read_bytes())
    content[-20] ^= 1
    (copy / name).write_bytes(bytes(content))
    assert "differs from the manifest's SHA-256" in refused(copy)


def test_the_check_of_large_weights_is_said(saved, monkeypatch, capsys):
    bundle.load(saved, device="cpu")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bundle, "VERBOSE_FROM", 1)
    bundle.load(saved, device="cpu")
    assert re.search(r"model\.safetensors: 0\.0 GB read and verified in \d+\.\d s", capsys.readouterr().err)


def test_one_identity_over_every_file(saved, copy):
    """The same for a copy, in metadata too; another where any file is another."""
    known = bundle.identity(saved)
    assert re.fullmatch("[0-9a-f]{16}", known)
    assert bundle.identity(copy) == bundle.metadata(copy)["identity"] == bundle.load(saved, device="cpu").metadata["identity"] == known
    seen = {known}
    for name in FILES:
        if name != "manifest.json":
            (copy / name).write_bytes((copy / name).read_bytes() + b" ")
            write_manifest(copy)
            seen.add(bundle.identity(copy))
    assert len(seen) == len(FILES)


def test_a_bundle_of_format_2_acts_as_it_did():
    """As the version that wrote it: pictures that are resized, a dimension that never moves, a state at its quantile."""
    known = json.loads((OLD / "answer.json").read_text())

    def picture(height, width, number):
        y, x, c = np.ogrid[:height, :width, :3]
        return ((y * 7 + x * 13 + c * 29 + number * 31) % 256).astype(np.uint8)

    pictures = [{"base": picture(48, 85, 0), "wrist": picture(50, 33, 1)}, {"base": picture(24, 41, 2)}]
    policy = bundle.load(OLD / "bundle", device="cpu", precision="float32")
    for seed, (images, prompt) in enumerate(zip(pictures, ("press", "lift it"), strict=True)):
        observation = Observation(images, np.float32(known["state"][seed]), prompt)
        assert np.allclose(policy.infer_batch([observation], [seed])[0].actions, known["actions"][seed], rtol=1e-5, atol=1e-5)


def test_an_extra_file_but_not_a_hidden_one(copy):
    (copy / ".DS_Store").write_text("")
    (copy / ".cache").mkdir()
    (copy / ".cache/huggingface").write_text("")
    assert bundle.load(copy, device="cpu")
    (copy / "added_tokens.json").write_text("{}")
    assert "holds added_tokens.json, which its manifest does not list" in refused(copy)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"files": []}', '{"files": {"config.json": 3}}', '{"files": {}}', "{"])
def test_a_manifest_that_is_none(copy, content):
    (copy / "manifest.json").write_text(content)
    assert "manifest.json" in refused(copy)


def test_a_manifest_may_not_point_outside(copy):
    tree = json.loads((copy / "manifest.json").read_text())
    (copy.parent / "secret").write_text("x")
    tree["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (copy / "manifest.json").write_text(json.dumps(tree))
    assert "must list ../secret inside the bundle" in refused(copy)


def test_a_folder_that_is_not_there(tmp_path):
    assert "no bundle at" in refused(tmp_path / "nothing")
    assert "a bundle is a folder, found the address ws:/localhost:8000" in refused(Path("ws://localhost:8000"))


def test_a_folder_that_is_no_bundle_is_not_told_to_be_copied_again(copy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert refused(other).endswith("neither manifest.json nor model.safetensors; give the folder that the last line of pi0fm train names")
    assert refused(copy.parent).endswith(f"give {copy}")
    (copy / "manifest.json").unlink()
    assert "lacks manifest.json; copy it again" in refused(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("action_out.bias"), "missing (1): action_out.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unexpected (1): extra"),
        (lambda weights: weights.update({"action_out.bias": torch.zeros(6)}), "of another shape (1): action_out.bias [6] for [5]"),
    ],
)
def test_weights_that_do_not_fit(copy, change, words):
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors")
    write_manifest(copy)
    assert words in refused(copy)


def test_weights_that_are_not_safetensors(copy):
    (copy / "model.safetensors").write_bytes(b"\x80\x04pickled?" * 10)
    write_manifest(copy)
    assert "model.safetensors is cut or damaged" in refused(copy)


def test_another_format_and_a_configuration_of_another_version(copy):
    tree = json.loads((copy / "config.json").read_text())
    files.write_json(copy / "config.json", tree | {"format": 1})
    write_manifest(copy)
    assert "format 1, this pi0fm reads 2, 3" in refused(copy)
    files.write_json(copy / "config.json", tree | {"policy": tree["policy"] | {"colour": "red"}})
    write_manifest(copy)
    assert "unknown option colour" in refused(copy)


def test_a_missing_statistic(copy):
    tree = json.loads((copy / "norm_stats.json").read_text())
    del tree["action"]["std"]
    files.write_json(copy / "norm_stats.json", tree)
    write_manifest(copy)
    assert "lacks action.std" in refused(copy)


def test_save_refuses_what_exists(small_policy, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/thesis.txt").write_text("chapter one")
    with pytest.raises(BundleError, match="exists; remove it or choose another"):
        bundle.save(tmp_path / "bundle", small_policy.weights, small_policy.config, small_policy.stats)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "thesis.txt"]


def test_a_save_that_fails_leaves_nothing(small_policy, tmp_path):
    config = replace(small_policy.config, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError):
        bundle.save(tmp_path / "bundle", small_policy.weights, config, small_policy.stats)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_saved_in_float32(small_policy, tmp_path):
    halved = {name: tensor.bfloat16() for name, tensor in small_policy.weights.items()}
    bundle.save(tmp_path / "bundle", halved, small_policy.config, small_policy.stats)
    assert {tensor.dtype for tensor in load_file(tmp_path / "bundle/model.safetensors").values()} == {torch.float32}


def test_a_service_may_read_what_was_saved(small_policy, tmp_path):
    before = os.umask(0o022)
    bundle.save(tmp_path / "bundle", small_policy.weights, small_policy.config, small_policy.stats)
    os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "bundle").iterdir()} == {"0o644"}


def test_the_older_bundle_keeps_its_name_until_the_new_one_is_whole(small_policy, tmp_path):
    path, seen = tmp_path / "bundle", []

    class Watched(dict):
        def items(self):
            seen.append(bundle.read(path)[0].training["steps"])
            return super().items()

    bundle.save(path, small_policy.weights, small_policy.config, small_policy.stats)
    for steps in ("8", "8"):
        config = replace(small_policy.config, training={"steps": steps})
        bundle.save(path, Watched(small_policy.weights), config, small_policy.stats, keep_older=True)
    assert seen[1::2] == ["7", "8"]
    assert {each.name: bundle.read(each)[0].training["steps"] for each in tmp_path.iterdir()} == {
        "bundle": "8",
        "bundle-7": "7",
        "bundle-8": "8",
    }


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(small_policy, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pi0fm.policy.saved.weights._write", full)
    with pytest.raises(OutputError, match="No space left on device; make room"):
        bundle.save(tmp_path / "bundle", small_policy.weights, small_policy.config, small_policy.stats)
    assert list(tmp_path.iterdir()) == []


def test_weights_go_to_the_device_in_the_numbers_they_are_multiplied_in(saved, small_policy):
    """As the sampler keeps them, so that no second copy is made there; `meta` stands for a device that is not the host."""
    expected = small_policy.in_memory(torch.bfloat16).model.state_dict()
    found = bundle.load_network(saved, small_policy.config.model, "meta", torch.bfloat16).state_dict()
    kept = {name: tensor.dtype for name, tensor in expected.items() if name in found}  # a CPU may pack its matrices
    assert {name: tensor.dtype for name, tensor in found.items() if name in kept} == kept
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
    assert found["decoder.layers.0.backbone.qkv.weight"].dtype == torch.bfloat16


def test_a_tokenizer_of_its_own_travels_along(small_policy, tmp_path, observations):
    """A bundle that was trained with a tokenizer in a folder opens after that folder is gone, and from another place."""
    ByT5Tokenizer().save_pretrained(tmp_path / "tokens")
    config = replace(small_policy.config, tokenizer=str(tmp_path / "tokens"))
    bundle.save(tmp_path / "bundle", small_policy.weights, config, small_policy.stats)
    shutil.rmtree(tmp_path / "tokens")
    (tmp_path / "bundle").rename(tmp_path / "moved")
    found = bundle.load(tmp_path / "moved", device="cpu", precision="float32").infer_batch(observations[:1], [1])[0]
    assert np.array_equal(found.actions, small_policy.in_memory().infer_batch(observations[:1], [1])[0].actions)


def test_sampling_can_be_changed_at_loading(saved, observations):
    changed = bundle.load(saved, device="cpu", precision="float32", num_flow_steps=1, solver="heun")
    assert changed.metadata["num_flow_steps"] == 1
    assert changed.metadata["solver"] == "heun"
    usual = bundle.load(saved, device="cpu", precision="float32")
    assert not np.allclose(changed.infer_batch(observations[:1], [1])[0].actions, usual.infer_batch(observations[:1], [1])[0].actions)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"precision": "float16"}, {"device": "tpu?"}, {"num_flow_steps": 0}, {"solver": "eulr"}])
def test_options_out_of_range(saved, wrong):
    with pytest.raises(ConfigError):
        bundle.load(saved, **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test misses")
def test_a_device_that_is_not_there(saved):
    with pytest.raises(ConfigError, match="'cuda' is not available"):
        bundle.load(saved, device="cuda")


def test_a_bundle_that_does_not_fit_is_said_in_one_line(saved, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(bundle, "fill_network", full)
    with pytest.raises(
        ConfigError, match=r"cpu has no memory left for .*GiB in float32; end what else uses it, or type --precision"
    ) as caught:
        bundle.load(saved, device="cpu")
    assert "\n" not in str(caught.value)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("no"))
