"""A bundle's weights under openpi's names, with every key of the peers' classes.

Owns: the check that a peer can hold a bundle, the weights file. Does not know: the other files of a peer's directory.

    a bundle lacks the tensors that nothing reads     lm_head                       a copy of the embedding
                                                      expert's lm_head, the last    zeros
                                                      backbone layer after k and v,
                                                      backbone's final norm

openpi ties lm_head and embed_tokens, and its loader refuses a file that holds both: the file has only lm_head, as openpi writes it.
"""

from pathlib import Path

import torch

from pi0fm.convert.names import EMBEDDING, LM_HEAD, Kind
from pi0fm.convert.shapes import FIELDS, parts, sizes_of, unread_shapes
from pi0fm.data.pictures.resizing import Resize
from pi0fm.data.prompt import LEROBOT, OPENPI, STATELESS
from pi0fm.models.config import Pi0Config
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.policy.saved.weights import Weights, common_dtype, tensor_file
from pi0fm.progress import say, step
from pi0fm_client.errors import BundleError

VARIANTS = {(2048, 16384): "gemma_2b", (1024, 4096): "gemma_300m"}
RESIZED: dict[str, Resize] = {"openpi": "antialias", "lerobot": "plain"}
RELEASED = {"L": 18, "N": 8, "K": 1, "H": 256, "W": 257_152, "D": 1152, "M": 4304, "T": 27, "X": 16, "P": 14}


def variants(config: Pi0Config) -> dict[str, str]:
    """Return the peers' names of the streams' sizes; the released names for other sizes, which a user's class may have."""
    streams = {
        "paligemma_variant": (config.decoder.backbone, "gemma_2b"),
        "action_expert_variant": (config.decoder.action_expert, "gemma_300m"),
    }
    return {word: VARIANTS.get((stream.width, stream.mlp_width), usual) for word, (stream, usual) in streams.items()}


def kind_of(config: Pi0Config) -> Kind:
    """Return pi0 or pi05. Raises BundleError for a combination that no peer has."""
    inputs = (config.state_input, config.time_conditioning)
    kinds: dict[tuple[str, str], Kind] = {("token", "concatenate"): "pi0", ("prompt", "adaptive_norm"): "pi05"}
    if inputs not in kinds:
        raise BundleError(
            f"peers know state_input, time_conditioning token, concatenate (pi0) or prompt, adaptive_norm (pi0.5), found {inputs}; "
            "such a policy stays a bundle"
        )
    return kinds[inputs]


def refuse_what_peers_lack(config: PolicyConfig, peer: str, any_size: bool) -> None:
    """Raise BundleError for a policy that the peer would run differently, or could not build."""
    model, flow = config.model, config.flow
    kind = kind_of(model)
    if model.vision.gelu != "tanh" or model.decoder.gelu != "tanh":
        raise BundleError(f"{peer} has only gelu tanh, this bundle was trained with {model.decoder.gelu!r}; its actions would differ there")
    if (flow.path, flow.prediction, flow.solver) != ("cond_ot", "velocity", "euler"):
        raise BundleError(
            f"{peer} knows path cond_ot, prediction velocity and solver euler, found {flow.path}, {flow.prediction}, {flow.solver}; "
            "such a policy stays a bundle"
        )
    sizes = sizes_of(model)
    odd = [f"{FIELDS[letter]} {sizes[letter]} for {size}" for letter, size in RELEASED.items() if sizes[letter] != size]
    for name, stream in (("backbone", model.decoder.backbone), ("action_expert", model.decoder.action_expert)):
        if (stream.width, stream.mlp_width) not in VARIANTS:
            odd.append(f"{name} {stream.width}, {stream.mlp_width} for one of {', '.join(map(str, VARIANTS))}")
    if peer == "openpi":
        odd += [f"image_size {model.vision.image_size} for 224"] * (model.vision.image_size != 224)
        odd += [f"state_dim {model.state_dim} for action_dim {model.action_dim}"] * (kind == "pi0" and model.state_dim != model.action_dim)
    if odd and not any_size:
        raise BundleError(
            f"{peer}'s classes cannot hold these sizes, and LeRobot would return random weights without an error: {'; '.join(odd)}; "
            "type --any_size true for a class of your own"
        )


