"""Conversion of weights: one directory in, one directory out, every tensor read once.

Owns: the order of a conversion, and the checks before any write. Does not know: any peer's names or files.

    foreign directory -> facts, headers -> kind -> sizes -> mismatch? -> configuration, chain -> [tensor, tensor, ...] -> bundle
    bundle            -> config, headers -> can the peer hold it?   ------------------------> [tensor, tensor, ...] -> peer's directory

The weights decide whether a policy is pi0 or pi0.5, never a path. Everything left of the brackets reads only headers; the brackets hold
one foreign tensor at a time; the output is written under a temporary name and renamed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pi0fm import files
from pi0fm.convert.config import ConvertConfig
from pi0fm.convert.export import kind_of, refuse_other_prompts, refuse_what_peers_lack, report_resizing, write_weights
from pi0fm.convert.export_lerobot import write_lerobot
from pi0fm.convert.facts import DTYPES, PROMPT_TOKENS, ForeignFacts, policy_config
from pi0fm.convert.lerobot import is_lerobot, read_lerobot
from pi0fm.convert.names import Kind, kinds_of, layout_of
from pi0fm.convert.openpi import read_openpi, write_openpi
from pi0fm.convert.orbax import is_orbax, open_orbax
from pi0fm.convert.read import open_safetensors, with_one_embedding
from pi0fm.convert.shapes import ForeignPart, describe_mismatch, infer_sizes, network_config, parts
from pi0fm.models.config import Pi0Config
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.manifest import MANIFEST, WEIGHTS, identity, instead_of
from pi0fm.policy.saved.weights import Put, Weights, common_dtype, network_shapes, refuse_wrong_weights
from pi0fm.progress import say, step
from pi0fm_client.errors import BundleError, ConfigError, OutputError


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion. source, target: bundle or the peer's name. identity: of the bundle, source or target."""

    path: Path
    kind: Kind
    source: str
    target: str
    tensors: int
    parameters: int
    identity: str


def convert(config: ConvertConfig) -> ConversionResult:
    """Convert `source` into `output_dir`.

    Raises BundleError for a source that is missing, damaged or does not fit, with every key that does not; ConfigError for a fact that
    neither source nor options give; OutputError for an output that exists or a full disk.
    """
    if not config.source.is_dir():
        raise BundleError(
            f"source must be a directory, found {config.source}; {instead_of(config.source, 'give the one that holds the weights')}"
        )
    files.refuse_name(config.output_dir)
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


def _import(config: ConvertConfig) -> ConversionResult:
    facts, weights = _open(config.source, config.norm_stats is None)
    kind = _kind(weights, facts)
    model, found = _network(config, facts, weights, kind)
    policy, stats = policy_config(config, facts, model, kind)
    if not policy.is_base:
        policy.chain(stats)  # refuses widths and tokenizers that do not fit
    wanted = network_shapes(model)
    entries = {
        ours: (wanted[ours], common_dtype([weights.dtypes[part.name] for part in group], DTYPES[config.dtype]))
        for ours, group in found.items()
    }
    with bundle.new_bundle(config.output_dir, entries, policy, stats) as put:
        _copy(weights, found, wanted, put)
    return _converted(config, kind, facts.peer, len(entries), wanted, config.output_dir)


def _export(config: ConvertConfig) -> ConversionResult:
    if config.to == "bundle":
        raise ConfigError(f"{config.source} is a bundle already; type --to lerobot or --to openpi")
    known = bundle.robot_names(config.source)
    if config.robot is None and len(known) > 1:
        raise ConfigError(f"{config.to} knows one robot a policy, {config.source} holds {', '.join(known)}; choose with --robot {known[0]}")
    policy, stats = bundle.read(config.source, config.robot)
    policy.refuse_base(config.source)
    refuse_what_peers_lack(policy, config.to, config.any_size)
    refuse_other_prompts(policy, config.to, config.prompt_dialect)
    report_resizing(policy, config.to)
    dtype = DTYPES[config.dtype]
    with (
        bundle.open_weights(config.source) as weights,
        files.write_faults(config.output_dir),
        files.new_directory(config.output_dir) as aside,
    ):
        refuse_wrong_weights(weights, policy.model)
        if config.to == "openpi":
            write_openpi(aside, policy, stats)
        else:
            matrices = common_dtype([weights.dtypes["decoder.layers.0.action_expert.qkv.weight"]], dtype)
            write_lerobot(aside, policy, stats, config, "bfloat16" if matrices == torch.bfloat16 else "float32")
        count = write_weights(aside / WEIGHTS, weights, policy, config.to, dtype)
    return _converted(config, kind_of(policy.model), "bundle", count, network_shapes(policy.model), config.source)


def _converted(
    config: ConvertConfig, kind: Kind, source: str, tensors: int, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> ConversionResult:
    """Print and return the result. path: of the bundle, source or target."""
    known = identity(path)
    zero = "" if config.to == "bundle" else "; tensors that no output depends on are zero"
    say(f"{config.output_dir}: {kind} from {source} to {config.to}, {tensors} tensors, bundle {known}{zero}")
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return ConversionResult(config.output_dir, kind, source, config.to, tensors, parameters, known)


def _open(source: Path, find_stats: bool) -> tuple[ForeignFacts, Weights]:
    """Open a foreign directory: its facts, and its tensors under openpi's names; print remarks about both."""
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
    config: ConvertConfig, facts: ForeignFacts, weights: Weights, kind: Kind
) -> tuple[Pi0Config, dict[str, tuple[ForeignPart, ...]]]:
    """Return the network and the foreign parts of each of its tensors. Raises BundleError that lists every key that does not fit."""
    layout = layout_of(weights.shapes)
    # in JAX's layout heads are an axis
    known = {"N": config.num_heads, "X": config.vision_heads} if layout == "torch" else {}
    if kind == "pi05" and facts.state_dim is not None:
        known["S"] = facts.state_dim
    sizes = infer_sizes(layout, kind, weights.shapes, known)
    wrong = describe_mismatch(layout, kind, sizes, weights.shapes)
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


def _copy(weights: Weights, found: Mapping[str, tuple[ForeignPart, ...]], wanted: Mapping[str, tuple[int, ...]], put: Put) -> None:
    """Read every foreign tensor once, one layer at a time if it stacks layers, and write the parts of our tensors that it holds."""
    uses: dict[str, dict[tuple[int, ...], list[tuple[str, int, ForeignPart]]]] = {}
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
                del entry  # before the next one is read
            bar.advance()
