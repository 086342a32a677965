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

_THEIR_TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
_STREAMS = {
    "torch": {
        "backbone": "paligemma_with_expert.paligemma.model.language_model",
        "action_expert": "paligemma_with_expert.gemma_expert.model",
    },
    "jax": {"backbone": "", "action_expert": "_1"},
}

_BLOCKS = {"torch": f"{_THEIR_TOWER}.encoder.layers.{{block}}", "jax": "PaliGemma/img/Transformer/encoderblock"}
_HEADS = "MultiHeadDotProductAttention_0"
_TOWER: Mapping[Layout, Table] = {
    "torch": {
        "vision.patch_embedding.weight": (f"{_THEIR_TOWER}.embeddings.patch_embedding.weight D 3 P P'",),
        "vision.patch_embedding.bias": (f"{_THEIR_TOWER}.embeddings.patch_embedding.bias D",),
        "vision.position_embedding": (f"{_THEIR_TOWER}.embeddings.position_embedding.weight V D",),
        "vision.final_norm.weight": (f"{_THEIR_TOWER}.post_layernorm.weight D",),
        "vision.final_norm.bias": (f"{_THEIR_TOWER}.post_layernorm.bias D",),
        "vision.projector.weight": (f"{_PROJECTOR}.weight B D",),
        "vision.projector.bias": (f"{_PROJECTOR}.bias B",),
    },
    "jax": {
        "vision.patch_embedding.weight": ("PaliGemma/img/embedding/kernel P P' 3 D -> D 3 P P'",),
        "vision.patch_embedding.bias": ("PaliGemma/img/embedding/bias D",),
        "vision.position_embedding": ("PaliGemma/img/pos_embedding 0/1 V D",),
        "vision.final_norm.weight": ("PaliGemma/img/Transformer/encoder_norm/scale D",),
        "vision.final_norm.bias": ("PaliGemma/img/Transformer/encoder_norm/bias D",),
        "vision.projector.weight": ("PaliGemma/img/head/kernel D B -> B D",),
        "vision.projector.bias": ("PaliGemma/img/head/bias B",),
    },
}
# One layer of the tower; `@` stands for the layer's place.
_TOWER_LAYER: Mapping[Layout, Table] = {
    "torch": {
        "attention_norm.weight": ("@.layer_norm1.weight D",),
        "attention_norm.bias": ("@.layer_norm1.bias D",),
        "qkv.weight": tuple(f"@.self_attn.{which}_proj.weight D D'" for which in ("q", "k", "v")),
        "qkv.bias": tuple(f"@.self_attn.{which}_proj.bias D" for which in ("q", "k", "v")),
        "out.weight": ("@.self_attn.out_proj.weight D D'",),
        "out.bias": ("@.self_attn.out_proj.bias D",),
        "mlp_norm.weight": ("@.layer_norm2.weight D",),
        "mlp_norm.bias": ("@.layer_norm2.bias D",),
        "mlp.fc1.weight": ("@.mlp.fc1.weight M D",),
        "mlp.fc1.bias": ("@.mlp.fc1.bias M",),
        "mlp.fc2.weight": ("@.mlp.fc2.weight D M",),
        "mlp.fc2.bias": ("@.mlp.fc2.bias D",),
    },
    "jax": {
        "attention_norm.weight": ("@/LayerNorm_0/scale block/T D",),
        "attention_norm.bias": ("@/LayerNorm_0/bias block/T D",),
        "qkv.weight": tuple(f"@/{_HEADS}/{which}/kernel block/T D X Y -> X Y D" for which in ("query", "key", "value")),
        "qkv.bias": tuple(f"@/{_HEADS}/{which}/bias block/T X Y" for which in ("query", "key", "value")),
        "out.weight": (f"@/{_HEADS}/out/kernel block/T X Y D -> D X Y",),
        "out.bias": (f"@/{_HEADS}/out/bias block/T D",),
        "mlp_norm.weight": ("@/LayerNorm_1/scale block/T D",),
        "mlp_norm.bias": ("@/LayerNorm_1/bias block/T D",),
        "mlp.fc1.weight": ("@/MlpBlock_0/Dense_0/kernel block/T D M -> M D",),
        "mlp.fc1.bias": ("@/MlpBlock_0/Dense_0/bias block/T M",),
        "mlp.fc2.weight": ("@/MlpBlock_0/Dense_1/kernel block/T M D -> D M",),
        "mlp.fc2.bias": ("@/MlpBlock_0/Dense_1/bias block/T D",),
    },
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
    rows = dict(_TOWER[layout])
    for leaf, texts in _TOWER_LAYER[layout].items():
        rows[f"vision.layers.{{block}}.{leaf}"] = tuple(text.replace("@", _BLOCKS[layout]) for text in texts)
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
        rows["prompt_embedding.weight"] = (f"{EMBEDDING} W B",)
    else:
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