def refuse_other_prompts(config: PolicyConfig, peer: str, asked: str | None) -> None:
    """Raise BundleError where the peer would format prompts in another dialect than in training.

    The peer's code fixes its dialect, none of its files does. asked: dialect that the user's prompts allow, if one was typed.

        bundle             openpi pi0   openpi pi0.5                   LeRobot pi0   LeRobot pi0.5
        openpi             x            x                              .             x  the same text
        lerobot            .            x  the same text               x             x
        openpi_stateless   -            x  discrete_state_input False  -             .
    """
    kind, trained = kind_of(config.model), config.prompt_dialect
    dialect = asked or trained
    if dialect != trained and STATELESS in (dialect, trained):
        raise BundleError(
            f"prompts of this bundle {'lack' if trained == STATELESS else 'hold'} the state (prompt_dialect {trained}), "
            f"found --prompt_dialect {dialect}; leave it out"
        )
    if dialect == STATELESS and peer == "lerobot":
        raise BundleError(
            "LeRobot writes the state into every prompt of a pi0.5, this bundle was trained without it (prompt_dialect openpi_stateless); "
            "type --to openpi, or keep the bundle"
        )
    own = LEROBOT if peer == "lerobot" else OPENPI
    if kind == "pi0" and dialect != own:
        raise BundleError(
            f"{peer} gives a pi0 prompts in its dialect, this bundle was trained with {trained}, which writes _, line ends and blanks "
            f"around a prompt differently; if your prompts have none of these type --prompt_dialect {own}"
        )


def report_resizing(config: PolicyConfig, peer: str) -> None:
    """Print a warning where the peer would resize pictures differently than in training, which none of its files can change."""
    if config.resize != RESIZED[peer]:
        size = config.model.vision.image_size
        say(
            f"{peer} resizes pictures with {RESIZED[peer]}, this bundle was trained with {config.resize}: its actions differ there by some "
            f"percent, unless it is given pictures of {size} x {size}, resized as pi0fm does"
        )


def write_weights(path: Path, weights: Weights, config: PolicyConfig, peer: str, dtype: torch.dtype | None) -> int:
    """Write `path`, a safetensors file with the peer's full key set, tensor by tensor; return the number of tensors.

    Peers feed noise to the action dimensions that the robot lacks. A policy trained on zeros there gets zero input weights for them, so
    that the noise has no effect.
    """
    model = config.model
    kind, prefix = kind_of(model), "model." if peer == "lerobot" else ""
    sizes = sizes_of(model)
    found = parts("torch", kind, sizes)
    unread = unread_shapes("torch", kind, sizes)
    embedding_dtype = common_dtype([weights.dtypes["prompt_embedding.weight"]], dtype)
    # lm_head first: LeRobot's loader copies both names to the embedding, and the later one wins
    entries = {prefix + name: (shape, embedding_dtype) for name, shape in unread.items()}
    for ours, group in found.items():
        entries |= {prefix + part.name: (part.shape, common_dtype([weights.dtypes[ours]], dtype)) for part in group}
    if peer == "openpi":
        del entries[EMBEDDING]
    with tensor_file(path, entries) as put, step("writing tensors", len(found)) as bar:
        for name, shape in unread.items():
            if name != LM_HEAD:
                put(prefix + name, 0, torch.zeros(1).expand(shape))
        for ours, group in found.items():
            tensor = weights.read(ours, ())
            if ours == "action_in.weight" and not config.padded_noise:
                tensor = tensor.clone()
                tensor[:, config.embodiment.dims()[1] :] = 0
            if ours == "prompt_embedding.weight":
                put(prefix + LM_HEAD, 0, tensor)
            first = 0
            for part in group:
                rows = tensor[first : first + part.count * tensor.shape[0] // tensor.numel()]
                if prefix + part.name in entries:
                    put(prefix + part.name, 0, rows)
                first += rows.shape[0]
            del tensor, rows  # before the next one is read
            bar.advance()
    return len(entries)
