"""Tests of conversion: an export converts back bitwise, and every fault is reported before a file is written."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset
import torch
from safetensors.torch import load_file, save_file
from small_pi0 import resized

from pi0fm import files, options
from pi0fm.cli.main import main
from pi0fm.convert.config import ConvertConfig
from pi0fm.convert.conversion import convert
from pi0fm.convert.names import EMBEDDING, LM_HEAD
from pi0fm.data.chain import Sample
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.robots import Robot
from pi0fm_client.errors import BundleError, ConfigError, OutputError, Pi0fmError

KINDS = {"pi0": ("token", "concatenate", "z_score"), "pi05": ("prompt", "adaptive_norm", "quantile")}
HEADS = {"num_heads": 2, "vision_heads": 2}


def make(path: Path, kind: str, small_policy, tokenizer: Path | str, recorded=None, **changes) -> Path:
    """A bundle of a small pi0 or pi0.5, all weights random, as if converted; with an observation, as if trained."""
    state_input, time_conditioning, normalization = KINDS[kind]
    inputs = {"state_input": state_input, "time_conditioning": time_conditioning, "max_prompt_tokens": 64}
    model = resized(tiny_dataset.network(), vision={"gelu": "tanh"}, decoder={"gelu": "tanh"}, **inputs)
    fields = {"padded_noise": True, "normalization": normalization, "norm_floor": 1e-6, "norm_rule": "absolute"} | changes
    config = dataclasses.replace(small_policy.config, model=model, tokenizer=str(tokenizer), **fields)
    random = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(tensor.shape, generator=random) for name, tensor in Pi0(model).state_dict().items()}
    bundle.save(path, weights, config, small_policy.stats, recorded=recorded)
    return path


@pytest.fixture(scope="module")
def bundles(small_policy, character_tokenizer, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {kind: make(root / kind, kind, small_policy, character_tokenizer) for kind in KINDS}


@pytest.fixture(scope="module")
def peers(bundles, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Both bundles in both peers' forms; copy one before changing it."""
    root = tmp_path_factory.mktemp("peers")
    made = {}
    for kind, source in bundles.items():
        for peer in ("lerobot", "openpi"):
            made[kind, peer] = root / f"{kind}-{peer}"
            convert(ConvertConfig(source=source, output_dir=made[kind, peer], to=peer, any_size=True, prompt_dialect=peer))
    return made


@pytest.fixture
def openpi(peers, tmp_path) -> Path:
    return Path(shutil.copytree(peers["pi0", "openpi"], tmp_path / "openpi"))


@pytest.fixture
def lerobot(peers, tmp_path) -> Path:
    return Path(shutil.copytree(peers["pi05", "lerobot"], tmp_path / "lerobot"))


@pytest.fixture
def enter(small_policy, character_tokenizer, tmp_path):
    """Convert a peer's directory with all that openpi's does not say."""

    def run(source: Path, **changes):
        given = {"embodiment": small_policy.config.embodiment, "tokenizer": str(character_tokenizer), "action_horizon": 4} | HEADS
        return convert(ConvertConfig(source=source, **({"output_dir": tmp_path / "bundle"} | given | changes)))

    return run


