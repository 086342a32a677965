"""Rows of a data set as a policy's network sees them, and their faults.

Owns: `NetworkRows`, the checks of columns, statistics, prompts and pictures. Does not know: simulators,
servers, the sheet (doctor/sheet.py).
Shape letters: N rows whose numbers are judged, M moments with pictures, C cameras, H action horizon, S state dim, A robot action dim.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.chain import Chain, Sample
from pi0fm.data.checks import prompt_faults
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.columns.metadata import read_info
from pi0fm.data.columns.norm_stats import ColumnStats, NormStats
from pi0fm.data.config import DatasetConfig
from pi0fm.data.loading.loader import action_chunks
from pi0fm.data.normalization import constant_dimensions, scale_notices
from pi0fm.data.pictures.chosen import pictures_at
from pi0fm.doctor.finding import Finding, Severity
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm_client.types import Observation

MOST_ROWS, EPISODES, PER_EPISODE = 20_000, 8, 4
FAR = 6.0  # in the network's units, where most numbers are within 1 or 3
BLOWN_UP, SQUASHED = 30.0, 0.02
MANY = 0.05  # of the rows
FOREIGN_SHIFT, FOREIGN_RATIO = 1.5, 4.0
UNITS = 15.0  # ratio between episodes: degrees to radians is 57, centimetres to metres 100
DARK, FLAT = 8.0, 2.0  # of 255


@dataclass(frozen=True)
class NetworkRows:
    """State [N, S] and actions [N, H, A] before and after the chain (normal_*), real [N, H] False past an episode's end.

    place [M], pictures [M, C, size, size, 3], texts and tokens [M]: each prompt and its number of tokens.
    """

    source: LeRobotSource
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    real: NDArray[np.bool_]
    normal_state: NDArray[np.float32]
    normal_actions: NDArray[np.float32]
    place: NDArray[np.int64]
    pictures: NDArray[np.uint8]
    texts: tuple[str, ...]
    tokens: tuple[int, ...]

    def observation(self, number: int) -> Observation:
        """Return the observation of a moment."""
        return self.source.observation(int(self.place[number]), self.pictures[number])

    def columns(self) -> Iterator[tuple[str, tuple[str, ...], NDArray[np.float32], NDArray[np.float32]]]:
        """Yield (state or action, names of the dimensions, robot units [n, dim], network's units [n, dim])."""
        own = self.source.embodiment
        yield "state", own.labels(own.state, self.state.shape[-1]), self.state, self.normal_state
        yield "action", own.labels(own.action, self.actions.shape[-1]), self.actions[self.real], self.normal_actions[self.real]


def read_network_rows(source: LeRobotSource, dataset: DatasetConfig, chain: Chain, horizon: int) -> NetworkRows:
    """Read rows evenly spread over the data set, and moments with pictures of EPISODES episodes."""
    state_dim, action_dim = source.state.shape[1], source.action.shape[1]
    rows = np.unique(np.linspace(0, len(source.rows) - 1, min(MOST_ROWS, len(source.rows))).round().astype(np.int64))
    actions, real = action_chunks(source.action, source.end, rows, horizon)
    normal = chain.forward(Sample(source.state[rows], actions))
    assert normal.actions is not None
    first = source.starts
    looked = first[np.unique(np.linspace(0, len(first) - 1, EPISODES).round().astype(int))]
    spread = [np.unique(np.linspace(begin, source.end[begin] - 1, PER_EPISODE).round().astype(np.int64)) for begin in looked.tolist()]
    place = np.concatenate(spread)
    states = chain.forward(Sample(source.state[place], None)).state[:, :state_dim]
    prompts = [source.tasks[number] for number in source.task[place]]
    prompted = [(prompt, state) for prompt, state in zip(prompts, states, strict=True) if prompt.strip()]
    return NetworkRows(
        source,
        source.state[rows],
        actions,
        real,
        normal.state[:, :state_dim],
        normal.actions[..., :action_dim],
        place,
        pictures_at(source, dataset, place, chain.image_size, chain.resize),
        tuple(chain.tokenizer.text(*each) for each in prompted),
        tuple(chain.tokenizer.length(*each) for each in prompted),
    )


def batch_findings(seen: NetworkRows, policy: PolicyConfig, stats: NormStats, chain: Chain, trained_here: bool) -> list[Finding]:
    """Judge a data set against a policy's statistics. trained_here: the statistics were computed from this data set."""
    found = [*_named(seen.source), *_columns(seen), *_relative(seen), *_units(seen.source), *_scales(seen, trained_here)]
    if not trained_here:
        found += _foreign(stats, seen.source.norm_stats(policy.model.action_horizon), seen.source)
    for name, column in (("state", stats.state), ("action", stats.action)):
        for text in scale_notices(column, policy.normalization, policy.norm_floor, name):
            if not text.endswith("never moves"):
                found.append(Finding("warning", "degenerate statistics", text, "look at that column, or type --normalization z_score"))
    prompts = {
        fault.text.partition(": ")[2]: Finding("error", "prompt", fault.text, fault.remedy) for fault in prompt_faults(seen.source, chain)
    }
    return [*found, *prompts.values(), *_pictures(seen), *_camera_names(seen.source.embodiment.cameras)]


def _named(source: LeRobotSource) -> Iterator[Finding]:
    """Report names of dimensions that differ from the policy's, or their order."""
    own, here = source.embodiment, read_info(source.root, source.repo_id).names
    for word, names, column in (("state", own.state_names, own.state), ("action", own.action_names, own.action)):
        theirs = here.get(column, names)
        if names and theirs != names:
            order = sorted(theirs) == sorted(names)
            place = next(number for number, pair in enumerate(zip(names, theirs, strict=True)) if pair[0] != pair[1])
            text = (
                f"the {word}'s dimensions must be the policy's {'in their order' if order else 'by name'}, found dimension {place} to be "
                f"{theirs[place]!r}, which is {names[place]!r} of the policy"
            )
            remedy = "reorder the columns" if order else f"compare both lists; if they mean the same, type --embodiment.{word}_names"
            yield Finding("error" if order else "warning", "names", text, remedy)


def _columns(seen: NetworkRows) -> Iterator[Finding]:
    for name, dims, values, _ in seen.columns():
        low, high = values.min(0), values.max(0)
        still = high - low <= 1e-6 * np.maximum(np.abs(low), np.abs(high))
        if still.all():
            text = f"the {name} must change with time, found the same numbers in every row: {_numbers(low)}"
            yield Finding("error", f"dead {name}", text, f"type --embodiment.{name} COLUMN of what the robot sends, or record again")
        elif still.any():
            yield Finding("warning", f"dead {name}", f"{name} {_these(dims, still)} never changes", "leave it if that joint is fixed")
        if name == "action":
            span = np.where(still, 1, high - low)
            ends = (values <= low + 0.005 * span) | (values >= high - 0.005 * span)
            at_end, switch = ends.mean(0), _two_valued(values, low, span)
            held = (at_end > 0.5) & ~still & ~switch
            if held.any():
                share = f"{100 * at_end[held].max():.0f} %"
                text = f"action {_these(dims, held)} is at an end of its range in {share} of the rows: commands were cut off"
                yield Finding("warning", "saturated action", text, "record with a larger range, or slower")


def _two_valued(values: NDArray[np.float32], low: NDArray[np.float32], span: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Find the switches, such as a gripper that is open or closed: bool [A]."""
    between = np.abs((values - low) / span - 0.5) < 0.49
    return np.asarray(between.mean(0) < 0.02)


def _relative(seen: NetworkRows) -> Iterator[Finding]:
    """Report dimensions trained as differences whose differences spread wider than the values, which positions do not."""
    source, listed = seen.source, list(seen.source.embodiment.delta_dims)
    shared = min(source.state.shape[1], source.action.shape[1])
    near = source.action[:, :shared] - source.state[:, :shared]
    moving = source.action[:, :shared].std(0) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        wider = near.std(0) / source.action[:, :shared].std(0)
    dims = source.embodiment.labels(source.embodiment.action, source.action.shape[1])
    wrong = np.array([dim in listed for dim in range(shared)]) & moving & (wider > 1.5)
    if wrong.any():
        text = (
            f"delta_actions are positions that the state has too, but {_these(dims, wrong)} less the state spreads "
            f"{wider[wrong].max():.1f} times wider than it does"
        )
        remaining = _typed(source, [dim for dim in listed if not wrong[dim]])
        yield Finding(
            "error", "relative action", text, f"such an action is a difference already; type --embodiment.delta_actions {remaining}"
        )
    tracked = moving & (wider < 0.3)
    if tracked.sum() > shared / 2 and not listed:
        text = f"action {_these(dims, tracked)} follows the state: absolute positions, trained as they are"
        typed = _typed(source, np.flatnonzero(tracked).tolist())
        yield Finding("note", "absolute action", text, f"differences often train better: --embodiment.delta_actions {typed}")


def _typed(source: LeRobotSource, dims: Sequence[int]) -> str:
    """Write dimensions of the action as they are typed: their names where state and action share them, else their numbers."""
    actions, states = source.embodiment.action_names, source.embodiment.state_names
    named = [
        actions[dim] for dim in dims if actions and states[dim : dim + 1] == (actions[dim],) and re.fullmatch(r"[\w.-]+", actions[dim])
    ]
    return ",".join(named if len(named) == len(dims) else map(str, dims)) or "[]"


def _units(source: LeRobotSource) -> Iterator[Finding]:
    """Report episodes whose numbers are many times those of the others in most moving dimensions: other units."""
    begins = source.starts
    if len(begins) < 2:
        return
    counts = source.end[begins] - begins
    for name, values in (("state", source.state), ("action", source.action)):
        size = np.sqrt(np.add.reduceat(values.astype(np.float64) ** 2, begins, axis=0) / counts[:, None])  # [episodes, dim]
        used = (size > 0).all(0)
        if not used.any():
            continue
        times = np.median(size[:, used] / np.median(size[:, used], axis=0), axis=1)
        other = np.flatnonzero(np.maximum(times, 1 / times) > UNITS)
        if len(other):
            numbers = source.episode[begins[other]].tolist()
            factor = float(np.max(np.maximum(times[other], 1 / times[other])))
            text = (
                f"all episodes must be in one unit, found the {name} of episodes {str(numbers)[1:-1]:.80} {factor:.0f} times apart "
                "from the others"
            )
            yield Finding("error", "units", text, "convert them, or type --dataset.episodes without them, or a mixture of two data sets")


def _scales(seen: NetworkRows, trained_here: bool) -> Iterator[Finding]:
    """Report normalised numbers far outside the network's range, or squashed to a point of it."""
    remedy = (
        "the scales are too narrow or wide: type --normalization z_score"
        if trained_here
        else "take statistics of this robot: train on this data set"
    )
    for name, dims, values, normal in seen.columns():
        largest, far = np.abs(normal).max(0), (np.abs(normal) > FAR).mean(0)
        bad = (largest > BLOWN_UP) | (far > MANY)
        if bad.any():
            text = f"{name} {_these(dims, bad)} reaches {largest[bad].max():.3g} in the network's units, where most numbers are within 3"
            yield Finding("error", "scale", text, remedy)
        moving = values.max(0) > values.min(0)
        squashed = moving & (normal.std(0) < SQUASHED)
        if squashed.any():
            least = normal.std(0)[squashed].min()
            text = f"{name} {_these(dims, squashed)} moves, but keeps a deviation of {least:.2g} in the network's units"
            yield Finding("error", "scale", text, remedy)


def _foreign(stats: NormStats, own: NormStats, source: LeRobotSource) -> Iterator[Finding]:
    for name, ours, theirs, column in (
        ("state", stats.state, own.state, source.embodiment.state),
        ("action", stats.action, own.action, source.embodiment.action),
    ):
        spread = np.maximum(ours.std, 1e-6)
        shift, ratio = np.abs(ours.mean - theirs.mean) / spread, np.maximum(theirs.std, 1e-6) / spread
        bad = ~constant_dimensions(theirs) & ((shift > FOREIGN_SHIFT) | (ratio > FOREIGN_RATIO) | (ratio < 1 / FOREIGN_RATIO))
        if bad.any():
            worst = int(np.argmax(np.where(bad, np.maximum(shift, np.maximum(ratio, 1 / ratio)), 0)))
            dims = source.embodiment.labels(column, len(ours.mean))
            text = (
                f"the policy's statistics of {name} {_these(dims, bad)} are of other data: {dims[worst]} has "
                f"{_spread(ours, worst)} in the bundle, {_spread(theirs, worst)} here"
            )
            yield Finding(
                "error", "foreign statistics", text, "name the data set that it was trained on, or train with --pretrained BUNDLE"
            )


def _spread(stats: ColumnStats, dim: int) -> str:
    return f"{stats.mean[dim]:.3g} ± {stats.std[dim]:.3g}"


def _pictures(seen: NetworkRows) -> Iterator[Finding]:
    episode = seen.source.episode[seen.place]
    for number, camera in enumerate(seen.source.embodiment.cameras):
        shots = seen.pictures[:, number]
        inner = shots[:, shots.shape[1] // 4 : -shots.shape[1] // 4 or None].astype(np.float32)  # without the bands of padding
        dark, flat = inner.mean((1, 2, 3)) < DARK, inner.std((1, 2, 3)) < FLAT
        if (dark | flat).mean() > 0.5:
            what = "black" if dark.mean() > 0.5 else "of one colour"
            text = f"camera {camera!r} must show the scene, found {(dark | flat).sum()} of {len(shots)} pictures {what}"
            yield Finding("error", "dead camera", text, "leave it out: --embodiment.cameras.NAME COLUMN of the others, or record again")
            continue
        frozen = [
            int(each)
            for each in np.unique(episode)
            if (episode == each).sum() > 1
            and np.abs(np.diff(shots[episode == each].astype(np.int16), axis=0)).max() < FLAT
            and np.ptp(seen.source.state[seen.place[episode == each]], axis=0).max() > 0
        ]
        if frozen:
            severity: Severity = "error" if len(frozen) > len(np.unique(episode)) / 2 else "warning"
            text = f"camera {camera!r} must move with the robot, found the same picture throughout episodes {str(frozen)[1:-1]}"
            yield Finding(severity, "frozen camera", text, "leave these out with --dataset.episodes, or record again")
    flat_pictures = seen.pictures.reshape(len(seen.place), seen.pictures.shape[1], -1)
    names = list(seen.source.embodiment.cameras)
    for left in range(len(names)):
        for right in range(left + 1, len(names)):
            if np.array_equal(flat_pictures[:, left], flat_pictures[:, right]):
                text = f"cameras {names[left]!r} and {names[right]!r} show the same pictures"
                yield Finding("warning", "doubled camera", text, f"type --embodiment.cameras.{names[right]} COLUMN of the other one")


def _camera_names(cameras: dict[str, str]) -> Iterator[Finding]:
    """Report a camera whose name is in another camera's column and not in its own."""
    words = {name: set(re.findall(r"[a-z0-9]+", name.lower())) for name in cameras}
    held = {name: set(re.findall(r"[a-z0-9]+", column.lower())) for name, column in cameras.items()}
    for name, column in cameras.items():
        other = next((each for each in cameras if each != name and words[name] <= held[each] and not words[name] <= held[name]), None)
        if other is not None:
            text = f"camera {name!r} is read from {column!r}, while {cameras[other]!r} is read for {other!r}: columns swapped"
            yield Finding("error", "swapped cameras", text, f"type --embodiment.cameras.{name} {cameras[other]}")


def _these(names: tuple[str, ...], which: NDArray[np.bool_]) -> str:
    return ", ".join(names[dim] for dim in np.flatnonzero(which).tolist())[:120]


def _numbers(values: NDArray[np.float32]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values.tolist())[:80] + "]"
