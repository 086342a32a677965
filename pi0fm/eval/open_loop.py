"""Open-loop evaluation without a simulator: predicted against recorded chunks on the episodes of a data set.

Owns: `OpenLoopConfig`, the choice of episodes and moments, errors and baselines. Does not know: the page (report/open_loop), training.

    episode    row 0 .. row s .. row 2 s ..      s = stride; each of these rows is a moment, observed as by the robot
    moment     policy.infer_batch -> predicted [H, A], against recorded [H, A]; rows past the episode's end are left out
    still      the action before the moment, repeated; in dimensions trained as differences from the state, the state
    mean       the mean recorded chunk of all moments: the best answer that does not depend on the observation

Errors are absolute, in robot units. One figure over all dimensions divides each error by the standard deviation of the recorded actions;
dimensions that never change are left out. Its interval is a bootstrap over episodes, which are independent; moments are not.
An action that differs from the recorded one may be as good, so this is no success rate. A policy that loses to `still` is broken.
Shape letters: M moments, H action horizon, A robot action dim, C cameras.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray

from pi0fm import files, machine, progress
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import LeRobotSource, open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.data.loading.loader import action_chunks
from pi0fm.data.pictures.chosen import pictures_at
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize
from pi0fm.eval.policy import open_policy, read_metadata
from pi0fm.eval.recorded_config import OpenLoopConfig
from pi0fm.eval.report.page import OWN_FILES, refuse_ended
from pi0fm.eval.rollouts.episode import noise_seed
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Observation, Policy

RESAMPLES = 2000  # of the bootstrap
UNFINISHED = ".unfinished.npz"  # answers of an interrupted evaluation


@dataclass(frozen=True)
class PolicyFacts:
    """Part of a policy's metadata that the evaluation reads."""

    embodiment: Embodiment
    horizon: int
    execution_horizon: int
    image_size: int
    resize: Resize
    fps: float
    training: Mapping[str, str]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Moments:
    """Moments of an evaluation, and the states and actions recorded at and after each.

    place [M]: in the source. recorded [M, H, A] and real [M, H], False past the episode's end; still [M, A]: the action of standing still.
    pictures: [M, C, size, size, 3], as the network sees them.
    """

    place: NDArray[np.int64]
    episode: NDArray[np.int64]
    recorded: Float[NDArray[np.float32], "M H A"]
    real: Bool[NDArray[np.bool_], "M H"]
    still: Float[NDArray[np.float32], "M A"]
    pictures: UInt8[NDArray[np.uint8], "M C size size 3"]

    def observation(self, source: LeRobotSource, number: int) -> Observation:
        """Return the observation of a moment."""
        return source.observation(int(self.place[number]), self.pictures[number])


@dataclass(frozen=True)
class Ratio:
    """Ratio of an error to a baseline's, with its 95 % interval over episodes, None for a single episode."""

    value: float
    interval: tuple[float, float] | None

    def json(self) -> dict[str, Any]:
        """Return the figures of summary.json."""
        return {"ratio": _round(self.value), "interval": self.interval and [_round(end) for end in self.interval]}


@dataclass(frozen=True)
class OpenLoopErrors:
    """Mean absolute errors in robot units; NaN for rows past the end of every episode.

    error, still, mean: [H, A] of the policy and of the two baselines.
    scale [A]: deviation of the recorded actions, 0 where they never change. each [M]: a moment's error in deviations.
    nats [M]: negative log-likelihood per entry of the recorded chunk, NaN where not requested or past the episode's end.
    """

    names: tuple[str, ...]
    moments: Moments
    predicted: Float[NDArray[np.float32], "M H A"]
    error: Float[NDArray[np.float64], "H A"]
    still: Float[NDArray[np.float64], "H A"]
    mean: Float[NDArray[np.float64], "H A"]
    scale: Float[NDArray[np.float64], " A"]
    each: Float[NDArray[np.float64], " M"]
    over_still: Ratio
    over_mean: Ratio
    nats: Float[NDArray[np.float64], " M"]

    def by_dimension(self, which: str = "error") -> NDArray[np.float64]:
        """Average over the rows of a chunk: [A] in robot units. which: error, still or mean."""
        return np.asarray(np.nanmean(getattr(self, which), axis=0))

    def by_row(self, which: str = "error") -> NDArray[np.float64]:
        """Average over the dimensions that change: [H] in standard deviations of the recorded actions."""
        changing = self.scale > 0
        return np.asarray((getattr(self, which)[:, changing] / self.scale[changing]).mean(axis=1))

    def json(self) -> dict[str, Any]:
        """Return the figures of summary.json and of the command's last line."""
        known = self.nats[np.isfinite(self.nats)]
        return {
            "episodes": len(np.unique(self.moments.episode)),
            "moments": len(self.each),
            "error": dict(zip(self.names, map(_round, self.by_dimension().tolist()), strict=True)),
            "error_over_still": self.over_still.json(),
            "error_over_mean": self.over_mean.json(),
            "nats_per_entry": _round(known.mean()) if len(known) else None,
        }


