"""Names and layouts of foreign checkpoints' tensors, and the bundle's tensors that they become.

Owns: the table. Does not know: the sizes of a network (convert/shapes), files, robots.
The names are openpi's (PyTorch and JAX); LeRobot's are openpi's with a leading `model.`.

A row lists the foreign tensors that are stacked into one of ours, and how their axes are permuted:

    decoder.layers.3.backbone.qkv.weight      PaliGemma/llm/layers/attn/q_einsum/w    layer/L N B H   -> N H B
    [(N + 2 K) H, B]                          PaliGemma/llm/layers/attn/kv_einsum/w   layer/L 0/2 K B H -> K H B
                                              PaliGemma/llm/layers/attn/kv_einsum/w   layer/L 1/2 K B H -> K H B

    B       an axis of that size; B' another axis of the same size        N*H, 3*E   an axis of a product's size
    1/2     entry 1 of an axis of 2; `layer/L` this layer's entry         no arrow   axes in the same order

Size letters: B, F width and MLP of the backbone, E, G of the action expert, L depth, N heads, K kv heads, H head dim, W vocabulary,
A action dim, S state dim; of the tower D width, M MLP, T depth, X heads, Y head dim, P patch, V tokens of a picture.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Layout = Literal["torch", "jax"]
Kind = Literal["pi0", "pi05"]
LAYOUTS: tuple[Layout, Layout] = ("torch", "jax")

_LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"
EMBEDDING = f"{_LANGUAGE}.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"

# ours : PyTorch's : JAX's. `[q k v]` stands for three stacked tensors, an upper-case word for one of _WORDS.
_TOWER = """
vision.patch_embedding.weight : SIGLIP.embeddings.patch_embedding.weight D 3 P P' : IMG/embedding/kernel P P' 3 D -> D 3 P P'
vision.patch_embedding.bias : SIGLIP.embeddings.patch_embedding.bias D : IMG/embedding/bias D
vision.position_embedding : SIGLIP.embeddings.position_embedding.weight V D : IMG/pos_embedding 0/1 V D
vision.final_norm.weight : SIGLIP.post_layernorm.weight D : IMG/Transformer/encoder_norm/scale D
vision.final_norm.bias : SIGLIP.post_layernorm.bias D : IMG/Transformer/encoder_norm/bias D
vision.projector.weight : PROJECTOR.weight B D : IMG/head/kernel D B -> B D
vision.projector.bias : PROJECTOR.bias B : IMG/head/bias B
BLOCK.attention_norm.weight : THEIRS.layer_norm1.weight D : STACK/LayerNorm_0/scale block/T D
BLOCK.attention_norm.bias : THEIRS.layer_norm1.bias D : STACK/LayerNorm_0/bias block/T D
BLOCK.qkv.weight : THEIRS.self_attn.[q k v]_proj.weight D D' : STACK/HEADS/[query key value]/kernel block/T D X Y -> X Y D
BLOCK.qkv.bias : THEIRS.self_attn.[q k v]_proj.bias D : STACK/HEADS/[query key value]/bias block/T X Y
BLOCK.out.weight : THEIRS.self_attn.out_proj.weight D D' : STACK/HEADS/out/kernel block/T X Y D -> D X Y
BLOCK.out.bias : THEIRS.self_attn.out_proj.bias D : STACK/HEADS/out/bias block/T D
BLOCK.mlp_norm.weight : THEIRS.layer_norm2.weight D : STACK/LayerNorm_1/scale block/T D
BLOCK.mlp_norm.bias : THEIRS.layer_norm2.bias D : STACK/LayerNorm_1/bias block/T D
BLOCK.mlp.fc1.weight : THEIRS.mlp.fc1.weight M D : STACK/MlpBlock_0/Dense_0/kernel block/T D M -> M D
BLOCK.mlp.fc1.bias : THEIRS.mlp.fc1.bias M : STACK/MlpBlock_0/Dense_0/bias block/T M
BLOCK.mlp.fc2.weight : THEIRS.mlp.fc2.weight D M : STACK/MlpBlock_0/Dense_1/kernel block/T M D -> D M
BLOCK.mlp.fc2.bias : THEIRS.mlp.fc2.bias D : STACK/MlpBlock_0/Dense_1/bias block/T D
prompt_embedding.weight : LANGUAGE.embed_tokens.weight W B : LLM/embedder/input_embedding W B
"""
# A layer of the backbone. The action expert has letters E for B and G for F, and JAX names that end in `_1`, here `@`.
_STREAM = """
OURS.qkv.weight : LAYER.self_attn.q_proj.weight N*H B + LAYER.self_attn.[k v]_proj.weight K*H B \
: LLM/layers/attn/q_einsum@/w layer/L N B H -> N H B + LLM/layers/attn/kv_einsum@/w layer/L [0 1]/2 K B H -> K H B
OURS.out.weight : LAYER.self_attn.o_proj.weight B N*H : LLM/layers/attn/attn_vec_einsum@/w layer/L N H B -> B N H
OURS.mlp.gate_up.weight : LAYER.mlp.[gate up]_proj.weight F B : LLM/layers/mlp@/gating_einsum layer/L [0 1]/2 B F -> F B
OURS.mlp.down.weight : LAYER.mlp.down_proj.weight B F : LLM/layers/mlp@/linear layer/L F B -> B F
"""
_NORMS = {
    "OURS.attention_norm": ("LAYER.input_layernorm", "LLM/layers/pre_attention_norm@", "layer/L "),
    "OURS.mlp_norm": ("LAYER.post_attention_layernorm", "LLM/layers/pre_ffw_norm@", "layer/L "),
    "decoder.final_norm": ("STREAM.norm", "LLM/final_norm@", ""),
}
_PLAIN = ("NORM.scale : TORCH.weight B : JAX/scale STACKED B",)
_ADAPTIVE = (
    "NORM.modulation.weight : TORCH.dense.weight 3*B B : JAX/Dense_0/kernel STACKED B 3*B -> 3*B B",
    "NORM.modulation.bias : TORCH.dense.bias 3*B : JAX/Dense_0/bias STACKED 3*B",
)
_LINEARS = {  # ours: theirs, out, in
    "pi0": {"state_in": "state_proj E S", "time_mlp_in": "action_time_mlp_in E 2*E", "time_mlp_out": "action_time_mlp_out E E'"},
    "pi05": {"time_mlp_in": "time_mlp_in E E'", "time_mlp_out": "time_mlp_out E E'"},
}
_EVERY_LINEAR = {"action_in": "action_in_proj E A", "action_out": "action_out_proj A E"}
_WORDS = {
    "SIGLIP": "paligemma_with_expert.paligemma.model.vision_tower.vision_model",
    "THEIRS": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.{block}",
    "PROJECTOR": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
    "LANGUAGE": _LANGUAGE,
    "BLOCK": "vision.layers.{block}",
    "STACK": "PaliGemma/img/Transformer/encoderblock",
    "HEADS": "MultiHeadDotProductAttention_0",
    "IMG": "PaliGemma/img",
    "LLM": "PaliGemma/llm",
    "LAYER": "STREAM.layers.{layer}",
}
_STREAMS = {"backbone": (_LANGUAGE, ""), "action_expert": ("paligemma_with_expert.gemma_expert.model", "_1")}


@dataclass(frozen=True)
class Row:
    """A foreign tensor. axes: of the whole tensor, those with `/` first; permuted: of the entry that these select, in our order."""

    name: str
    axes: tuple[str, ...]
    permuted: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Row":
        """Parse `NAME axes -> axes`."""
        name, axes = text.split(" ", 1)
        stored, _, permuted = axes.partition("->")
        return cls(name, tuple(stored.split()), tuple(permuted.split()))


def layout_of(names: Iterable[str]) -> Layout:
    """Return `jax` where names are paths with `/`, else `torch`."""
    return "jax" if any(name.startswith("PaliGemma/") for name in names) else "torch"


def kinds_of(names: Iterable[str]) -> set[Kind]:
    """Return the kinds of policy that have tensors with these names: exactly one for a whole checkpoint."""
    found: set[Kind] = set()
    for name in names:
        if re.match(r"action_time_mlp_(in|out)[./]", name):
            found.add("pi0")
        elif re.match(r"time_mlp_(in|out)[./]", name) or re.search(r"norm(\.dense\.|_1/Dense_0/)", name):
            found.add("pi05")
    return found


def table(layout: Layout, kind: Kind) -> dict[str, tuple[Row, ...]]:
    """Return the rows for each of our tensors; `{layer}` and `{block}` stand for each layer of decoder and tower."""
    rows: dict[str, tuple[Row, ...]] = {}
    for line in _lines(kind):
        ours, *theirs = line.split(" : ")
        rows[ours] = tuple(Row.parse(part) for text in theirs[LAYOUTS.index(layout)].split(" + ") for part in _each(text))
    return rows


def unread_rows(layout: Layout, kind: Kind) -> list[Row]:
    """Return the tensors that no output depends on: both lm_heads, the backbone's final norm and its last `{layer}` after k and v.

    JAX's layout stacks the last layer with the others, and has no lm_head.
    """
    if layout == "jax":
        return [Row("PaliGemma/llm/final_norm/scale", ("B",))]
    rows = table(layout, kind)
    dead = [row for ours in rows if ours.startswith("decoder.layers.{layer}.backbone.") for row in rows[ours][: dead_rows(ours)]]
    heads = (f"{LM_HEAD} W B", "paligemma_with_expert.gemma_expert.lm_head.weight W E", f"{_LANGUAGE}.norm.weight B")
    return [*map(Row.parse, heads), *dead]


def dead_rows(ours: str) -> int:
    """Return the number of leading rows in a tensor of the last backbone layer that nothing reads: `qkv`'s queries, all after attention."""
    name = ours.rsplit(".backbone.", 1)[-1]
    return {"attention_norm.scale": 0, "qkv.weight": 1}.get(name, 2)


