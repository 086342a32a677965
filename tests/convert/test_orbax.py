"""Tests of openpi's JAX weights, written by orbax (orbax/make_fixtures.py): every product equals that of our weights."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi0fm.convert.config import ConvertConfig
from pi0fm.convert.conversion import convert
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.policy.saved import bundle
from pi0fm_client.errors import BundleError, ConfigError

FIXTURES = Path(__file__).parent / "orbax"
KINDS = ("pi0", "pi05")
installed = pytest.mark.skipif(importlib.util.find_spec("tensorstore") is None, reason="tensorstore, extra jax, is not installed")


def fixtures():
    """The functions of the script that made the files."""
    spec = importlib.util.spec_from_file_location("make_fixtures", FIXTURES / "make_fixtures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(source: Path, output: Path, tokenizer: Path, **changes) -> ConvertConfig:
    cameras = Embodiment(cameras={"base": "observation.images.base"})
    return ConvertConfig(source=source, output_dir=output, embodiment=cameras, tokenizer=str(tokenizer), **changes)


@pytest.fixture(scope="module", params=KINDS)
def converted(request, tmp_path_factory, character_tokenizer):
    """(their arrays by path, our tensors, the bundle)."""
    made = fixtures()
    path = tmp_path_factory.mktemp("jax") / "bundle"
    convert(options(FIXTURES / request.param, path, character_tokenizer, action_horizon=7))
    theirs = {name: torch.from_numpy(made.values(name, shape)) for name, shape in made.shapes(request.param).items()}
    return theirs, load_file(path / "model.safetensors"), path


@installed
def test_attention_and_mlp_of_both_streams(converted):
    """By openpi's own einsum equations, in float64: equality, since every entry is a multiple of 1/128."""
    theirs, ours, _ = converted
    for suffix, stream in (("", "backbone"), ("_1", "action_expert")):
        width = theirs[f"PaliGemma/llm/layers/mlp{suffix}/linear"].shape[-1]
        x = torch.randint(-4, 5, (3, width), generator=torch.Generator().manual_seed(0)).double()
        for layer in range(2):
            their = {
                name.removeprefix("PaliGemma/llm/layers/"): value[layer].double() for name, value in theirs.items() if "/layers/" in name
            }
            our = {name.removeprefix(f"decoder.layers.{layer}.{stream}."): value.double() for name, value in ours.items()}
            q = torch.einsum("td,ndh->tnh", x, their[f"attn/q_einsum{suffix}/w"]).flatten(1)
            k, v = torch.einsum("td,ckdh->ctkh", x, their[f"attn/kv_einsum{suffix}/w"]).flatten(2)
            if stream == "backbone" and layer == 1:  # the last: k and v alone are read
                assert torch.equal(x @ our["qkv.weight"].T, torch.cat((k, v), dim=1))
                assert "out.weight" not in our
                continue
            assert torch.equal(x @ our["qkv.weight"].T, torch.cat((q, k, v), dim=1))
            heads = q.unflatten(1, (4, 4))
            assert torch.equal(q @ our["out.weight"].T, torch.einsum("tnh,nhd->td", heads, their[f"attn/attn_vec_einsum{suffix}/w"]))
            gate, up = torch.einsum("td,cdf->ctf", x, their[f"mlp{suffix}/gating_einsum"])
            assert torch.equal(x @ our["mlp.gate_up.weight"].T, torch.cat((gate, up), dim=1))
            assert torch.equal(gate @ our["mlp.down.weight"].T, gate @ their[f"mlp{suffix}/linear"])


