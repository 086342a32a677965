"""What the tensors of foreign checkpoints are called, how they are laid out, and which of ours they become.

Owns: one table a layout. Does not know: the sizes of a network (checkpoint_shapes), files, robots.
The names are those of openpi (PyTorch and JAX); LeRobot's are openpi's with a leading `model.`.

A row says which foreign tensors, one below the other, make one of ours, and how their axes are turned:

    decoder.layers.3.backbone.qkv.weight      PaliGemma/llm/layers/attn/q_einsum/w    layer/L N B H   -> N H B
    [(N + 2 K) H, B]                          PaliGemma/llm/layers/attn/kv_einsum/w   layer/L 0/2 K B H -> K H B
                                              PaliGemma/llm/layers/attn/kv_einsum/w   layer/L 1/2 K B H -> K H B

    B       an axis of that size; B' another axis of the same size        N*H, 3*E   an axis of a product's size
    1/2     entry 1 of an axis of two; `layer/L` this layer's             no arrow   nothing is turned

Size letters: B, F width and MLP of the backbone, E, G of the action expert, L depth, N heads, K kv heads, H head dim, W vocabulary,
A action dim, S state dim; of the tower D width, M MLP, T depth, X heads, Y head dim, P patch, V tokens of a picture.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

Layout = Literal["torch", "jax"]
Kind = Literal["pi0", "pi05"]
Table = Mapping[str, tuple[str, ...]]

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"

_TOWER = "vision.tower.vision_model"
_THEIR_TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
_STREAMS = {
    "torch": {
        "backbone": "paligemma_with_expert.paligemma.model.language_model",
        "action_expert": "paligemma_with_expert.gemma_expert.model",
    },
    "jax": {"backbone": "", "action_expert": "_1"},
}

_TORCH_TOWER: Table = {
    f"{_TOWER}.{name}": (f"{_THEIR_TOWER}.{name} {axes}",)
    for name, axes in {
        "embeddings.patch_embedding.weight": "D 3 P P'",
        "embeddings.patch_embedding.bias": "D",
        "embeddings.position_embedding.weight": "V D",
        **{f"encoder.layers.{{block}}.layer_norm{which}.{kind}": "D" for which in (1, 2) for kind in ("weight", "bias")},
        **{f"encoder.layers.{{block}}.self_attn.{which}_proj.weight": "D D'" for which in ("q", "k", "v", "out")},
        **{f"encoder.layers.{{block}}.self_attn.{which}_proj.bias": "D" for which in ("q", "k", "v", "out")},
        "encoder.layers.{block}.mlp.fc1.weight": "M D",
        "encoder.layers.{block}.mlp.fc1.bias": "M",
        "encoder.layers.{block}.mlp.fc2.weight": "D M",
        "encoder.layers.{block}.mlp.fc2.bias": "D",
        "post_layernorm.weight": "D",
        "post_layernorm.bias": "D",
    }.items()
}
_BLOCK, _THEIR_BLOCK = f"{_TOWER}.encoder.layers.{{block}}", "PaliGemma/img/Transformer/encoderblock"
_JAX_TOWER: Table = {
    f"{_TOWER}.embeddings.patch_embedding.weight": ("PaliGemma/img/embedding/kernel P P' 3 D -> D 3 P P'",),
    f"{_TOWER}.embeddings.patch_embedding.bias": ("PaliGemma/img/embedding/bias D",),
    f"{_TOWER}.embeddings.position_embedding.weight": ("PaliGemma/img/pos_embedding 0/1 V D",),
    **{
        f"{_BLOCK}.layer_norm{which + 1}.{ours}": (f"{_THEIR_BLOCK}/LayerNorm_{which}/{theirs} block/T D",)
        for which in (0, 1)
        for ours, theirs in (("weight", "scale"), ("bias", "bias"))
    },
    **{
        f"{_BLOCK}.self_attn.{ours}_proj.{kind}": (f"{_THEIR_BLOCK}/MultiHeadDotProductAttention_0/{theirs}/{axes}",)
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"))
        for kind, axes in (("weight", "kernel block/T D X Y -> X Y D"), ("bias", "bias block/T X Y"))
    },
    f"{_BLOCK}.self_attn.out_proj.weight": (f"{_THEIR_BLOCK}/MultiHeadDotProductAttention_0/out/kernel block/T X Y D -> D X Y",),
    f"{_BLOCK}.self_attn.out_proj.bias": (f"{_THEIR_BLOCK}/MultiHeadDotProductAttention_0/out/bias block/T D",),
    f"{_BLOCK}.mlp.fc1.weight": (f"{_THEIR_BLOCK}/MlpBlock_0/Dense_0/kernel block/T D M -> M D",),
    f"{_BLOCK}.mlp.fc1.bias": (f"{_THEIR_BLOCK}/MlpBlock_0/Dense_0/bias block/T M",),
    f"{_BLOCK}.mlp.fc2.weight": (f"{_THEIR_BLOCK}/MlpBlock_0/Dense_1/kernel block/T M D -> D M",),
    f"{_BLOCK}.mlp.fc2.bias": (f"{_THEIR_BLOCK}/MlpBlock_0/Dense_1/bias block/T D",),
    f"{_TOWER}.post_layernorm.weight": ("PaliGemma/img/Transformer/encoder_norm/scale D",),
    f"{_TOWER}.post_layernorm.bias": ("PaliGemma/img/Transformer/encoder_norm/bias D",),
}

# One stream's layer, as the backbone has it; the expert's letters are E for B and G for F. `@` stands for the stream's place.
_LAYER: Mapping[Layout, Table] = {
    "torch": {
        "qkv.weight": tuple(
            f"@.layers.{{layer}}.self_attn.{which} B" for which in ("q_proj.weight N*H", "k_proj.weight K*H", "v_proj.weight K*H")
        ),
        "out.weight": ("@.layers.{layer}.self_attn.o_proj.weight B N*H",),
        "mlp.gate_up.weight": ("@.layers.{layer}.mlp.gate_proj.weight F B", "@.layers.{layer}.mlp.up_proj.weight F B"),
        "mlp.down.weight": ("@.layers.{layer}.mlp.down_proj.weight B F",),
    },
    "jax": {
        "qkv.weight": (
            "PaliGemma/llm/layers/attn/q_einsum@/w layer/L N B H -> N H B",
            "PaliGemma/llm/layers/attn/kv_einsum@/w layer/L 0/2 K B H -> K H B",
            "PaliGemma/llm/layers/attn/kv_einsum@/w layer/L 1/2 K B H -> K H B",
        ),
        "out.weight": ("PaliGemma/llm/layers/attn/attn_vec_einsum@/w layer/L N H B -> B N H",),
        "mlp.gate_up.weight": (
            "PaliGemma/llm/layers/mlp@/gating_einsum layer/L 0/2 B F -> F B",
            "PaliGemma/llm/layers/mlp@/gating_einsum layer/L 1/2 B F -> F B",
        ),
        "mlp.down.weight": ("PaliGemma/llm/layers/mlp@/linear layer/L F B -> B F",),
    },
}
_NORMS = {
    "torch": {
        "attention_norm": "@.layers.{layer}.input_layernorm",
        "mlp_norm": "@.layers.{layer}.post_attention_layernorm",
        "final_norm": "@.norm",
    },
    "jax": {
        "attention_norm": "PaliGemma/llm/layers/pre_attention_norm@",
        "mlp_norm": "PaliGemma/llm/layers/pre_ffw_norm@",
        "final_norm": "PaliGemma/llm/final_norm@",
    },
}
_PLAIN_NORM: Mapping[Layout, Table] = {"torch": {"scale": (".weight B",)}, "jax": {"scale": ("/scale layer/L B",)}}
_ADAPTIVE_NORM: Mapping[Layout, Table] = {
    "torch": {"modulation.weight": (".dense.weight 3*B B",), "modulation.bias": (".dense.bias 3*B",)},
    "jax": {
        "modulation.weight": ("/Dense_0/kernel layer/L B 3*B -> 3*B B",),
        "modulation.bias": ("/Dense_0/bias layer/L 3*B",),
    },
}
_LINEARS: Mapping[Kind, Mapping[str, tuple[str, str, str]]] = {
    "pi0": {
        "action_in": ("action_in_proj", "E", "A"),
        "action_out": ("action_out_proj", "A", "E"),
        "state_in": ("state_proj", "E", "S"),
        "time_mlp_in": ("action_time_mlp_in", "E", "2*E"),
        "time_mlp_out": ("action_time_mlp_out", "E", "E'"),
    },
    "pi05": {
        "action_in": ("action_in_proj", "E", "A"),
        "action_out": ("action_out_proj", "A", "E"),
        "time_mlp_in": ("time_mlp_in", "E", "E'"),
        "time_mlp_out": ("time_mlp_out", "E", "E'"),
    },
}


def layout_of(names: Iterable[str]) -> Layout:
    """`jax` where names are paths with `/`, else `torch`."""
    return "jax" if any(name.startswith("PaliGemma/") for name in names) else "torch"


def kinds_of(names: Iterable[str]) -> set[Kind]:
    """Which policies the names speak of; exactly one for a whole checkpoint. Told by content: time MLPs and adaptive norms."""
    found: set[Kind] = set()
    for name in names:
        if re.match(r"action_time_mlp_(in|out)[./]", name):
            found.add("pi0")
        elif re.match(r"time_mlp_(in|out)[./]", name) or re.search(r"norm(\.dense\.|_1/Dense_0/)", name):
            found.add("pi05")
    return found


def table(layout: Layout, kind: Kind) -> dict[str, tuple[str, ...]]:
    """Ours -> rows of the notation above, for a whole network; `{layer}` and `{block}` stand for every layer of decoder and tower."""
    rows = dict(_TORCH_TOWER if layout == "torch" else _JAX_TOWER)
    for stream, place in _STREAMS[layout].items():
        for norm, name in _NORMS[layout].items():
            adaptive = kind == "pi05" and stream == "action_expert"
            ours = f"decoder.layers.{{layer}}.{stream}.{norm}" if norm != "final_norm" else "decoder.final_norm"
            if norm == "final_norm" and stream == "backbone":
                continue  # read by nothing
            for leaf, texts in (_ADAPTIVE_NORM if adaptive else _PLAIN_NORM)[layout].items():
                axes = texts[0].replace("layer/L ", "") if norm == "final_norm" else texts[0]
                rows[f"{ours}.{leaf}"] = (_placed(name + axes, place, stream),)
        for leaf, texts in _LAYER[layout].items():
            rows[f"decoder.layers.{{layer}}.{stream}.{leaf}"] = tuple(_placed(text, place, stream) for text in texts)
    if layout == "torch":
        rows |= {"vision.projector.weight": (f"{_PROJECTOR}.weight B D",), "vision.projector.bias": (f"{_PROJECTOR}.bias B",)}
        rows["prompt_embedding.weight"] = (f"{EMBEDDING} W B",)
    else:
        rows |= {
            "vision.projector.weight": ("PaliGemma/img/head/kernel D B -> B D",),
            "vision.projector.bias": ("PaliGemma/img/head/bias B",),
        }
        rows["prompt_embedding.weight"] = ("PaliGemma/llm/embedder/input_embedding W B",)
    for ours, (theirs, out, width) in _LINEARS[kind].items():
        rows[f"{ours}.weight"] = (
            f"{theirs}.weight {out} {width}" if layout == "torch" else f"{theirs}/kernel {width} {out} -> {out} {width}",
        )
        rows[f"{ours}.bias"] = (f"{theirs}.bias {out}" if layout == "torch" else f"{theirs}/bias {out}",)
    return rows


def unread(layout: Layout, kind: Kind) -> dict[str, str]:
    """Foreign name -> axes of what no output depends on: both lm_heads, the backbone's final norm, its layer `{last}` behind k and v.

    In JAX's layout the last layer is an entry of stacked tensors that are read for the others, and no lm_head exists.
    """
    if layout == "jax":
        return {"PaliGemma/llm/final_norm/scale": "B"}
    backbone = _STREAMS["torch"]["backbone"]
    rows = {LM_HEAD: "W B", "paligemma_with_expert.gemma_expert.lm_head.weight": "W E", f"{backbone}.norm.weight": "B"}
    for ours, texts in table(layout, kind).items():
        if ours.startswith("decoder.layers.{layer}.backbone."):
            rows |= dict(text.replace("{layer}", "{last}").split(" ", 1) for text in texts[: dead_rows(ours)])
    return rows


def dead_rows(ours: str) -> int:
    """How many leading rows of one of the last backbone layer's tensors nothing reads: the queries of `qkv`, everything behind it."""
    name = ours.rsplit(".backbone.", 1)[-1]
    return {"attention_norm.scale": 0, "qkv.weight": 1}.get(name, 2)


def _placed(text: str, place: str, stream: str) -> str:
    """A row of `_LAYER` or `_NORMS` at its stream's place, with its stream's letters."""
    name, axes = text.replace("@", place).split(" ", 1)
    return f"{name} {axes.translate(str.maketrans('BF', 'EG')) if stream == 'action_expert' else axes}"