def edit(path: Path, change) -> None:
    """Apply `change` to the tensors of a directory."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_json(path: Path, **changes) -> None:
    files.write_json(path, json.loads(path.read_text()) | changes)


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


def refused(run, *arguments, **changes) -> str:
    """The one line of a conversion that is refused; nothing is left of it."""
    with pytest.raises(Pi0fmError) as caught:
        run(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peer", ["lerobot", "openpi"])
def test_there_and_back_and_there_again_is_bit_identical(kind, peer, bundles, peers, enter, character_tokenizer, tmp_path):
    """The bundle's weights, and every file of the peer."""
    result = enter(peers[kind, peer], num_flow_steps=4, execution_horizon=2, max_prompt_tokens=64)
    assert (result.kind, result.source) == (kind, peer)
    assert same_weights(bundles[kind], tmp_path / "bundle")
    before, stats = bundle.read(bundles[kind])
    after, found = bundle.read(tmp_path / "bundle")
    if kind == "pi05":  # a width that no tensor of pi0.5 has, and openpi does not say
        after = dataclasses.replace(after, model=dataclasses.replace(after.model, state_dim=before.model.state_dim))
    assert after.model == before.model
    assert dataclasses.replace(after.embodiment, name="robot") == before.embodiment
    assert (after.flow, after.normalization, after.execution_horizon) == (before.flow, before.normalization, before.execution_horizon)
    assert after.prompt_dialect == peer
    ours, theirs = before.chain(stats, str(character_tokenizer)).transforms[1], after.chain(found, str(character_tokenizer)).transforms[1]
    raw = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    there, back = (each.forward(Sample(raw, raw[None, :, :3])) for each in (ours, theirs))
    assert np.allclose(there.state, back.state, rtol=1e-6, atol=1e-6)
    assert np.allclose(there.actions, back.actions, rtol=1e-6, atol=1e-6)
    source, out = peers[kind, peer], tmp_path / "out"
    convert(ConvertConfig(source=tmp_path / "bundle", output_dir=out, to=peer, any_size=True))
    written = [path for path in sorted(source.rglob("*")) if path.suffix in (".json", ".safetensors")]
    assert len(written) >= 3
    for path in written:
        content = (out / path.relative_to(source)).read_bytes()
        moved = content.replace(str(out / "tokenizer").encode(), str(source / "tokenizer").encode())  # LeRobot's files name it
        assert moved == path.read_bytes(), path


def test_a_service_may_read_every_file(peers):
    files_of_both = [path for peer in peers.values() for path in peer.rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files_of_both} == {"0o644"}


def test_lerobots_files_alone_say_everything_but_the_heads(peers, bundles, tmp_path):
    convert(ConvertConfig(source=peers["pi05", "lerobot"], output_dir=tmp_path / "bundle", **HEADS))
    before, after = bundle.read(bundles["pi05"])[0], bundle.read(tmp_path / "bundle")[0]
    assert (after.model, after.embodiment, after.normalization) == (before.model, before.embodiment, before.normalization)
    assert (tmp_path / "bundle/tokenizer/tokenizer.json").is_file()


def test_a_converted_bundle_opens_and_acts_as_its_source(small_policy, character_tokenizer, enter, tmp_path, observations):
    source = make(tmp_path / "source", "pi05", small_policy, character_tokenizer, resize="plain")
    convert(ConvertConfig(source=source, output_dir=tmp_path / "lerobot", to="lerobot", any_size=True))
    enter(tmp_path / "lerobot")
    found, expected = (bundle.load(path, device="cpu", precision="float32") for path in (tmp_path / "bundle", source))
    assert np.array_equal(*(policy.infer_batch([observations[0]], [3])[0].actions for policy in (found, expected)))


def test_a_conversion_is_held_against_the_chunk_that_its_source_recorded(
    small_policy, character_tokenizer, enter, tmp_path, observations, capsys
):
    """There and back it agrees; where the way back was told another number of heads, which no shape tells, it does not."""
    source = make(tmp_path / "source", "pi05", small_policy, character_tokenizer, observations[1], resize="plain")
    convert(ConvertConfig(source=source, output_dir=tmp_path / "lerobot", to="lerobot", any_size=True))
    enter(tmp_path / "lerobot")
    enter(tmp_path / "lerobot", output_dir=tmp_path / "wrong", vision_heads=4)
    words = ("--against", str(source), "--device", "cpu", "--precision", "float32")
    assert main(["verify", str(tmp_path / "bundle"), *words]) == 0
    assert main(["verify", str(tmp_path / "wrong"), *words]) == 1
    assert "it is the conversion" in capsys.readouterr().err


def test_every_key_that_does_not_fit_is_listed_and_nothing_is_written(openpi, enter, tmp_path):
    def change(tensors):
        del tensors["state_proj.bias"], tensors["action_out_proj.weight"]
        tensors["action_in_proj.bias"] = torch.zeros(7)
        tensors["lora_a"] = torch.zeros(2)

    edit(openpi, change)
    line = refused(enter, openpi)
    for words in ("missing (2): action_out_proj.weight, state_proj.bias", "unexpected (1): lora_a", "action_in_proj.bias [7] for [32]"):
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["openpi"]


