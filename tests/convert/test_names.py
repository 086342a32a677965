"""Tests of the tables of foreign names: they fill the network exactly, give its sizes, and report every fault."""

import dataclasses

import pytest
import small_pi0
import torch

from pi0fm.convert.names import EMBEDDING, kinds_of, layout_of
from pi0fm.convert.shapes import describe_mismatch, infer_sizes, network_config, parts, sizes_of, unread_shapes
from pi0fm.models.pi0 import Pi0
from pi0fm_client.errors import BundleError

# The tower's heads and the decoder's are axes in JAX's layout, and given in PyTorch's.
NETWORKS = {"pi0": small_pi0.LIKE_PI0, "pi05": dataclasses.replace(small_pi0.LIKE_PI05, state_dim=5)}
BOTH = [(layout, kind) for layout in ("torch", "jax") for kind in NETWORKS]
EVERY = pytest.mark.parametrize(("layout", "kind"), BOTH)


def foreign_shapes(layout, kind):
    """Every tensor of the peer's file."""
    sizes = sizes_of(NETWORKS[kind])
    read = {part.name: part.shape for group in parts(layout, kind, sizes).values() for part in group}
    return read | unread_shapes(layout, kind, sizes)


def told(layout, kind, shapes):
    known = {"N": 4, "X": 2} if layout == "torch" else {}
    return infer_sizes(layout, kind, shapes, known)


@pytest.mark.parametrize("kind", small_pi0.BOTH)
def test_the_parts_fill_every_tensor_of_the_network(kind):
    config = small_pi0.BOTH[kind]
    with torch.device("meta"):
        wanted = {name: tensor.numel() for name, tensor in Pi0(config).state_dict().items()}
    for layout in ("torch", "jax"):
        assert {name: sum(part.count for part in group) for name, group in parts(layout, kind, sizes_of(config)).items()} == wanted


@EVERY
def test_every_foreign_entry_is_read_once_or_known_to_be_unread(layout, kind):
    read = [(part.name, part.index) for group in parts(layout, kind, sizes_of(NETWORKS[kind])).values() for part in group]
    assert len(set(read)) == len(read)
    if layout == "torch":
        assert not {name for name, _ in read} & unread_shapes(layout, kind, sizes_of(NETWORKS[kind])).keys()


@EVERY
def test_shapes_tell_the_network(layout, kind):
    shapes = foreign_shapes(layout, kind)
    assert layout_of(shapes) == layout
    assert kinds_of(shapes) == {kind}
    assert network_config(kind, told(layout, kind, shapes), action_horizon=4, max_prompt_tokens=8) == NETWORKS[kind]
    assert not describe_mismatch(layout, kind, told(layout, kind, shapes), shapes)


@EVERY
def test_every_fault_is_named_and_none_hides_another(layout, kind):
    shapes = foreign_shapes(layout, kind)
    dropped = next(name for name in shapes if name.startswith("action_out_proj") and name.endswith("bias"))
    turned = next(name for name in shapes if name.endswith(("post_layernorm.bias", "encoder_norm/bias")))
    del shapes[dropped]
    shapes[turned] = (shapes[turned][0] + 1,)
    shapes["PaliGemma/img/lora" if layout == "jax" else "lora"] = (1,)
    found = describe_mismatch(layout, kind, told(layout, kind, shapes), shapes)
    extra = "PaliGemma/img/lora" if layout == "jax" else "lora"
    assert found.startswith(f"missing (1): {dropped}; unexpected (1): {extra}; of another shape (1): {turned} [")


def test_a_whole_layer_that_is_missing_is_listed():
    """The depth is what either stream says, so neither can lose its last layer unseen."""
    shapes = foreign_shapes("torch", "pi0")
    last = {name for name in shapes if "gemma_expert.model.layers.2." in name}
    cut = {name: shape for name, shape in shapes.items() if name not in last}
    assert describe_mismatch("torch", "pi0", told("torch", "pi0", cut), cut) == f"missing ({len(last)}): {', '.join(sorted(last))}"


def test_what_nothing_reads_may_be_absent_but_not_of_another_shape():
    shapes = foreign_shapes("torch", "pi0")
    unread = unread_shapes("torch", "pi0", sizes_of(NETWORKS["pi0"]))
    read = {name: shape for name, shape in shapes.items() if name not in unread}
    assert EMBEDDING in read
    assert not describe_mismatch("torch", "pi0", told("torch", "pi0", read), read)
    wrong = shapes | {"paligemma_with_expert.gemma_expert.lm_head.weight": (40, 25)}
    assert "of another shape (1): paligemma_with_expert.gemma_expert.lm_head" in describe_mismatch(
        "torch", "pi0", told("torch", "pi0", wrong), wrong
    )


@pytest.mark.parametrize("change", [{"action_in_proj.weight": (24, 2**40)}, {}])
def test_sizes_that_no_policy_has_are_refused_before_anything_is_made_of_them(change):
    shapes = {name: shape for name, shape in foreign_shapes("torch", "pi0").items() if not name.startswith("action_")}
    with pytest.raises(BundleError, match=r"out of range|sizes A, found no tensor"):
        told("torch", "pi0", shapes | change)


def test_head_counts_that_do_not_divide():
    with pytest.raises(BundleError, match="head"):
        infer_sizes("torch", "pi0", foreign_shapes("torch", "pi0"), {"N": 5, "X": 2})


def test_the_kind_is_told_by_content():
    assert kinds_of(["action_time_mlp_in.weight", "time_mlp_in.weight"]) == {"pi0", "pi05"}
    assert kinds_of(["paligemma_with_expert.gemma_expert.model.norm.dense.weight"]) == {"pi05"}
    assert kinds_of(["PaliGemma/llm/final_norm_1/Dense_0/kernel"]) == {"pi05"}
    assert kinds_of(["PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel", "action_in_proj.weight"]) == set()