def evaluate_open_loop(config: OpenLoopConfig) -> tuple[dict[str, Any], OpenLoopErrors]:
    """Judge a policy on recorded episodes and write the report; return the command's last line and the errors.

    Raises OutputError for a folder that holds an evaluation, BundleError or ServingError for the policy, DatasetError for the data set,
    ConfigError for a data set of another robot.
    """
    from pi0fm.eval.report import open_loop as report

    began, output = time.monotonic(), Path(config.output_dir)
    refuse_ended(output, (*OWN_FILES, report.MOMENTS))
    policy_facts = read_policy(config)
    source, trained = open_episodes(config, policy_facts)
    stride, place = choose_moments(config, policy_facts, source)
    seen = describe_overlap(trained, source.episode[place])
    files.make_folder(output)
    moments = read_moments(config.dataset, policy_facts, source, place)
    found = infer_moments(config, policy_facts, source, open_policy(config), moments, output / UNFINISHED)
    described = [policy_facts.metadata, policy_facts.training]
    facts = {
        "policy": {name: str(value) for each in described for name, value in each.items() if isinstance(value, str | int | float)},
        "episodes": {
            "data set": str(source.root),
            "episodes": f"{', '.join(map(str, np.unique(moments.episode).tolist())):.200}",
            "moments": f"{len(place)}, every {stride} rows",
            "sentences": f"{'; '.join(source.tasks[number] for number in np.unique(source.task[place]).tolist()):.400}",
            "trained on": seen,
            "rate": f"{source.fps:g} Hz",
        },
        "settings": {
            "noise seed": str(config.seed),
            "flow steps": str(config.num_flow_steps or policy_facts.metadata.get("num_flow_steps", "the policy's own")),
            "solver": str(config.solver or policy_facts.metadata.get("solver", "the policy's own")),
        },
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
    }
    seconds = time.monotonic() - began
    with files.write_faults(output):
        page = report.write(output, config, found, source, facts, seconds)
    figures = found.json() | {"trained_on": seen, "seconds": round(seconds, 1), "report": str(page), "output_dir": str(output)}
    return figures, found


def read_policy(config: OpenLoopConfig) -> PolicyFacts:
    """Read the metadata of the bundle or the server; a server's pictures are resized as newer weights expect."""
    metadata = read_metadata(config)
    if config.remote:
        missing = [name for name in ("cameras", "state_key", "state_dim", "robot_action_dim", "action_horizon") if name not in metadata]
        if missing:
            raise ConfigError(f"{config.policy} does not say {', '.join(missing)} in its greeting; judge a bundle, or a pi0fm serve")
        embodiment = Embodiment(
            cameras=dict(metadata["cameras"]),
            state=str(metadata["state_key"]),
            state_dim=int(metadata["state_dim"]),
            robot_action_dim=int(metadata["robot_action_dim"]),
            state_names=tuple(map(str, metadata.get("state_names", ()))),
            action_names=tuple(map(str, metadata.get("action_names", ()))),
            units={str(name): str(unit) for name, unit in dict(metadata.get("units") or {}).items()},
        )
        resize: Resize = ANTIALIAS
    else:
        from pi0fm.policy.saved import bundle

        policy = bundle.read(Path(config.policy), config.robot)[0]
        embodiment, resize = policy.embodiment, policy.resize
    given = config.given_columns()
    unknown = sorted(set(given.get("cameras", ())) - set(embodiment.cameras))
    if unknown:
        raise ConfigError(f"the policy has the cameras {', '.join(embodiment.cameras)}, found --embodiment.cameras.{unknown[0]}")
    cameras = {**embodiment.cameras, **given.pop("cameras", {})}
    embodiment = replace(embodiment, cameras=cameras, **given)
    return PolicyFacts(
        embodiment=embodiment,
        horizon=int(metadata["action_horizon"]),
        execution_horizon=int(metadata.get("execution_horizon") or metadata["action_horizon"]),
        image_size=int((metadata.get("image_size") or (224,))[0]),
        resize=resize,
        fps=float(metadata.get("fps") or 0),
        training={name: str(value) for name, value in dict(metadata.get("training") or {}).items()},
        metadata=metadata,
    )