@pytest.mark.parametrize("kept", ["lm_head", "embed_tokens", "both"])
def test_the_embedding_under_either_name(kept, openpi, bundles, enter, tmp_path):
    def change(tensors):
        embedding = tensors.pop(LM_HEAD)
        tensors |= {name: embedding.clone() for name in (LM_HEAD, EMBEDDING) if kept == "both" or kept in name}

    edit(openpi, change)
    enter(openpi)
    assert same_weights(bundles["pi0"], tmp_path / "bundle")


def test_two_embeddings_that_differ(openpi, lerobot, bundles, enter, tmp_path, capsys):
    """Tied in openpi, so a fault there; LeRobot reads and trains embed_tokens alone, and leaves lm_head behind."""
    edit(openpi, lambda tensors: tensors.update({EMBEDDING: tensors[LM_HEAD] + 1}))
    line = refused(enter, openpi)
    assert LM_HEAD in line
    assert EMBEDDING in line
    edit(lerobot, lambda tensors: tensors.update({f"model.{LM_HEAD}": tensors[f"model.{LM_HEAD}"] + 1}))
    enter(lerobot)
    assert same_weights(bundles["pi05"], tmp_path / "bundle")
    assert "lm_head is left out" in capsys.readouterr().err


def test_no_embedding_at_all(openpi, enter):
    edit(openpi, lambda tensors: tensors.pop(LM_HEAD))
    assert f"sizes W, found no tensor that does among {EMBEDDING}; they are missing" in refused(enter, openpi)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.model.", "_fsdp_wrapped_module."])
