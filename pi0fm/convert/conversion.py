"""Weights in and out: one directory in, one directory out, every tensor once.

Owns: the order of a conversion, and what is refused before a byte is written. Does not know: any peer's names or files.

    foreign directory -> facts, headers -> kind -> sizes -> misfit? -> configuration, chain -> [tensor, tensor, ...] -> bundle
    bundle            -> config, headers -> can the peer hold it?   ------------------------> [tensor, tensor, ...] -> peer's directory

The kind, pi0 or pi0.5, is told by what the weights hold, never by a path. Everything to the left of the brackets reads headers alone;
the brackets hold one foreign tensor at a time, and the output is written aside and renamed: it is whole or it is not there.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from pi0fm import files, options
from pi0fm.convert.export import kind_of, refuse_other_prompts, refuse_what_peers_lack, write_openpi, write_weights
from pi0fm.convert.export_lerobot import PALIGEMMA, refuse_other_tokens, write_lerobot
from pi0fm.convert.facts import ConvertConfig, ForeignFacts, lengths, policy_config, robot
from pi0fm.convert.lerobot import is_lerobot, read_lerobot
from pi0fm.convert.names import Kind, Layout, kinds_of, layout_of
from pi0fm.convert.openpi import read_openpi
from pi0fm.convert.orbax import is_orbax, open_orbax
from pi0fm.convert.read import Checkpoint, open_safetensors, with_one_embedding
from pi0fm.convert.shapes import Part, misfit, network_config, parts, tell_sizes
from pi0fm.convert.write import Put, common_dtype, tensor_file
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.prompt import BYTES, STATELESS, load_tokenizer
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.policy import bundle
from pi0fm.policy.bundle import PolicyConfig
from pi0fm.progress import say, step
from pi0fm_client.errors import BundleError, ConfigError, OutputError

NUMBERS = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Converted:
    """What was written: where, pi0 or pi05, from and to which form, how many tensors and parameters of the network."""

    path: Path
    kind: Kind
    source: str
    target: str
    tensors: int
    parameters: int


def convert(config: ConvertConfig) -> Converted:
    """Convert `source` into `output_dir`.

    Raises BundleError for a source that is missing, damaged, or does not fit, with every key that does not; ConfigError for what
    neither the source nor the options say; OutputError for an output that exists or a disk without room.
    """
    if not config.source.is_dir():
        raise BundleError(f"source must be a directory, found {config.source}; give the one that holds the weights")
    if config.output_dir.exists():
        raise OutputError(f"a conversion writes a new directory, but {config.output_dir} exists; remove it or choose another")
    if (config.source / "manifest.json").is_file():
        return _leave(config)
    if config.to != "bundle":
        raise ConfigError(
            f"--to {config.to} starts from a bundle, found foreign weights in {config.source}; convert them to a bundle first"
        )
    if config.robot is not None:
        raise ConfigError(f"--robot chooses among those of a bundle, found foreign weights in {config.source}; leave it out")
    return _enter(config)


def _enter(config: ConvertConfig) -> Converted:
    """Foreign weights to a bundle."""
    facts, checkpoint = _open(config.source, config.norm_stats is None)
    checkpoint, remark = with_one_embedding(checkpoint, facts.ties_embedding)
    if checkpoint.removed:
        say(f"taken out of the tensors' names: {', '.join(checkpoint.removed)}")
    for line in (*facts.remarks, remark):
        if line:
            say(line)
    layout, kind = layout_of(checkpoint.shapes), _kind(checkpoint, facts)
    model, found = _network(config, facts, checkpoint, layout, kind)
    robots = robot(config, facts, kind)
    policy = policy_config(config, facts, model, robots, kind)
    if facts.peer == "openpi" and kind == "pi05" and config.prompt_dialect is None:
        say("openpi's weights do not say whether prompts hold the state: they do, unless --prompt_dialect openpi_stateless (pi05_libero)")
    policy.chain(robots[1].stats)  # refuses widths and tokenizers that do not fit, before anything is written
    if robots[1].stand_ins:
        say(f"absent from the statistics, and read by no {policy.normalization}: {', '.join(robots[1].stand_ins)}; neighbours stand in")
    wanted = _shapes(model)
    with files.new_directory(config.output_dir) as aside:
        entries = {
            ours: (wanted[ours], common_dtype([checkpoint.dtypes[part.name] for part in group], NUMBERS[config.dtype]))
            for ours, group in found.items()
        }
        with tensor_file(aside / "model.safetensors", entries) as put:
            _copy(checkpoint, found, wanted, put)
        _finish(aside, policy, robots[1].stats)
    say(f"{config.output_dir}: {kind} from {facts.peer}, {len(entries)} tensors")
    return Converted(config.output_dir, kind, facts.peer, "bundle", len(entries), _count(wanted))


def _leave(config: ConvertConfig) -> Converted:
    """A bundle to a peer's directory."""
    if config.to == "bundle":
        raise ConfigError(f"{config.source} is a bundle already; type --to lerobot or --to openpi")
    known = bundle.robot_names(config.source)
    if config.robot is None and len(known) > 1:
        raise ConfigError(f"{config.to} knows one robot a policy, {config.source} holds {', '.join(known)}; choose with --robot {known[0]}")
    policy, stats = bundle.read(config.source, config.robot)
    refuse_what_peers_lack(policy, config.to, config.any_size)
    refuse_other_prompts(policy, config.to, config.prompt_dialect)
    weights = _bundle_weights(config.source, policy.model)
    stand_ins = tuple(name for name in policy.training.get("stand_in_statistics", "").split(",") if name)
    place = policy.tokenizer if policy.tokenizer == BYTES else str(config.source / policy.tokenizer)
    tokenizer = load_tokenizer(place, policy.model.vocab_size)
    wanted, numbers = _shapes(policy.model), NUMBERS[config.dtype]
    with files.new_directory(config.output_dir) as aside:
        if config.to == "openpi":
            write_openpi(aside, policy, stats, stand_ins)
            if policy.prompt_dialect == STATELESS:
                say("openpi must be told that no prompt holds the state: discrete_state_input=False in its configuration")
        else:
            refuse_other_tokens(tokenizer, policy.model.max_prompt_tokens)
            tokenizer.save_pretrained(aside / "tokenizer")
            own = str((config.output_dir / "tokenizer").resolve())
            name = config.tokenizer_name or (PALIGEMMA if policy.model.vocab_size == 257_152 else own)
            # LeRobot has two words for its mixture of types, and goes by its matrices
            halved = common_dtype([weights.dtypes["decoder.layers.0.action_expert.qkv.weight"]], numbers) == torch.bfloat16
            write_lerobot(aside, policy, stats, name, "bfloat16" if halved else "float32", stand_ins)
            say(f"LeRobot will look for the tokenizer at {name}")
        count = write_weights(aside / "model.safetensors", weights, policy, config.to, numbers)
    kind = kind_of(policy.model)
    say(f"{config.output_dir}: {kind} for {config.to}, {count} tensors; what no output depends on is zero")
    return Converted(config.output_dir, kind, "bundle", config.to, count, _count(wanted))


