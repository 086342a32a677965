"""Weights in and out: one directory in, one directory out, every tensor once.

Owns: the order of a conversion, and what is refused before a byte is written. Does not know: any peer's names or files.

    foreign directory -> facts, headers -> kind -> sizes -> misfit? -> configuration, chain -> [tensor, tensor, ...] -> bundle
    bundle            -> config, headers -> can the peer hold it?   ------------------------> [tensor, tensor, ...] -> peer's directory

The kind, pi0 or pi0.5, is told by what the weights hold, never by a path. Everything to the left of the brackets reads headers alone;
the brackets hold one foreign tensor at a time, and the output is written aside and renamed: it is whole or it is not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pi0fm import files
from pi0fm.convert.export import kind_of, refuse_other_prompts, refuse_what_peers_lack, say_other_pictures, write_weights
from pi0fm.convert.export_lerobot import write_lerobot
from pi0fm.convert.facts import PROMPT_TOKENS, ConvertConfig, ForeignFacts, policy_config
from pi0fm.convert.lerobot import is_lerobot, read_lerobot
from pi0fm.convert.names import Kind, Layout, kinds_of, layout_of
from pi0fm.convert.openpi import read_openpi, write_openpi
from pi0fm.convert.orbax import is_orbax, open_orbax
from pi0fm.convert.read import open_safetensors, with_one_embedding
from pi0fm.convert.shapes import Part, misfit, network_config, parts, tell_sizes
from pi0fm.models.pi0 import Pi0Config
from pi0fm.policy import bundle
from pi0fm.policy.manifest import MANIFEST, WEIGHTS, identity
from pi0fm.policy.weights import Put, Weights, common_dtype, network_shapes, refuse_misfit
from pi0fm.progress import say, step
from pi0fm_client.errors import BundleError, ConfigError, OutputError

NUMBERS = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Converted:
    """What was written: where, pi0 or pi05, from and to which form, how many tensors and parameters, the bundle at either end."""

    path: Path
    kind: Kind
    source: str
    target: str
    tensors: int
    parameters: int
    identity: str


def convert(config: ConvertConfig) -> Converted:
    """Convert `source` into `output_dir`.

    Raises BundleError for a source that is missing, damaged, or does not fit, with every key that does not; ConfigError for what
    neither the source nor the options say; OutputError for an output that exists or a disk without room.
    """
    if not config.source.is_dir():
        raise BundleError(f"source must be a directory, found {config.source}; give the one that holds the weights")
    if config.output_dir.exists():
        raise OutputError(f"a conversion writes a new directory, but {config.output_dir} exists; remove it or choose another")
    if (config.source / MANIFEST).is_file():
        return _export(config)
    if config.to != "bundle":
        raise ConfigError(
            f"--to {config.to} starts from a bundle, found foreign weights in {config.source}; convert them to a bundle first"
        )
    if config.robot is not None:
        raise ConfigError(f"--robot chooses among those of a bundle, found foreign weights in {config.source}; leave it out")
    return _import(config)


def _import(config: ConvertConfig) -> Converted:
    """Write foreign weights to a bundle."""
    facts, weights = _open(config.source, config.norm_stats is None)
    layout, kind = layout_of(weights.shapes), _kind(weights, facts)
    model, found = _network(config, facts, weights, layout, kind)
    policy, stats = policy_config(config, facts, model, kind)
    policy.chain(stats)  # refuses widths and tokenizers that do not fit, before anything is written
    wanted = network_shapes(model)
    entries = {
        ours: (wanted[ours], common_dtype([weights.dtypes[part.name] for part in group], NUMBERS[config.dtype]))
        for ours, group in found.items()
    }
    with bundle.new_bundle(config.output_dir, entries, policy, stats) as put:
        _copy(weights, found, wanted, put)
    return _converted(config, kind, facts.peer, len(entries), wanted, config.output_dir)


def _export(config: ConvertConfig) -> Converted:
    """Write a bundle to a peer's directory."""
    if config.to == "bundle":
        raise ConfigError(f"{config.source} is a bundle already; type --to lerobot or --to openpi")
    known = bundle.robot_names(config.source)
    if config.robot is None and len(known) > 1:
        raise ConfigError(f"{config.to} knows one robot a policy, {config.source} holds {', '.join(known)}; choose with --robot {known[0]}")
    policy, stats = bundle.read(config.source, config.robot)
    refuse_what_peers_lack(policy, config.to, config.any_size)
    refuse_other_prompts(policy, config.to, config.prompt_dialect)
    say_other_pictures(policy, config.to)
    numbers = NUMBERS[config.dtype]
    with (
        bundle.open_weights(config.source) as weights,
        files.write_faults(config.output_dir),
        files.new_directory(config.output_dir) as aside,
    ):
        refuse_misfit(weights, policy.model)
        if config.to == "openpi":
            write_openpi(aside, policy, stats)
        else:
            # LeRobot has two words for its mixture of types, and goes by its matrices
            halved = common_dtype([weights.dtypes["decoder.layers.0.action_expert.qkv.weight"]], numbers) == torch.bfloat16
            write_lerobot(aside, policy, stats, config, "bfloat16" if halved else "float32")
        count = write_weights(aside / WEIGHTS, weights, policy, config.to, numbers)
    return _converted(config, kind_of(policy.model), "bundle", count, network_shapes(policy.model), config.source)