def _lines(kind: Kind) -> Iterator[str]:
    """Yield the lines for a whole network, ours : PyTorch's : JAX's, with the words of _WORDS replaced."""
    for line in _TOWER.strip().splitlines():
        yield _replaced(line, _WORDS)
    for stream, (place, suffix) in _STREAMS.items():
        lines = _STREAM.strip().splitlines()
        for norm, (torch, jax, stacked) in _NORMS.items():
            if (norm, stream) != ("decoder.final_norm", "backbone"):  # nothing reads it
                adaptive = kind == "pi05" and stream == "action_expert"
                words = {"NORM": norm, "TORCH": torch, "JAX": jax, "STACKED ": stacked}
                lines += [_replaced(line, words) for line in (_ADAPTIVE if adaptive else _PLAIN)]
        for line in lines:
            words = {"OURS": f"decoder.layers.{{layer}}.{stream}", **_WORDS, "STREAM": place, "@": suffix}
            placed = _replaced(line, words)
            yield re.sub(r"(?<=[ *])([BF])\b", lambda found: {"B": "E", "F": "G"}[found[1]], placed) if suffix else placed
    for ours, text in (_EVERY_LINEAR | _LINEARS[kind]).items():
        theirs, out, width = text.split()
        yield f"{ours}.weight : {theirs}.weight {out} {width} : {theirs}/kernel {width} {out} -> {out} {width}"
        yield f"{ours}.bias : {theirs}.bias {out} : {theirs}/bias {out}"


def _replaced(line: str, words: dict[str, str]) -> str:
    for word, meaning in words.items():
        line = line.replace(word, meaning)
    return line


def _each(text: str) -> list[str]:
    """Expand `a[b c]d` to abd, acd."""
    found = re.search(r"\[(.*?)\]", text)
    return [text[: found.start()] + word + text[found.end() :] for word in found[1].split()] if found else [text]