def test_wrappers_names_are_taken_off_and_said(prefix, openpi, bundles, enter, tmp_path, capsys):
    tensors = load_file(openpi / "model.safetensors")
    renamed = {prefix + name.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module."): value for name, value in tensors.items()}
    save_file(renamed, openpi / "model.safetensors")
    enter(openpi)
    assert same_weights(bundles["pi0"], tmp_path / "bundle")
    said = capsys.readouterr().err
    assert all(f"{word}." in said for word in (*prefix.strip(".").split("."), "_checkpoint_wrapped_module"))


def test_names_that_meet_without_their_wrappers(openpi, enter):
    edit(openpi, lambda tensors: tensors.update({"module.state_proj.bias": tensors["state_proj.bias"] + 1}))
    assert "holds state_proj.bias twice" in refused(enter, openpi)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_file_that_is_cut(keep, openpi, enter, tmp_path):
    content = (openpi / "model.safetensors").read_bytes()
    end = int(keep * len(content)) if isinstance(keep, float) else keep
    (openpi / "model.safetensors").write_bytes(content[:end])
    assert "model.safetensors is cut or damaged" in refused(enter, openpi)
    assert [path.name for path in tmp_path.iterdir()] == ["openpi"]


def test_a_header_that_promises_more_than_there_is(openpi, enter):
    header = json.dumps({"state_proj.bias": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (openpi / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert "is cut or damaged" in refused(enter, openpi)


def test_numbers_that_are_no_floats(openpi, enter):
    edit(openpi, lambda tensors: tensors.update({"state_proj.bias": tensors["state_proj.bias"].to(torch.int8)}))
    assert "state_proj.bias (I8)" in refused(enter, openpi)


def shard(path: Path) -> dict[str, str]:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    files.write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return weight_map


def test_shards(openpi, bundles, enter, tmp_path):
    shard(openpi)
    enter(openpi)
    assert same_weights(bundles["pi0"], tmp_path / "bundle")


@pytest.mark.parametrize("fault", ["missing", "outside", "astray", "no map"])
def test_shards_with_a_fault(fault, openpi, enter):
    weight_map = shard(openpi)
    file = next(iter(weight_map.values()))
    if fault == "missing":
        (openpi / file).unlink()
    if fault == "outside":
        weight_map["state_proj.bias"] = "../secret.safetensors"
    if fault == "astray":
        del weight_map["state_proj.bias"]
    files.write_json(openpi / "model.safetensors.index.json", {"weight_map": {} if fault == "no map" else weight_map})
    words = {"missing": f"names {file}", "outside": "names ../secret", "astray": "differ in state_proj.bias"}
    assert words.get(fault, "must hold weight_map") in refused(enter, openpi)


def test_a_kind_that_contradicts_itself(openpi, lerobot, enter):
    edit_json(lerobot / "config.json", type="pi0")
    assert "says pi0, its weights are those of a pi05" in refused(enter, lerobot)
    edit(openpi, lambda tensors: tensors.update({"time_mlp_in.bias": torch.zeros(32)}))
    assert "holds both" in refused(enter, openpi)
    save_file({"encoder.weight": torch.zeros(2)}, openpi / "model.safetensors")
    assert "neither among encoder.weight" in refused(enter, openpi)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "act"}, "type pi0 or pi05, found 'act'"),
        ({"use_peft": True}, "use_peft must be False"),
        ({"max_period": 2.0}, "max_period must be 4.0"),
        ({"image_resolution": [48, 48]}, "says pictures of 48, its weights are for 32"),
        ({"normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}}, "must both be MEAN_STD or both QUANTILES"),
        ({"normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "QUANTILES"}}, "must both be MEAN_STD or both QUANTILES"),
        ({"input_features": {"observation.state": {"type": "STATE"}}}, "not as LeRobot 0.6.1 writes it"),
    ],
)
def test_a_lerobot_policy_that_cannot_be_had(changes, words, lerobot, enter):
    edit_json(lerobot / "config.json", **changes)
    assert words in refused(enter, lerobot)


def test_statistics_that_are_missing_cut_or_disagree(lerobot, enter):
    before, after = sorted(lerobot.glob("policy_*normalizer_processor.safetensors"), reverse=True)
    save_file({name: value + 1 for name, value in load_file(after).items()}, after)
    assert "differs between policy_preprocessor and policy_postprocessor" in refused(enter, lerobot)
    shutil.copy(before, after)
    save_file({name: value for name, value in load_file(before).items() if "action.q99" not in name}, before)
    assert "lacks action.q99" in refused(enter, lerobot)
    before.write_bytes(before.read_bytes()[:50])
    assert "is cut or damaged" in refused(enter, lerobot)
    before.unlink()
    assert f"lacks {before.name}" in refused(enter, lerobot)


def test_renamed_columns_and_padding_cameras(lerobot, enter, tmp_path, small_policy):
    """LeRobot's rename step is undone: a robot is asked under its own names; a camera that only pads is none."""
    pre = json.loads((lerobot / "policy_preprocessor.json").read_text())
    renames = {"observation.images.top": "observation.images.base", "observation.qpos": "observation.state"}
    pre["steps"][0]["config"] = {"rename_map": renames}
    files.write_json(lerobot / "policy_preprocessor.json", pre)
    config = json.loads((lerobot / "config.json").read_text())
    config["input_features"]["observation.images.empty_camera_0"] = {"type": "VISUAL", "shape": [3, 32, 32]}
    files.write_json(lerobot / "config.json", config)
    convert(ConvertConfig(source=lerobot, output_dir=tmp_path / "bundle", **HEADS))
    found = bundle.read(tmp_path / "bundle")[0].embodiment
    assert found.cameras == {"base": "observation.images.top", "wrist": "observation.images.wrist"}
    assert found.state == "observation.qpos"


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("cameras", "does not say its cameras; type them in the order of training: --embodiment.cameras"),
        ("tokenizer", "holds no tokenizer; type --tokenizer DIR"),
        ("norm_stats", "holds no statistics of state and action; type --norm_stats FILE"),
    ],
)
def test_what_neither_source_nor_options_say_is_named(missing, words, openpi, enter, small_policy):
    embodiment = small_policy.config.embodiment
    changes = {"tokenizer": None} if missing == "tokenizer" else {}
    if missing == "cameras":
        changes["embodiment"] = dataclasses.replace(embodiment, cameras={})
    if missing == "norm_stats":
        shutil.rmtree(openpi / "assets")
    assert words in refused(enter, openpi, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipes_line_before_works_as_typed(kind, peers, character_tokenizer, tmp_path, tmp_path_factory, capfd):
    """A base checkpoint holds neither cameras nor statistics; its heads, which no shape tells, are shrunk too."""
    weights, base = Path(shutil.copytree(peers[kind, "openpi"], tmp_path / "weights")), tmp_path / "base"
    shutil.rmtree(weights / "assets")
    text = options.shipped()[kind].read_text()
    line = re.findall(rf"^# Before +pi0fm (.*--output_dir outputs/{kind}_base), once", text, re.MULTILINE)[0]
    put = {"WEIGHTS": str(weights), "PALIGEMMA": str(character_tokenizer), f"outputs/{kind}_base": str(base)}
    heads = [word for name, number in HEADS.items() for word in (f"--{name}", str(number))]
    assert main([*(put.get(word, word) for word in line.split()), *heads]) == 0
    with pytest.raises(BundleError, match="needs a robot's cameras and statistics"):
        bundle.load(base)
    data = str(tiny_dataset.written(tmp_path_factory))
    words = ["--pretrained", str(base), "--steps", "1", "--global_batch_size", "2", "--ema_decay", "null", "--tracker", "[]"]
    words += [
        "--dataset.root",
        data,
        "--output_dir",
        str(tmp_path / "run"),
        "--precision",
        "float32",
    ]
    assert main(["train", *words, "--model.action_horizon", "4", "--execution_horizon", "2"]) == 0
    policy, stats = bundle.read(tmp_path / "run/bundle")
    assert policy.embodiment.cameras and len(stats.action.mean) == policy.embodiment.robot_action_dim
    assert bundle.load(tmp_path / "run/bundle", device="cpu").metadata["state_dim"] == policy.embodiment.state_dim


@pytest.mark.parametrize("form", ["pi0fm", "openpi", "lerobot"])
def test_statistics_of_one_typed_file_in_any_form(form, openpi, bundles, enter, tmp_path):
    """A data set's file without quantiles serves z_score; openpi's may be padded."""
    tree = json.loads((bundles["pi0"] / "norm_stats.json").read_text())
    columns = {name: tree[name] for name in ("state", "action")}
    if form == "openpi":
        padded = {name: {key: values + [0.0] * 9 for key, values in group.items()} for name, group in columns.items()}
        columns = {"norm_stats": {"state": padded["state"], "actions": padded["action"]}}
    if form == "lerobot":
        kept = ("mean", "std", "min", "max")
        columns = {word: {key: columns[name][key] for key in kept} for word, name in (("observation.state", "state"), ("action", "action"))}
    files.write_json(tmp_path / "given.json", columns)
    enter(openpi, norm_stats=tmp_path / "given.json")
    found = json.loads((tmp_path / "bundle/norm_stats.json").read_text())
    assert found["action"]["std"] == tree["action"]["std"]
    assert found["state"]["q01"] == tree["state"]["min" if form == "lerobot" else "q01"]


@pytest.mark.parametrize(("dtype", "expected"), [("stored", torch.bfloat16), ("float32", torch.float32)])
def test_numbers_are_kept_or_widened_and_act(dtype, expected, openpi, enter, tmp_path, bundles, observations):
    edit(openpi, lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items() if "layers" in name}))
    enter(openpi, dtype=dtype)
    found, before = load_file(tmp_path / "bundle/model.safetensors"), load_file(bundles["pi0"] / "model.safetensors")
    name = "decoder.layers.1.action_expert.qkv.weight"
    assert found[name].dtype == expected
    assert torch.equal(found[name].float(), before[name].bfloat16().float())
    assert torch.equal(found["action_in.weight"], before["action_in.weight"])
    chunk = bundle.load(tmp_path / "bundle", device="cpu", precision="float32").infer_batch(observations[:1], [1])[0]
    assert np.isfinite(chunk.actions).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("changes", "epsilon"), [({"norm_floor": 2.5}, 0.0), ({"norm_floor": 0.0}, 1e-6)])