def _converted(
    config: ConvertConfig, kind: Kind, source: str, tensors: int, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> Converted:
    """Say and return the result. path: of the bundle at either end."""
    known = identity(path)
    zero = "" if config.to == "bundle" else "; what no output depends on is zero"
    say(f"{config.output_dir}: {kind} from {source} to {config.to}, {tensors} tensors, bundle {known}{zero}")
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Converted(config.output_dir, kind, source, config.to, tensors, parameters, known)


def _open(source: Path, find_stats: bool) -> tuple[ForeignFacts, Weights]:
    """Open a foreign directory: what it says, and its tensors under openpi's names. Remarks on both are said."""
    if is_orbax(source):
        facts, weights, remarks = read_openpi(source, find_stats), open_orbax(source), [""]
    else:
        weights, renamed = open_safetensors(source)
        facts = read_lerobot(source) if is_lerobot(source) else read_openpi(source, find_stats)
        weights, moved = with_one_embedding(weights, facts.ties_embedding)
        remarks = [renamed, moved]
    for line in filter(None, (*facts.remarks, *remarks)):
        say(line)
    return facts, weights


def _kind(weights: Weights, facts: ForeignFacts) -> Kind:
    kinds = kinds_of(weights.shapes)
    if len(kinds) != 1:
        found = "both" if kinds else f"neither among {', '.join(sorted(weights.shapes)[:4])}"
        raise BundleError(
            f"the weights must be of a pi0 (action_time_mlp_in) or a pi0.5 (time_mlp_in), {weights.path} holds {found}; keep one"
        )
    kind = kinds.pop()
    if facts.kind not in (None, kind):
        raise BundleError(
            f"config.json of {weights.path} says {facts.kind}, its weights are those of a {kind}; one of the two is of another policy"
        )
    return kind


def _network(
    config: ConvertConfig, facts: ForeignFacts, weights: Weights, layout: Layout, kind: Kind
) -> tuple[Pi0Config, dict[str, tuple[Part, ...]]]:
    """The network, and which foreign parts make which of its tensors. Raises BundleError with every key that does not fit."""
    # JAX keeps heads as axes of their own
    known = {"N": config.num_heads, "X": config.vision_heads} if layout == "torch" else {}
    if kind == "pi05" and facts.state_dim is not None:
        known["S"] = facts.state_dim
    sizes = tell_sizes(layout, kind, weights.shapes, known)
    wrong = misfit(layout, kind, sizes, weights.shapes)
    if wrong:
        raise BundleError(f"the weights in {weights.path} are not those of one {kind}: {wrong}; nothing was written")
    model = network_config(
        kind,
        sizes,
        action_horizon=config.action_horizon or facts.action_horizon or 50,
        max_prompt_tokens=config.max_prompt_tokens or facts.max_prompt_tokens or PROMPT_TOKENS[kind],
    )
    if facts.image_size not in (None, model.vision.image_size):
        raise BundleError(
            f"config.json of {weights.path} says pictures of {facts.image_size}, its weights are for {model.vision.image_size}; "
            "one of the two is of another policy"
        )
    return model, parts(layout, kind, sizes)


def _copy(weights: Weights, found: Mapping[str, tuple[Part, ...]], wanted: Mapping[str, tuple[int, ...]], put: Put) -> None:
    """Read every foreign tensor once, a layer at a time where layers are stacked in it, and write what it gives of ours."""
    uses: dict[str, dict[tuple[int, ...], list[tuple[str, int, Part]]]] = {}
    for ours, group in found.items():
        first = 0
        for part in group:
            uses.setdefault(part.name, {}).setdefault(part.index, []).append((ours, first, part))
            first += part.count
    with step("reading tensors", len(uses)) as bar:
        for name, entries in uses.items():
            for index, places in sorted(entries.items()):
                entry = weights.read(name, index)
                for ours, first, part in places:
                    put(ours, first, replace(part, index=()).rows(entry, wanted[ours][1:]))
                del entry  # else the next one is read beside it
            bar.advance()
