"""The data set of a run, or all those of its mixture: training batches, held-out episodes, and the bundle's facts about each.

Owns: `RunData` and the order in which it is opened. Does not know: the network that trains, steps, workers.

    entry A: columns -> filters -> held-out episodes -> statistics -> chain    all that can be refused for any entry is refused here,
    entry B: the same                                                          before a video is decoded
    then A: frame cache or stream -> batches;  B: the same;  both dealt by weight into one stream (data/loading/mixture.py)

A run without a mixture has one unnamed entry, and only the order of its data set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pi0fm import progress
from pi0fm.data.chain import Chain
from pi0fm.data.checks import picture_faults, prompt_faults
from pi0fm.data.columns import held_out
from pi0fm.data.columns.faults import refuse
from pi0fm.data.columns.lerobot_source import LeRobotSource, leave_out, open_source
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.config import MixtureEntry
from pi0fm.data.loading.loader import BatchMaker, Collator
from pi0fm.data.loading.mixture import MixtureCollator, entry_named, part_seed, sample_order
from pi0fm.data.normalization import scale_notices
from pi0fm.data.order.orders import Weighted
from pi0fm.data.pictures.frame_cache import cache_bytes
from pi0fm.data.pictures.resizing import ANTIALIAS
from pi0fm.data.pictures.streaming import open_pictures
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.policy.saved.robots import Robot
from pi0fm.train.checkpoint.facts import data_facts
from pi0fm.train.config import TrainConfig
from pi0fm.train.start.pretrained import (
    Pretrained,
    open_pretrained,
    pretrained_stats,
    refuse_other_policy,
    resolve_dialect,
    resolve_tokenizer,
)
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Observation


@dataclass(frozen=True)
class RunDataset:
    """One data set of a run.

    policy: its facts in the bundle; held_out: episodes that are not trained on, 0 or more; order: by sample weights, if it has any.
    """

    name: str
    policy: PolicyConfig
    stats: NormStats
    training: Collator
    held_out: Collator
    order: Weighted | None = None

    def describe(self) -> str:
        """Format the number of frames, and of those held out."""
        held = len(self.held_out.source.frames)
        return f"{len(self.training.source.frames)} frames" + (f" ({held} more are held out)" if held else "")


@dataclass(frozen=True)
class RunData:
    """All data sets of a run, opened. training: batches drawn from all of them."""

    parts: tuple[RunDataset, ...]
    training: BatchMaker
    pretrained: Pretrained | None

    @property
    def policy(self) -> PolicyConfig:
        """Policy of the first entry; all entries share its network, flow and normalisation."""
        return self.parts[0].policy

    @property
    def num_cameras(self) -> int:
        """Pictures of a sample that the network is given, masked ones too."""
        return len({camera for part in self.parts for camera in part.policy.embodiment.cameras})

    def held_out(self) -> dict[str, Collator]:
        """Return the held-out episodes by entry."""
        return {part.name: part.held_out for part in self.parts}

    def robots(self) -> dict[str, tuple[Robot, NormStats]]:
        """Return robot and statistics of each mixture entry for the bundle; empty without a mixture, whose bundle holds one robot."""
        if not isinstance(self.training, MixtureCollator):
            return {}
        return {part.name: (_robot(part.policy), part.stats) for part in self.parts}

    def recorded(self) -> Observation:
        """Return one observation of the first data set as the network sees it, from a held-out episode if there is one."""
        unseen = self.parts[0].held_out
        made = unseen if len(unseen.source.frames) else self.parts[0].training
        source, place = made.source, made.source.frames[len(made.source.frames) // 2]
        return source.observation(int(place), made.cache.gather(np.array([place]))[0])

    def facts(self) -> dict[str, Any]:
        """Return the facts about the data for a checkpoint, those of a mixture entry under `mixture.NAME.`."""
        return {
            f"mixture.{part.name}.{name}" if part.name else name: value
            for part in self.parts
            for name, value in data_facts(part.training.source, part.stats, part.order).items()
        }

    def left_out(self) -> dict[str, list[str]]:
        """Return by entry the chosen episodes that are not trained on, each with its reason; entries without any are absent."""
        return {part.name: [str(fault) for fault in part.training.source.left_out] for part in self.parts if part.training.source.left_out}

    def describe(self) -> str:
        """Format the data sets: frames; for a mixture also each entry's share of the samples and control rate."""
        if not isinstance(self.training, MixtureCollator):
            return self.parts[0].describe()
        each = zip(self.parts, shares(self.training.weights), strict=True)
        return ", ".join(f"{part.name} {share} of samples from {part.describe()} at {part.policy.fps:g} fps" for part, share in each)