def test_a_peer_scales_as_the_bundle_does(kind, changes, epsilon, small_policy, character_tokenizer, tmp_path):
    """By openpi's own formulas, which add 1e-6 and know no floor, over raw states."""
    source = make(tmp_path / "bundle", kind, small_policy, character_tokenizer, norm_epsilon=epsilon, **changes)
    convert(ConvertConfig(source=source, output_dir=tmp_path / "openpi", to="openpi", any_size=True))
    tree = json.loads((tmp_path / "openpi/assets/robot/norm_stats.json").read_text())["norm_stats"]["state"]
    stats = {name: np.float64(values) for name, values in tree.items()}
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    if kind == "pi0":
        expected = (x - stats["mean"]) / (stats["std"] + 1e-6)
    else:
        expected = (x - stats["q01"]) / (stats["q99"] - stats["q01"] + 1e-6) * 2 - 1
    config, found = bundle.read(source)
    ours = config.chain(found, str(character_tokenizer)).transforms[1].forward(Sample(x, None)).state
    assert np.allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_openpis_epsilon_is_honoured_for_weights_that_come_from_there(kind, peers, enter, tmp_path):
    """Where it is most of a scale: a dimension that moves by a millionth, and one that never does."""
    group = {"mean": [0.0, 1.0, 2.0, 3.0], "std": [1.0, 1e-6, 0.0, 2.0], "q01": [-1.0, 1.0, 2.0, 3.0], "q99": [1.0, 1.000001, 2.0, 9.0]}
    files.write_json(tmp_path / "stats.json", {"norm_stats": {"state": group, "actions": {name: rows[:3] for name, rows in group.items()}}})
    enter(peers[kind, "openpi"], norm_stats=tmp_path / "stats.json")
    config, stats = bundle.read(tmp_path / "bundle")
    assert (config.norm_epsilon, config.norm_floor) == (1e-6, 0.0)
    low, high, std = (np.float32(group[name]).astype(np.float64) for name in ("q01", "q99", "std"))
    scale = {"pi0": std + 1e-6, "pi05": (high - low + 1e-6) / 2}[kind]
    normalize = config.chain(stats, str(tmp_path / "bundle/tokenizer")).transforms[1]
    assert np.allclose(normalize.state.scale, scale, rtol=1e-6, atol=0)
    if kind == "pi05":
        at_low = normalize.forward(Sample(np.float32([group["q01"]]), None)).state
        assert np.allclose(at_low[0, [0, 3]], -1, atol=1e-6)


