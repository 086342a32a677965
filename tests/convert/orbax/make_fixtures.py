"""Writes `pi0/` and `pi05/` beside this file with orbax, the library that openpi saves with; not run by the tests.

    uv venv orbax && uv pip install --python orbax/bin/python orbax-checkpoint 'jax[cpu]'
    JAX_PLATFORMS=cpu orbax/bin/python tests/convert/orbax/make_fixtures.py

The values are a function of the tensor's name, so that a test can make them again without a file. `pi0` has the leaves that a flax.nnx
state has (`.../value`, as openpi's training saves), in float32; `pi05` is a pure tree, with its matrices in bfloat16.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np

# A vision-language stream of 16 and an expert of 12, two layers, four heads on two key heads of 4; a tower of 8 with two heads.
BACKBONE = {"": (16, 24), "_1": (12, 20)}
LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, ACTION, STATE = 2, 4, 2, 4, 24, 5, 6
WIDTH, BLOCKS, TOWER_HEADS, MLP, PATCH, TOKENS = 8, 3, 2, 12, 4, 4


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every tensor of a small openpi checkpoint."""
    block, attention = "PaliGemma/img/Transformer/encoderblock", "MultiHeadDotProductAttention_0"
    found: dict[str, tuple[int, ...]] = {
        "PaliGemma/img/embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "PaliGemma/img/embedding/bias": (WIDTH,),
        "PaliGemma/img/pos_embedding": (1, TOKENS, WIDTH),
        f"{block}/MlpBlock_0/Dense_0/kernel": (BLOCKS, WIDTH, MLP),
        f"{block}/MlpBlock_0/Dense_0/bias": (BLOCKS, MLP),
        f"{block}/MlpBlock_0/Dense_1/kernel": (BLOCKS, MLP, WIDTH),
        f"{block}/MlpBlock_0/Dense_1/bias": (BLOCKS, WIDTH),
        f"{block}/{attention}/out/kernel": (BLOCKS, TOWER_HEADS, WIDTH // TOWER_HEADS, WIDTH),
        f"{block}/{attention}/out/bias": (BLOCKS, WIDTH),
        "PaliGemma/img/Transformer/encoder_norm/scale": (WIDTH,),
        "PaliGemma/img/Transformer/encoder_norm/bias": (WIDTH,),
        "PaliGemma/img/head/kernel": (WIDTH, BACKBONE[""][0]),
        "PaliGemma/img/head/bias": (BACKBONE[""][0],),
        "PaliGemma/llm/embedder/input_embedding": (VOCABULARY, BACKBONE[""][0]),
    }
    for which in ("query", "key", "value"):
        found[f"{block}/{attention}/{which}/kernel"] = (BLOCKS, WIDTH, TOWER_HEADS, WIDTH // TOWER_HEADS)
        found[f"{block}/{attention}/{which}/bias"] = (BLOCKS, TOWER_HEADS, WIDTH // TOWER_HEADS)
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        found |= {f"{block}/{norm}/{leaf}": (BLOCKS, WIDTH) for leaf in ("scale", "bias")}
    for suffix, (width, mlp) in BACKBONE.items():
        layers = "PaliGemma/llm/layers"
        found[f"{layers}/attn/q_einsum{suffix}/w"] = (LAYERS, HEADS, width, HEAD_DIM)
        found[f"{layers}/attn/kv_einsum{suffix}/w"] = (LAYERS, 2, KV_HEADS, width, HEAD_DIM)
        found[f"{layers}/attn/attn_vec_einsum{suffix}/w"] = (LAYERS, HEADS, HEAD_DIM, width)
        found[f"{layers}/mlp{suffix}/gating_einsum"] = (LAYERS, 2, width, mlp)
        found[f"{layers}/mlp{suffix}/linear"] = (LAYERS, mlp, width)
        norms = {f"{layers}/pre_attention_norm{suffix}": (LAYERS,), f"{layers}/pre_ffw_norm{suffix}": (LAYERS,)}
        for norm, stack in {**norms, f"PaliGemma/llm/final_norm{suffix}": ()}.items():
            if kind == "pi05" and suffix:
                found[f"{norm}/Dense_0/kernel"] = (*stack, width, 3 * width)
                found[f"{norm}/Dense_0/bias"] = (*stack, 3 * width)
            else:
                found[f"{norm}/scale"] = (*stack, width)
    width = BACKBONE["_1"][0]
    linears = {"action_in_proj": (ACTION, width), "action_out_proj": (width, ACTION)}
    if kind == "pi0":
        linears |= {"state_proj": (STATE, width), "action_time_mlp_in": (2 * width, width), "action_time_mlp_out": (width, width)}
    else:
        linears |= {"time_mlp_in": (width, width), "time_mlp_out": (width, width)}
    for name, shape in linears.items():
        found |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
    return found


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [-0.5, 0.5), exact in bfloat16, another sequence for each name."""
    steps = np.arange(int(np.prod(shape)), dtype=np.int64) * 37 + zlib.crc32(name.encode())
    return ((steps % 127).astype(np.float32) / 128 - 0.5).reshape(shape)


def main() -> None:
    """Write both."""
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    for kind in ("pi0", "pi05"):
        tree: dict = {}
        for name, shape in shapes(kind).items():
            *parents, leaf = name.split("/")
            at = tree
            for parent in parents:
                at = at.setdefault(parent, {})
            array = jnp.asarray(values(name, shape))
            at[leaf] = {"value": array} if kind == "pi0" else array.astype(jnp.bfloat16 if len(shape) > 1 else jnp.float32)
        root = Path(__file__).resolve().parent / kind
        shutil.rmtree(root, ignore_errors=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(root / "params", {"params": tree})
        stats = {
            column: {statistic: [float(place + i) for i in range(3)] for place, statistic in enumerate(("mean", "std", "q01", "q99"), 1)}
            for column in ("state", "actions")
        }
        assets = root / "assets" / "robot"
        assets.mkdir(parents=True)
        (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))


if __name__ == "__main__":
    main()