def check_data(config: TrainConfig) -> "CheckedData":
    """Read the columns of a run's data sets, and refuse all that can be refused before a video is decoded.

    Raises the errors of data sets and configuration; with a mixture they name the entry.
    """
    pretrained = open_pretrained(config.pretrained)
    dialect = resolve_dialect(config.prompt_dialect, pretrained)
    config = replace(config, tokenizer=resolve_tokenizer(config.tokenizer, pretrained), prompt_dialect=dialect)
    opened = _in_one_order_of_cameras({name: _read(name, entry) for name, entry in config.entries().items()})
    parts = tuple(_check_entry(config, name, number, source, pretrained) for number, (name, source) in enumerate(opened.items()))
    return CheckedData(config, parts, pretrained)


def open_data(config: TrainConfig, checked: "CheckedData | None" = None) -> RunData:
    """Open the data sets of a run, and decode the pictures that are not decoded yet. checked: result of `check_data`.

    Raises what `check_data` raises.
    """
    checked = checked or check_data(config)
    parts = tuple(_with_pictures(checked.config, number, found) for number, found in enumerate(checked.parts))
    if not config.mixture:
        return RunData(parts, parts[0].training, checked.pretrained)
    weights = tuple(entry.weight for entry in config.mixture.values())
    return RunData(parts, MixtureCollator(tuple(part.training for part in parts), weights), checked.pretrained)


def policy_config(config: TrainConfig, source: LeRobotSource, held: tuple[int, ...] = ()) -> PolicyConfig:
    """Return the policy configuration for this run's bundle, resolved against its data set. held: held-out episodes."""
    facts = {"repo_id": source.repo_id, "dataset": str(source.root), "dataset_fingerprint": source.fingerprint}
    if config.pretrained is not None:
        facts["pretrained"] = str(config.pretrained)
    if config.train_only != "full" or config.lora.rank:
        facts["trained"] = config.train_only + (f", lora of rank {config.lora.rank}" if config.lora.rank else "")
    if source.left_out:
        facts["left_out_episodes"] = ", ".join(left_out(source))
    if held:
        facts["held_out_episodes"] = ",".join(map(str, held))
    if config.mixture:
        each = zip(config.mixture, shares([entry.weight for entry in config.mixture.values()]), strict=True)
        facts["mixture"] = ", ".join(f"{name} {share}" for name, share in each)
    return PolicyConfig(
        model=config.network(),
        flow=config.flow,
        embodiment=source.embodiment,
        normalization=config.normalization,
        norm_floor=config.norm_floor,
        resize=config.resize or ANTIALIAS,
        tokenizer=config.tokenizer,
        prompt_dialect=config.prompt_dialect,
        execution_horizon=config.execution_horizon,
        rtc_max_delay=config.rtc.max_delay,
        fps=source.fps,
        demonstration_seeds=source.demonstration_seeds,
        camera_sources=config.camera_sources or source.camera_sources,
        training={**facts, "steps": str(config.steps), "global_batch_size": str(config.global_batch_size), "seed": str(config.seed)},
    )


def left_out(source: LeRobotSource) -> list[str]:
    """Format `NUMBER (KIND)` for every chosen episode that is not trained on."""
    kinds = {fault.episode: fault.kind for fault in reversed(source.left_out)}
    return [f"{episode} ({kinds[episode]})" for episode in sorted(kinds, key=lambda number: number or 0)]


def shares(weights: Sequence[float]) -> list[str]:
    """Format each weight as a percentage of their sum."""
    return [f"{100 * weight / sum(weights):.1f} %" for weight in weights]


@dataclass(frozen=True)
class _CheckedEntry:
    """Entry whose columns were read and fit the network; its pictures were not opened."""

    name: str
    entry: MixtureEntry
    policy: PolicyConfig
    stats: NormStats
    chain: Chain
    order: Weighted | None
    source: LeRobotSource
    unseen: LeRobotSource


@dataclass(frozen=True)
class CheckedData:
    """All data sets of a run without their pictures. config: with the bundle's tokenizer and dialect put in for `pretrained`."""

    config: TrainConfig
    parts: tuple[_CheckedEntry, ...]
    pretrained: Pretrained | None

    @property
    def num_cameras(self) -> int:
        """Pictures of a sample that the network is given, masked ones too."""
        return len({camera for part in self.parts for camera in part.policy.embodiment.cameras})


def _read(name: str, entry: MixtureEntry) -> LeRobotSource:
    with entry_named(name):
        return open_source(entry.dataset, entry.embodiment, entry.selection())