def test_lerobot_is_asked_by_names_that_it_can_read(small_policy, character_tokenizer, tmp_path, capsys):
    """LeRobot passes a policy only keys that begin with `observation.`; facts that no file can hold are reported."""
    robot = dataclasses.replace(
        small_policy.config.embodiment, cameras={"base": "image", "wrist": "observation.images.left"}, state="observation.qpos"
    )
    for column in ("observation.qpos", "state"):
        path = tmp_path / column
        embodiment = dataclasses.replace(robot, state=column)
        source = make(path / "bundle", "pi0", small_policy, character_tokenizer, embodiment=embodiment, prompt_dialect="lerobot")
        convert(ConvertConfig(source=source, output_dir=path / "out", to="lerobot", any_size=True))
        inputs = json.loads((path / "out/config.json").read_text())["input_features"]
        assert list(inputs) == ["observation.images.base", "observation.images.left", "observation.state"]
        said = capsys.readouterr().err
        assert "name image as observation.images.base" in said
        assert ("state as observation.state" in said) == (column == "state")
        assert ("""--rename_map='{"observation.qpos": "observation.state"}'""" in said) == (column != "state")
        assert "of a chunk of relative actions only the first is right there; type --policy.n_action_steps=1" in said


def test_dimensions_that_the_robot_lacks_carry_no_noise_into_weights_that_never_saw_it(small_policy, character_tokenizer, tmp_path):
    source = make(tmp_path / "bundle", "pi0", small_policy, character_tokenizer, padded_noise=False)
    convert(ConvertConfig(source=source, output_dir=tmp_path / "openpi", to="openpi", any_size=True))
    before = load_file(source / "model.safetensors")["action_in.weight"]
    after = load_file(tmp_path / "openpi/model.safetensors")["action_in_proj.weight"]
    assert torch.equal(after[:, :3], before[:, :3])
    assert not after[:, 3:].any()
    assert before[:, 3:].all()


