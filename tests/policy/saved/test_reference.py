"""Tests of a bundle's recorded observation: replaying it, and telling device, versions and conversion apart."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pi0fm import machine
from pi0fm.cli.main import main
from pi0fm.policy.saved import bundle, reference
from pi0fm.policy.saved.manifest import identity, write_manifest
from pi0fm_client.errors import BundleError, ConfigError


@pytest.fixture(scope="module")
def made(small_policy, observations, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "bundle"
    bundle.save(path, small_policy.weights, small_policy.config, small_policy.stats, recorded=observations[0])
    return path


@pytest.fixture(scope="module")
def other(small_policy, observations, tmp_path_factory):
    """The same with one matrix changed, as a wrong conversion would."""
    weights = dict(small_policy.weights)
    weights["action_out.weight"] = 1.5 * weights["action_out.weight"]
    path = tmp_path_factory.mktemp("other") / "bundle"
    bundle.save(path, weights, small_policy.config, small_policy.stats)
    return path


def test_the_recorded_chunk_is_the_policy_s_and_is_given_again_bit_for_bit(made, small_policy, observations):
    recorded, policy = reference.read(made), small_policy.in_memory()
    np.testing.assert_array_equal(recorded.actions, policy.infer_batch(observations[:1], [reference.NOISE_SEED])[0].actions)
    for camera, image in observations[0].images.items():
        np.testing.assert_array_equal(recorded.observation.images[camera], image)
    assert recorded.observation.prompt == observations[0].prompt and recorded.of == identity(made)
    found = reference.compare(bundle.load(made, device="cpu", precision="float32"), recorded)
    assert found.agrees and found.largest == 0 and found.differs == {} and found.another_seed > 0.1


def test_other_numbers_differ_a_little_and_other_weights_a_lot(made, other, small_policy):
    recorded = reference.read(made)
    halved = reference.compare(small_policy.in_memory(torch.bfloat16), recorded)
    assert halved.agrees and 0 < halved.largest < 0.1 and halved.differs["numbers"] == ("float32", "bfloat16")
    assert not reference.compare(small_policy.in_memory(torch.bfloat16), recorded, tolerance=1e-6).agrees
    wrong = reference.compare(bundle.load(other, device="cpu", precision="float32"), recorded)
    assert not wrong.agrees and wrong.largest > 10 * wrong.tolerance
    # in robot units it is the same difference by each dimension's deviation
    assert len(wrong.largest_robot_units) == 3 and max(wrong.largest_robot_units) > wrong.largest


def test_the_identity_covers_it_and_two_writings_are_one(made, small_policy, observations, tmp_path):
    bundle.save(tmp_path / "again", small_policy.weights, small_policy.config, small_policy.stats, recorded=observations[0])
    bundle.save(tmp_path / "another", small_policy.weights, small_policy.config, small_policy.stats, recorded=observations[3])
    assert identity(tmp_path / "again") == identity(made) != identity(tmp_path / "another")


def test_the_command_says_that_it_agrees(made, capsys):
    assert main(["verify", str(made), "--device", "cpu", "--precision", "float32"]) == 0
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert last["agrees"] and last["identity"] == last["recorded_by"] == identity(made) and last["here"]["largest"] == 0
    assert "gives the recorded chunk here" in err


def test_the_command_names_the_device_or_the_conversion(made, other, capsys):
    """A tolerance that bfloat16 cannot keep stands for a device that computes otherwise."""
    assert main(["verify", str(made), "--device", "cpu", "--precision", "bfloat16", "--tolerance", "1e-7"]) == 1
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert not last["agrees"] and last["float32 on a CPU"]["agrees"] and last["float32 on a CPU"]["largest"] == 0
    assert "in float32 on a CPU it agrees, so it is cpu" in err and "in bfloat16" in err
    assert main(["verify", str(other), "--against", str(made), "--device", "cpu", "--precision", "float32"]) == 1
    out, err = capsys.readouterr()
    assert "it is the conversion" in err.splitlines()[-1] and json.loads(out.splitlines()[-1])["recorded_by"] == identity(made)


def test_a_bundle_without_one_a_damaged_one_and_another_robot_are_refused(made, other, small_policy, observations, tmp_path, capsys):
    assert main(["verify", str(other)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "holds no recorded observation to replay" in err and "--against" in err
    cut = shutil.copytree(made, tmp_path / "cut")
    (cut / reference.FILE).write_bytes((cut / reference.FILE).read_bytes()[:100])
    write_manifest(cut)
    with pytest.raises(BundleError, match="not readable"):
        reference.read(cut)
    wide = replace(reference.read(made), actions=np.zeros((9, 3), np.float32))
    with pytest.raises(ConfigError, match=r"policy's shape \[4, 3\], found \[9, 3\]"):
        reference.compare(small_policy.in_memory(), wide)
    seen = replace(observations[0], images={"top": observations[0].images["base"]})
    with pytest.raises(ConfigError, match="of another robot"):
        reference.compare(small_policy.in_memory(), replace(wide, observation=seen))


def test_without_memory_the_bundle_is_written_without_one(small_policy, observations, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    bundle.save(tmp_path / "bundle", small_policy.weights, small_policy.config, small_policy.stats, recorded=observations[0])
    assert not (tmp_path / "bundle" / reference.FILE).exists() and "no reference for pi0fm verify" in capsys.readouterr().err
    bundle.load(tmp_path / "bundle", device="cpu")