def _open(source: Path, find_stats: bool) -> tuple[ForeignFacts, Checkpoint]:
    if is_orbax(source):
        return read_openpi(source, find_stats), open_orbax(source)
    checkpoint = open_safetensors(source)
    return (read_lerobot(source) if is_lerobot(source) else read_openpi(source, find_stats)), checkpoint


def _kind(checkpoint: Checkpoint, facts: ForeignFacts) -> Kind:
    kinds = kinds_of(checkpoint.shapes)
    if len(kinds) != 1:
        found = "both" if kinds else f"neither among {', '.join(sorted(checkpoint.shapes)[:4])}"
        raise BundleError(
            f"the weights must be of a pi0 (action_time_mlp_in) or a pi0.5 (time_mlp_in), {checkpoint.path} holds {found}; keep one"
        )
    kind = kinds.pop()
    if facts.kind not in (None, kind):
        raise BundleError(
            f"config.json of {checkpoint.path} says {facts.kind}, its weights are those of a {kind}; one of the two is of another policy"
        )
    return kind


def _network(
    config: ConvertConfig, facts: ForeignFacts, checkpoint: Checkpoint, layout: Layout, kind: Kind
) -> tuple[Pi0Config, dict[str, tuple[Part, ...]]]:
    """The network, and which foreign parts make which of its tensors. Raises BundleError with every key that does not fit."""
    # JAX keeps heads as axes of their own
    known = {"N": config.num_heads, "X": config.vision_heads} if layout == "torch" else {}
    if kind == "pi05" and facts.state_dim is not None:
        known["S"] = facts.state_dim
    sizes = tell_sizes(layout, kind, checkpoint.shapes, known)
    wrong = misfit(layout, kind, sizes, checkpoint.shapes)
    if wrong:
        raise BundleError(f"the weights in {checkpoint.path} are not those of one {kind}: {wrong}; nothing was written")
    model = network_config(kind, sizes, **lengths(config, facts, kind))
    if facts.image_size not in (None, model.vision.image_size):
        raise BundleError(
            f"config.json of {checkpoint.path} says pictures of {facts.image_size}, its weights are for {model.vision.image_size}; "
            "one of the two is of another policy"
        )
    return model, parts(layout, kind, sizes)


def _copy(checkpoint: Checkpoint, found: Mapping[str, tuple[Part, ...]], wanted: Mapping[str, tuple[int, ...]], put: Put) -> None:
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
                entry = checkpoint.read(name, index)
                for ours, first, part in places:
                    put(ours, first, replace(part, index=()).rows(entry, wanted[ours][1:]))
                del entry  # else the next one is read beside it
            bar.advance()


def _bundle_weights(path: Path, model: Pi0Config) -> Checkpoint:
    """A bundle's own weights, held against its network."""
    weights = open_safetensors(path)
    wanted = _shapes(model)
    if dict(weights.shapes) != wanted:
        odd = sorted(name for name in wanted.keys() | weights.shapes.keys() if wanted.get(name) != weights.shapes.get(name))
        raise BundleError(f"the weights in {path} do not fit its configuration: {', '.join(odd)}; copy the bundle again")
    return weights


def _finish(aside: Path, policy: PolicyConfig, stats: NormStats) -> None:
    """Write everything of a bundle but its weights, the manifest last; the same files as `bundle.save`."""
    if policy.tokenizer != BYTES:
        load_tokenizer(policy.tokenizer, policy.model.vocab_size).save_pretrained(aside / "tokenizer")
        policy = replace(policy, tokenizer="tokenizer")
    versions = {name: version(name) for name in ("pi0fm", "torch", "transformers")}
    files.write_json(aside / "config.json", {"format": bundle.FORMAT, "policy": options.encode(policy), "versions": versions})
    files.write_json(aside / "norm_stats.json", stats.to_json())
    listed = {str(file.relative_to(aside)): _described(file) for file in sorted(aside.rglob("*")) if file.is_file()}
    files.write_json(aside / "manifest.json", {"format": bundle.FORMAT, "files": listed})


def _described(file: Path) -> dict[str, int | str]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


@lru_cache(maxsize=2)
def _shapes(model: Pi0Config) -> Mapping[str, tuple[int, ...]]:
    """Of every tensor of the network; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Pi0(model).state_dict().items()}


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