@pytest.mark.parametrize(
    ("model", "flow", "words"),
    [
        ({"vision": {"gelu": "none"}}, {}, "only gelu tanh"),
        ({}, {"solver": "heun"}, "solver euler, found cond_ot, velocity, heun"),
        ({"time_conditioning": "adaptive_norm"}, {}, "such a policy stays a bundle"),
    ],
)
def test_a_bundle_that_a_peer_would_run_otherwise(model, flow, words, bundles, tmp_path):
    config, stats = bundle.read(bundles["pi0"])
    model, flow = resized(config.model, **model), dataclasses.replace(config.flow, **flow)
    config = dataclasses.replace(config, model=model, flow=flow, tokenizer=str(bundles["pi0"] / "tokenizer"))
    bundle.save(tmp_path / "odd", Pi0(model).state_dict(), config, stats)
    for peer in ("lerobot", "openpi"):
        options = ConvertConfig(source=tmp_path / "odd", output_dir=tmp_path / "out", to=peer, any_size=True)
        assert words in refused(convert, options)


@pytest.mark.parametrize(
    ("kind", "trained", "asked", "peer", "words"),
    [
        ("pi0", "openpi", None, "lerobot", "trained with openpi, which writes _, line ends and blanks around a prompt differently"),
        ("pi0", "lerobot", None, "openpi", "type --prompt_dialect openpi"),
        ("pi0", "lerobot", "openpi", "lerobot", "type --prompt_dialect lerobot"),
        ("pi05", "openpi_stateless", None, "lerobot", "LeRobot writes the state into every prompt of a pi0.5"),
        ("pi05", "openpi_stateless", "lerobot", "lerobot", "prompts of this bundle lack the state (prompt_dialect openpi_stateless)"),
        ("pi05", "openpi", "openpi_stateless", "openpi", "prompts of this bundle hold the state (prompt_dialect openpi)"),
        ("pi0", "lerobot", "openpi", "openpi", None),
        ("pi0", "openpi", "lerobot", "lerobot", None),
        ("pi05", "openpi", None, "lerobot", None),
        ("pi05", "lerobot", None, "openpi", None),
        ("pi05", "openpi_stateless", None, "openpi", None),
    ],
)
def test_a_peer_that_would_ask_in_another_dialect(kind, trained, asked, peer, words, small_policy, character_tokenizer, tmp_path, capsys):
    source = make(tmp_path / "bundle", kind, small_policy, character_tokenizer, prompt_dialect=trained)
    options = ConvertConfig(source=source, output_dir=tmp_path / "out", to=peer, any_size=True, prompt_dialect=asked)
    if words is None:
        convert(options)
        assert ("discrete_state_input=False" in capsys.readouterr().err) == (trained == "openpi_stateless")
    else:
        assert words in refused(convert, options)
        assert not (tmp_path / "out").exists()


def test_the_dialect_that_no_file_of_openpis_says(peers, enter, tmp_path, capsys):
    enter(peers["pi05", "openpi"])
    assert "unless --prompt_dialect openpi_stateless" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "bundle")
    enter(peers["pi05", "openpi"], prompt_dialect="openpi_stateless")
    assert "openpi_stateless" not in capsys.readouterr().err
    assert bundle.read(tmp_path / "bundle")[0].prompt_dialect == "openpi_stateless"
    assert "whose state is a separate token" in refused(
        enter, peers["pi0", "openpi"], prompt_dialect="openpi_stateless", output_dir=tmp_path / "b"
    )


def test_a_peer_gets_one_robot_of_several(bundles, peers, enter, small_policy, tmp_path):
    config, stats = bundle.read(bundles["pi05"])
    config = dataclasses.replace(config, tokenizer=str(bundles["pi05"] / "tokenizer"))
    own = {
        name: (Robot(dataclasses.replace(config.embodiment, name=name)), dataclasses.replace(stats, num_frames=frames))
        for name, frames in (("left", 1), ("right", 2))
    }
    bundle.save(tmp_path / "both", load_file(bundles["pi05"] / "model.safetensors"), config, stats, own)
    options = ConvertConfig(source=tmp_path / "both", output_dir=tmp_path / "out", to="openpi", any_size=True)
    assert "holds left, right; choose with --robot left" in refused(convert, options)
    convert(dataclasses.replace(options, robot="right"))
    assert (tmp_path / "out/assets/right/norm_stats.json").is_file()
    assert "leave it out" in refused(enter, peers["pi05", "openpi"], robot="right")