def open_episodes(config: OpenLoopConfig, policy_facts: PolicyFacts) -> tuple[LeRobotSource, set[int] | None]:
    """Choose the recorded episodes; return them and those that the policy was trained on, None if that is not known.

    Chosen are `dataset.episodes`; else, in the data set that the policy was trained on, the held-out episodes, if any; else all.
    """
    source = open_source(config.dataset, policy_facts.embodiment)
    if policy_facts.fps and abs(policy_facts.fps - source.fps) > 1e-3 * source.fps:
        progress.say(
            f"the policy was trained at {policy_facts.fps:g} Hz, this data set is at {source.fps:g} Hz: its chunks are of other times"
        )
    if source.fingerprint != policy_facts.training.get("dataset_fingerprint"):
        return source, None
    held = {int(word) for word in policy_facts.training.get("held_out_episodes", "").split(",") if word}
    trained = set(np.unique(source.episode).tolist()) - held
    return (source.without(sorted(trained)) if held and not config.dataset.episodes else source), trained


def describe_overlap(trained: set[int] | None, episodes: NDArray[np.int64]) -> str:
    """Describe whether the policy was trained on these episodes; warn where it was."""
    if trained is None:
        return "not known: this is not the data set that the policy was trained on, or was changed since"
    evaluated = set(episodes.tolist())
    if not evaluated & trained:
        return "no: its run held these episodes out"
    progress.say("the policy was trained on these episodes: errors on new ones will be larger; hold some out with --validation.episodes")
    return f"yes, on {len(evaluated & trained)} of {len(evaluated)} episodes"