def _in_one_order_of_cameras(sources: Mapping[str, LeRobotSource]) -> dict[str, LeRobotSource]:
    """Order each robot's cameras as in the mixture: the network is given them in that order in training, and when the robot is served."""
    order = dict.fromkeys(camera for source in sources.values() for camera in source.embodiment.cameras)

    def arranged(source: LeRobotSource) -> LeRobotSource:
        cameras = source.embodiment.cameras
        return replace(source, embodiment=replace(source.embodiment, cameras={name: cameras[name] for name in order if name in cameras}))

    return {name: arranged(source) for name, source in sources.items()}


def _check_entry(config: TrainConfig, name: str, number: int, recorded: LeRobotSource, pretrained: Pretrained | None) -> _CheckedEntry:
    """Check an entry, its prompts and its videos; bad episodes are refused, or left out under `skip_bad`.

    Building a cache decodes every picture, so without `skip_bad` only the videos of a stream are checked here.
    """
    found = _check_columns(config, name, number, recorded, pretrained)
    dataset, size = found.entry.dataset, found.policy.model.vision.image_size
    streamed = cache_bytes(recorded, size, dataset.cache_format) > dataset.cache_limit_gib * 2**30
    with entry_named(name):
        faults = prompt_faults(recorded, found.chain)
        if dataset.skip_bad or (streamed and not recorded.stored_pictures):
            faults += picture_faults(recorded, dataset, "all" if dataset.skip_bad == "all" else "ends")
        if not dataset.skip_bad:
            refuse(faults, recorded.root)
        left = leave_out(recorded, faults)
    return found if left is recorded else _check_columns(config, name, number, left, pretrained)


def _check_columns(config: TrainConfig, name: str, number: int, recorded: LeRobotSource, pretrained: Pretrained | None) -> _CheckedEntry:
    entry = config.entries()[name]
    with entry_named(name):
        held = held_out.choose_held_out(recorded, config.validation.episodes, part_seed(config.seed, number))
        source, unseen = held_out.split(recorded, held)
        policy = policy_config(config, source, held)
        if pretrained is not None:
            policy = replace(policy, padded_noise=pretrained.policy.padded_noise, resize=config.resize or pretrained.policy.resize)
        if entry.camera_sources:
            policy = replace(policy, camera_sources=entry.camera_sources)
        if pretrained is not None:
            refuse_other_policy(pretrained, policy)
        if pretrained is not None and config.pretrained_norm_stats:
            stats = pretrained_stats(pretrained, name, policy)
            rules = ("norm_rule", "norm_floor", "norm_epsilon")
            policy = replace(policy, **{each: getattr(pretrained.policy, each) for each in rules})
        else:
            stats = source.norm_stats(policy.model.action_horizon)
            policy = _report_scales(policy, stats)
        return _CheckedEntry(name, entry, policy, stats, policy.chain(stats), sample_order(source, entry), source, unseen)


def _report_scales(policy: PolicyConfig, stats: NormStats) -> PolicyConfig:
    """Print which dimensions are not scaled by their statistics, and note them in the bundle."""
    columns = {"state": stats.state, "action": stats.action}
    unusual_scales = [
        text for name, column in columns.items() for text in scale_notices(column, policy.normalization, policy.norm_floor, name)
    ]
    if not unusual_scales:
        return policy
    line = "; ".join(unusual_scales)
    progress.say(f"normalization {policy.normalization}: {line}")
    return replace(policy, training={**policy.training, "normalization": line})


def _with_pictures(config: TrainConfig, number: int, found: _CheckedEntry) -> RunDataset:
    model, dataset = found.policy.model, found.entry.dataset
    with entry_named(found.name):
        cache = open_pictures(
            found.source,
            dataset,
            model.vision.image_size,
            config.global_batch_size,
            dataset.cache_format,
            dataset.stream_buffer_gib,
            found.policy.resize,
        )
        if len(found.unseen.frames) and cache.look_ahead:
            raise ConfigError(
                "held-out episodes need every picture at hand, but this data set is streamed; raise --dataset.cache_limit_gib"
            )
        collator = Collator(
            found.source,
            cache,
            found.chain,
            model.action_horizon,
            model.action_dim,
            part_seed(config.seed, number),
            config.flow_draws_per_observation,
            augmentation=config.augmentation if config.augment else None,
            order=found.order,
            padded_noise=found.policy.padded_noise,
            max_delay=config.rtc.max_delay,
        )
    unseen = replace(collator, source=found.unseen, augmentation=None, order=None, max_delay=0)
    return RunDataset(found.name, found.policy, found.stats, collator, unseen, found.order)


def _robot(policy: PolicyConfig) -> Robot:
    return Robot(policy.embodiment, policy.fps, policy.demonstration_seeds, policy.camera_sources, policy.training)