def test_sizes_that_a_peers_class_cannot_hold_need_a_word(bundles, tmp_path):
    line = refused(convert, ConvertConfig(source=bundles["pi0"], output_dir=tmp_path / "out", to="lerobot", prompt_dialect="lerobot"))
    assert "would return random weights" in line
    assert "num_heads 2 for 8" in line
    assert "--any_size true" in line


def test_a_tokenizer_that_lerobot_would_call_otherwise(small_policy, tmp_path):
    """ByT5's ends a text with </s> when LeRobot calls it."""
    source = make(tmp_path / "bundle", "pi0", small_policy, "byt5")
    options = ConvertConfig(source=source, output_dir=tmp_path / "out", to="lerobot", any_size=True, prompt_dialect="lerobot")
    assert "its actions would differ there" in refused(convert, options)


def test_directions_that_do_not_exist(bundles, openpi, enter, tmp_path):
    (tmp_path / "bundle").mkdir()
    with pytest.raises(OutputError, match="exists; remove it or choose another"):
        enter(openpi)
    (tmp_path / "bundle").rmdir()
    with pytest.raises(ConfigError, match="convert them to a bundle first"):
        enter(openpi, to="lerobot")
    with pytest.raises(ConfigError, match="is a bundle already"):
        enter(bundles["pi0"])
    with pytest.raises(BundleError, match="must be a directory"):
        enter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refused(enter, tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *{"to": "jax", "dtype": "float16", "normalization": "min_max", "prompt_dialect": "klingon", "num_heads": 0}.items(),
        *(("norm_floor", value) for value in (0.0, float("nan"))),
    ],
)
def test_options_out_of_range(name, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{name} must be"):
        ConvertConfig(source=tmp_path, output_dir=tmp_path / "out", **{name: value})


def test_the_command(peers, tmp_path, capsys):
    words = ["convert", str(peers["pi05", "lerobot"]), "--output_dir", str(tmp_path / "bundle"), "--num_heads", "2", "--vision_heads", "2"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kind"] == "pi05"
    assert Path(result["path"]) == tmp_path / "bundle"
    assert main(words) == 1
    assert "exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("short", ["tokenizer", "weights", "manifest"])
def test_a_disk_without_room_is_one_line_and_stays_empty(short, bundles, openpi, enter, small_disk, tmp_path):
    """Whatever it is that does not fit."""
    enter(openpi)
    pages = sum(-(-file.stat().st_size // 4096) for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    disk = small_disk({"tokenizer": "16k", "weights": "64k", "manifest": f"{4 * pages - 4}k"}[short])
    assert "make room" in refused(enter, openpi, output_dir=disk / "out")
    assert list(disk.iterdir()) == []
    if short != "manifest":
        assert "make room" in refused(convert, ConvertConfig(source=bundles["pi0"], output_dir=disk / "out", to="openpi", any_size=True))
        assert list(disk.iterdir()) == []


def test_a_place_that_cannot_be_written(unwritable, bundles, openpi, enter):
    refused(enter, openpi, output_dir=unwritable)
    refused(convert, ConvertConfig(source=bundles["pi0"], to="openpi", any_size=True, output_dir=unwritable))


@pytest.mark.parametrize(("peer", "own", "other"), [("lerobot", "plain", "antialias"), ("openpi", "antialias", "plain")])
def test_pictures_are_resized_as_at_the_weights_origin(peer, own, other, peers, enter, small_policy, character_tokenizer, tmp_path, capsys):
    """No file says it: the peer's code does. A peer that does otherwise than the bundle is named at the export."""
    enter(peers["pi05", peer])
    assert bundle.read(tmp_path / "bundle")[0].resize == own
    for resize in (own, other):
        source = make(tmp_path / resize, "pi05", small_policy, character_tokenizer, resize=resize, prompt_dialect=peer)
        capsys.readouterr()
        convert(ConvertConfig(source=source, output_dir=tmp_path / f"{resize}-out", to=peer, any_size=True))
        said = f"{peer} resizes pictures with {own}, this bundle was trained with {other}"
        assert (said in capsys.readouterr().err) == (resize == other)