def choose_moments(config: OpenLoopConfig, policy_facts: PolicyFacts, source: LeRobotSource) -> tuple[int, NDArray[np.int64]]:
    """Choose the moments: (stride, places), every `stride`-th row of as many episodes as `moments` allows.

    Episodes that are left out are evenly spread, so that no task or day is.
    """
    stride = config.stride or policy_facts.execution_horizon
    begins = source.starts
    each = [np.arange(begin, source.end[begin], stride) for begin in begins.tolist()]
    total = sum(map(len, each))
    if total > config.moments:
        kept = np.unique(np.linspace(0, len(each) - 1, max(1, len(each) * config.moments // total)).round().astype(int))
        progress.say(f"{len(kept)} of {len(each)} episodes are judged, evenly spread; --moments {total} judges all")
        each = [each[number] for number in kept.tolist()]
    return stride, np.concatenate(each)


def read_moments(dataset: DatasetConfig, policy_facts: PolicyFacts, source: LeRobotSource, place: NDArray[np.int64]) -> Moments:
    """Read rows, chunks and pictures of the moments."""
    recorded, real = action_chunks(source.action, source.end, place, policy_facts.horizon)
    begins = np.append(True, np.diff(source.episode) != 0)[place]
    still = source.action[np.where(begins, place, place - 1)]  # an episode's first row has no previous action: the row's action
    relative = list(policy_facts.embodiment.delta_dims)
    still[:, relative] = source.state[place][:, relative]
    return Moments(
        place,
        source.episode[place],
        recorded,
        real,
        still,
        pictures_at(source, dataset, place, policy_facts.image_size, policy_facts.resize),
    )


def infer_moments(
    config: OpenLoopConfig,
    policy_facts: PolicyFacts,
    source: LeRobotSource,
    policy: Policy,
    moments: Moments,
    unfinished: Path | None = None,
) -> OpenLoopErrors:
    """Infer at every moment, and compare. unfinished: file of an interrupted evaluation's answers, read and written."""
    predicted, nats = np.empty_like(moments.recorded), np.full(len(moments.place), np.nan)
    whole: NDArray[np.bool_] = np.asarray(moments.real.all(1))
    asked = hashlib.sha256(
        repr((config.settings_of_answers(), source.fingerprint, moments.place.tolist(), _policy_identity(policy_facts))).encode()
    ).hexdigest()
    done = _read_unfinished(unfinished, asked, predicted, nats)
    with progress.step("predicting", len(predicted), start=done) as bar, _unfinished_kept(unfinished, asked, predicted, nats) as count:
        for batch in np.array_split(np.arange(len(predicted)), -(-len(predicted) // config.batch_size)):
            if batch[-1] < done:
                count[0] = int(batch[-1]) + 1
                continue
            observations = [moments.observation(source, int(number)) for number in batch]
            named = zip(moments.episode[batch].tolist(), source.rows[moments.place[batch]].tolist(), strict=True)
            seeds = [noise_seed(config.seed, "open loop", episode, row) for episode, row in named]
            predicted[batch] = [chunk.actions for chunk in policy.infer_batch(observations, seeds)]
            if config.likelihood and whole[batch].any():
                nats[batch[whole[batch]]] = _nats(policy, observations, seeds, moments.recorded[batch], whole[batch])
            bar.advance(len(batch))
            count[0] = int(batch[-1]) + 1
    return compare(moments, predicted, nats, source.embodiment.labels(source.embodiment.action, source.action.shape[1]))


def _policy_identity(policy_facts: PolicyFacts) -> str:
    """Return the policy's identity: a bundle's hash, else all of the server's metadata."""
    return str(policy_facts.metadata.get("identity") or sorted(map(str, policy_facts.metadata.items())))


def _read_unfinished(unfinished: Path | None, asked: str, predicted: NDArray[np.float32], nats: NDArray[np.float64]) -> int:
    """Read the answers of an interrupted evaluation of the same settings; return their number."""
    if unfinished is None or not unfinished.is_file():
        return 0
    with np.load(unfinished) as held:
        if str(held["asked"]) != asked:
            return 0
        done = len(held["nats"])
        predicted[:done], nats[:done] = held["predicted"], held["nats"]
    progress.say(f"{unfinished.parent} holds the answers at {done} moments of an interrupted evaluation: they are not asked again")
    return done


@contextmanager
def _unfinished_kept(unfinished: Path | None, asked: str, predicted: NDArray[np.float32], nats: NDArray[np.float64]) -> Iterator[list[int]]:
    """Save the answers so far when the block fails; the block counts them in the list that it receives."""
    count = [0]
    try:
        yield count
    except BaseException:
        if unfinished is not None and count[0]:
            with files.new_file(unfinished) as file:
                np.savez(file, asked=asked, predicted=predicted[: count[0]], nats=nats[: count[0]])
            progress.say(f"the answers at {count[0]} of {len(nats)} moments are kept: the same command continues from there")
        raise
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)


def compare(
    moments: Moments, predicted: Float[NDArray[np.float32], "M H A"], nats: Float[NDArray[np.float64], " M"], names: tuple[str, ...]
) -> OpenLoopErrors:
    """Compute the errors of predicted chunks and of the two baselines against the recorded ones."""
    real, recorded = moments.real[..., None], moments.recorded.astype(np.float64)
    count = real.sum(0)
    with np.errstate(invalid="ignore"):  # rows that no moment has are 0 / 0: NaN
        mean_chunk = np.where(real, recorded, 0).sum(0) / count
        errors = {
            name: np.where(real, np.abs(answer - recorded), np.nan)
            for name, answer in (("error", predicted), ("still", moments.still[:, None]), ("mean", mean_chunk[None]))
        }
        table = {name: np.where(real, each, 0).sum(0) / count for name, each in errors.items()}
    scale = recorded[moments.real].std(0)
    scale[np.ptp(recorded[moments.real], axis=0) == 0] = 0
    changing = scale > 0
    each = (
        {name: np.nanmean(error[..., changing] / scale[changing], axis=(1, 2)) for name, error in errors.items()} if changing.any() else {}
    )
    zeros = np.zeros(len(predicted))
    ours, still, mean = (each.get(name, zeros) for name in errors)
    of_still, of_mean = _ratio(ours, still, moments.episode), _ratio(ours, mean, moments.episode)
    return OpenLoopErrors(names, moments, predicted, table["error"], table["still"], table["mean"], scale, ours, of_still, of_mean, nats)


def _ratio(ours: NDArray[np.float64], baseline: NDArray[np.float64], episode: NDArray[np.int64]) -> Ratio:
    """Divide one error's mean over moments by another's, with percentiles of the bootstrap over episodes."""
    numbers, group = np.unique(episode, return_inverse=True)
    sums = np.stack([np.bincount(group, weights=each) for each in (ours, baseline)])
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(sums[0].sum() / sums[1].sum())
        if len(numbers) < 2:
            return Ratio(value, None)
        drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
        low, high = np.percentile(sums[0][drawn].sum(1) / sums[1][drawn].sum(1), [2.5, 97.5])
    return Ratio(value, (float(low), float(high)))


def _nats(
    policy: Any, observations: list[Observation], seeds: list[int], recorded: NDArray[np.float32], whole: NDArray[np.bool_]
) -> NDArray[np.float64]:
    chosen = np.flatnonzero(whole).tolist()
    scores = policy.log_prob([observations[k] for k in chosen], recorded[chosen], [seeds[k] for k in chosen])
    return np.asarray(-scores.log_prob / recorded[0].size)


def _round(value: float) -> float:
    return float(f"{value:.5g}")