@installed
def test_the_vision_tower(converted):
    theirs, ours, _ = converted
    their = {name.removeprefix("PaliGemma/img/"): value.double() for name, value in theirs.items()}
    our = {name.removeprefix("vision."): value.double() for name, value in ours.items()}
    picture = torch.randint(-4, 5, (1, 3, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    patches = picture.unfold(2, 4, 4).unfold(3, 4, 4)  # [1, 3, rows, columns, 4, 4]
    expected = torch.einsum("bcxyhw,hwcd->bdxy", patches, their["embedding/kernel"])
    found = torch.nn.functional.conv2d(picture, our["patch_embedding.weight"], stride=4)
    assert torch.equal(found, expected)
    assert torch.equal(our["position_embedding"], their["pos_embedding"][0])
    x = torch.randint(-4, 5, (3, 8), generator=torch.Generator().manual_seed(2)).double()
    attention = "Transformer/encoderblock/MultiHeadDotProductAttention_0"
    for block in range(3):
        place = f"layers.{block}."
        joined = x @ our[f"{place}qkv.weight"].T + our[f"{place}qkv.bias"]
        for word, found in zip(("query", "key", "value"), joined.chunk(3, dim=1), strict=True):
            expected = torch.einsum("td,dnh->tnh", x, their[f"{attention}/{word}/kernel"][block]) + their[f"{attention}/{word}/bias"][block]
            assert torch.equal(found, expected.flatten(1))
        expected = torch.einsum("tnh,nhd->td", x.unflatten(1, (2, 4)), their[f"{attention}/out/kernel"][block])
        assert torch.equal(x @ our[f"{place}out.weight"].T, expected)
        assert torch.equal(our[f"{place}mlp.fc2.weight"], their["Transformer/encoderblock/MlpBlock_0/Dense_1/kernel"][block].T)
        assert torch.equal(our[f"{place}mlp_norm.weight"], their["Transformer/encoderblock/LayerNorm_1/scale"][block])
    assert torch.equal(ours["vision.projector.weight"].double(), their["head/kernel"].T)


@installed
def test_projections_norms_and_what_lies_beside(converted):
    theirs, ours, path = converted
    assert torch.equal(ours["action_in.weight"].float(), theirs["action_in_proj/kernel"].T)
    assert torch.equal(ours["action_out.bias"].float(), theirs["action_out_proj/bias"])
    config, stats = bundle.read(path)
    norms = "decoder.layers.1.action_expert.mlp_norm"
    if config.model.state_input == "prompt":
        assert torch.equal(ours[f"{norms}.modulation.weight"].float(), theirs["PaliGemma/llm/layers/pre_ffw_norm_1/Dense_0/kernel"][1].T)
        assert torch.equal(ours["decoder.final_norm.modulation.bias"].float(), theirs["PaliGemma/llm/final_norm_1/Dense_0/bias"])
        assert ours["prompt_embedding.weight"].dtype == torch.bfloat16
    else:
        assert torch.equal(ours[f"{norms}.scale"], theirs["PaliGemma/llm/layers/pre_ffw_norm_1/scale"][1])
        assert torch.equal(ours["time_mlp_in.weight"], theirs["action_time_mlp_in/kernel"].T)
    assert (config.model.action_horizon, config.model.decoder.num_heads, config.model.vision.num_heads) == (7, 4, 2)
    assert config.embodiment.dims() == (3, 3)
    assert stats.action.mean.tolist() == [1, 2, 3]


@installed
def test_the_parameters_folder_alone_and_another_robots_statistics(tmp_path, character_tokenizer):
    """DIR/params finds DIR/assets; with those of two robots one must be chosen."""
    shutil.copytree(FIXTURES / "pi0", tmp_path / "checkpoint")
    convert(options(tmp_path / "checkpoint/params", tmp_path / "bundle", character_tokenizer))
    shutil.copytree(tmp_path / "checkpoint/assets/robot", tmp_path / "checkpoint/assets/trossen")
    with pytest.raises(BundleError, match=r"several robots: assets/robot, assets/trossen; choose with --norm_stats"):
        convert(options(tmp_path / "checkpoint", tmp_path / "again", character_tokenizer))
    chosen = tmp_path / "checkpoint/assets/trossen/norm_stats.json"
    convert(options(tmp_path / "checkpoint", tmp_path / "chosen", character_tokenizer, norm_stats=chosen))


@installed
@pytest.mark.parametrize("tree", [True, False], ids=["ocdbt", "plain files"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_in_files_give_what_chunks_within_nodes_give(kind, tree, tmp_path, character_tokenizer):
    """So small, the fixtures' numbers lie in the tree itself, where tensorstore reads them; those of a real policy never do."""
    import tensorstore

    def store(root: Path, tree: bool, **config):
        base = {"driver": "file", "path": f"{root}/params/"}
        spec = {"driver": "ocdbt", "base": base, "config": config} if tree else base
        return tensorstore.KvStore.open(spec).result()

    source = store(FIXTURES / kind, True)
    copied = store(tmp_path / "copy", tree, max_inline_value_bytes=0, max_decoded_node_bytes=2000)
    for key in source.list().result():
        copied[key] = source[key]
    shutil.copy(FIXTURES / kind / "params/_METADATA", tmp_path / "copy/params")
    shutil.copytree(FIXTURES / kind / "assets", tmp_path / "copy/assets")
    convert(options(FIXTURES / kind, tmp_path / "expected", character_tokenizer))
    convert(options(tmp_path / "copy", tmp_path / "found", character_tokenizer))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "found")]
    assert weights[0] == weights[1]


@installed
@pytest.mark.parametrize("victim", ["data", "manifest", "everything"])
def test_a_store_that_is_cut(tmp_path, character_tokenizer, victim):
    source = Path(shutil.copytree(FIXTURES / "pi05", tmp_path / "checkpoint"))
    files = {
        "data": sorted((source / "params").rglob("d/*")),
        "manifest": [source / "params/manifest.ocdbt"],
        "everything": [path for path in sorted((source / "params").rglob("*")) if path.is_file() and path.name != "_METADATA"],
    }
    for file in files[victim]:
        file.write_bytes(file.read_bytes()[:20]) if victim == "manifest" else file.unlink()
    with pytest.raises(BundleError, match=r"is cut or damaged|must hold arrays"):
        convert(options(source, tmp_path / "bundle", character_tokenizer))
    assert not (tmp_path / "bundle").exists()


def test_without_tensorstore_the_extra_is_named(tmp_path, monkeypatch, character_tokenizer):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'pi0fm\[jax\]'"):
        convert(options(FIXTURES / "pi0", tmp_path / "bundle", character_tokenizer))
