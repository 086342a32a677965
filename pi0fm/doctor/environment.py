"""Comparison of a policy and its data with the environment in which it will be evaluated.

Owns: the comparison of widths, rates, cameras, sentences, ranges, episode lengths; the replay of recorded actions. Does not know:
inference, simulators except through `Suite`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.chain import Chain, Sample
from pi0fm.data.columns.lerobot_source import RECORDING, LeRobotSource
from pi0fm.data.columns.metadata import read_json
from pi0fm.data.pictures.images import resize_with_padding
from pi0fm.doctor.finding import Finding, Severity
from pi0fm.options import nearest
from pi0fm.sim import catalog
from pi0fm.sim.environment import Environment, parse_cameras
from pi0fm.sim.suite import Suite
from pi0fm_client.types import Observation

STARTS, STEPS = 4, 40
REPLAYED, LOOK = 3, 5  # episodes; steps between two readings of the state
MOVES_ALIKE, STILL = 0.3, 0.1  # correlation over time; smallest movement, as a share of a state's largest value
FAR, TURN = 8.0, 6.0  # the network's units; radians between two forms of the same rotation
BETTER = 0.15  # by which the correlation of a turned picture must be larger
CHANGES: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "upside down (turned by 180 degrees)": lambda picture: picture[:, ::-1, ::-1],
    "upside down (top and bottom exchanged)": lambda picture: picture[:, ::-1],
    "mirrored (left and right exchanged)": lambda picture: picture[:, :, ::-1],
    "with red and blue exchanged": lambda picture: picture[..., ::-1],
}


@dataclass(frozen=True)
class PolicyAndData:
    """Policy and its data. facts: the policy's metadata; chain and data set are None where unknown."""

    facts: Mapping[str, Any]
    chain: Chain | None
    source: LeRobotSource | None
    action_low: NDArray[np.float32] | None
    action_high: NDArray[np.float32] | None
    prompts: tuple[str, ...] = ()


def environment_findings(
    task: str, max_steps: int | None, judged: PolicyAndData, start_pictures: NDArray[np.uint8] | None
) -> list[Finding]:
    """Judge a policy and its data against an environment. task: `SUITE/TASK`, or `SUITE` for its first task that the data set holds.

    start_pictures [n, C, size, size, 3]: of first rows of recorded episodes.
    Raises ConfigError for an unknown task, SimulationError where it cannot run here.
    """
    if "/" in task or catalog.is_task(task):
        suite, name = catalog.find(task)
    else:
        suite = catalog.suite_named(task)
        name = next((name for name, each in suite.tasks.items() if each.prompt in judged.prompts), next(iter(suite.tasks)))
    sources = judged.facts.get("camera_sources") or {}
    cameras = parse_cameras(f"{camera}={place}" for camera, place in sources.items()) if sources else ()
    found: list[Finding] = [*_facts(suite, judged), *_lengths(suite, name, max_steps, judged.source)]
    environment = suite.open(name, cameras, max_steps)
    try:
        found += _environment(environment, suite, judged, start_pictures)
    finally:
        environment.close()
    return found + _replayed(suite, judged.source)


def _facts(suite: Suite, judged: PolicyAndData) -> Iterator[Finding]:
    fps, horizon = judged.facts.get("fps"), judged.facts.get("execution_horizon")
    if fps and abs(fps - suite.fps) > 1e-3 * suite.fps:
        yield Finding(
            "error",
            "rate",
            f"the policy was trained at {fps:g} Hz, {suite.title} runs at {suite.fps} Hz",
            "record at that rate, and train on it",
        )
    wanted, here = judged.facts.get("robot_action_dim"), len(suite.action_names)
    if wanted is not None and wanted != here:
        yield Finding(
            "error", "width", f"the policy's actions are {wanted} wide, those of {suite.title} {here}", "take a policy of this robot"
        )
    if fps and horizon and horizon / fps > 2:
        text = f"the policy executes {horizon} actions, {horizon / fps:.1f} s, without an observation"
        yield Finding("warning", "execution horizon", text, "type a smaller --execution_horizon to pi0fm eval")
    if judged.action_low is not None and judged.action_high is not None and len(judged.action_low) == here:
        yield from _range(suite, judged.action_low, judged.action_high)


def _range(suite: Suite, low: NDArray[np.float32], high: NDArray[np.float32]) -> Iterator[Finding]:
    """Compare q01 and q99 of recorded actions with the environment's range."""
    least, most = suite.range_of_actions()
    span = most - least
    outside = (low < least - 0.05 * span) | (high > most + 0.05 * span)
    half = ((low > (least + most) / 2 - 0.01 * span) | (high < (least + most) / 2 + 0.01 * span)) & (high > low)
    tiny = (high - low < 0.02 * span) & (high > low)
    for which, what in ((outside, "is cut off"), (half & ~outside, "fills one half"), (tiny & ~half & ~outside, "fills a fiftieth")):
        if which.any():
            dims = ", ".join(suite.action_names[dim] for dim in np.flatnonzero(which).tolist())
            dim = int(np.flatnonzero(which)[0])
            text = f"action {dims} {what}: recorded from {low[dim]:.3g} to {high[dim]:.3g}, "
            text += f"{suite.title} takes {least[dim]:g} to {most[dim]:g}"
            severity: Severity = "error" if which is outside else "warning"
            yield Finding(
                severity, "action range", text, "check its sign and its range (a gripper from 0 to 1?), absolute against relative actions"
            )


def _lengths(suite: Suite, task: str, max_steps: int | None, source: LeRobotSource | None) -> Iterator[Finding]:
    if source is None:
        return
    _, counts = np.unique(source.episode, return_counts=True)
    limit, longest = max_steps or suite.tasks[task].max_steps, int(np.percentile(counts, 95))
    if longest > limit:
        text = f"an episode of {task} ends after {limit} steps, but recorded ones take up to {longest}"
        yield Finding("error", "step limit", text, f"type --max_steps {longest} to pi0fm eval, at most {suite.longest_episode}")


def _environment(
    environment: Environment, suite: Suite, judged: PolicyAndData, start_pictures: NDArray[np.uint8] | None
) -> Iterator[Finding]:
    observations: list[Observation] = []
    starts: list[Observation] = []
    for seed in range(STARTS):
        environment.reset(seed)
        starts.append(environment.observe())
        for step in range(STEPS):
            action = environment.expert_action() if suite.has_expert else environment.still_action()
            if environment.step(action).done:
                break
            if step % 10 == 9:
                observations.append(environment.observe())
    seen = [*starts, *observations]
    state = np.stack([each.state for each in seen])
    wanted = judged.facts.get("state_dim")
    if wanted is not None and wanted != state.shape[1]:
        yield Finding(
            "error", "width", f"the policy's state is {wanted} wide, that of {suite.title} {state.shape[1]}", "take a policy of this robot"
        )
    elif judged.chain is not None:
        yield from _states(judged.chain, state, suite, judged.facts)
    needed = set(judged.facts.get("cameras") or ())
    for camera in sorted(needed - set(seen[0].images)):
        text = f"the policy needs the camera {camera!r}, the environment shows {', '.join(sorted(seen[0].images))}"
        yield Finding("error", "camera", text, f"type --cameras {camera}=SOURCE:WIDTHxHEIGHT to pi0fm eval")
    if judged.prompts and seen[0].prompt not in judged.prompts:
        sentence = seen[0].prompt
        text = f"the environment says {sentence!r}, a sentence that the data set does not hold: {nearest(sentence, judged.prompts)}"
        yield Finding("warning", "prompt", text, "record with the environment's sentence, or expect the policy not to know it")
    if start_pictures is not None and judged.source is not None:
        cameras = [name for name in judged.source.embodiment.cameras if name in seen[0].images]
        size = start_pictures.shape[2]
        here = {name: _mean([resize_with_padding(each.images[name][None], size)[0] for each in starts]) for name in cameras}
        recorded = {
            name: start_pictures[:, number].astype(np.float64).mean(0, keepdims=True)
            for number, name in enumerate(judged.source.embodiment.cameras)
        }
        for name in cameras:
            yield from _orientation(name, here, recorded)


def _states(chain: Chain, state: NDArray[np.float32], suite: Suite, facts: Mapping[str, Any]) -> Iterator[Finding]:
    far = np.abs(chain.forward(Sample(state, None)).state[:, : state.shape[1]]).max(0)
    if not (far > FAR).any():
        return
    span = facts.get("state_range") or {}
    low, high = (np.asarray(span.get(end, []), np.float32) for end in ("min", "max"))
    worst, names = int(far.argmax()), suite.state_names
    name = names[worst] if worst < len(names) else f"state {worst}"
    known = f", trained on {low[worst]:.3g} to {high[worst]:.3g}" if len(low) else ""
    text = (
        f"the environment's state is unlike the training's: {name} from {state[:, worst].min():.3g} to {state[:, worst].max():.3g}{known}"
    )
    beyond = max(state[:, worst].max() - high[worst], low[worst] - state[:, worst].min()) if len(low) else 0
    remedy = "take the state from the same source and in the same units as the recording"
    if TURN - np.pi < beyond < TURN + 1:
        remedy += "; about a whole turn apart: an axis-angle or quaternion of the other sign"
    yield Finding("error", "state", text, remedy)


def _orientation(name: str, here: Mapping[str, NDArray[np.float64]], recorded: Mapping[str, NDArray[np.float64]]) -> Iterator[Finding]:
    """Report a recorded start picture that matches the environment's better after a change (turned, BGR), or another camera's."""
    plain = _correlation(recorded[name], here[name])
    likes = {what: _correlation(change(recorded[name]), here[name]) for what, change in CHANGES.items()}
    others = {other: _correlation(recorded[name], here[other]) for other in here if other != name}
    best = max(likes, key=lambda each: likes[each])
    if others and (other := max(others, key=lambda each: others[each])) and others[other] > max(plain + BETTER, likes[best]):
        text = f"the recorded pictures of camera {name!r} look like the environment's {other!r}: cameras swapped"
        yield Finding("error", "swapped cameras", text, f"type --embodiment.cameras.{name} COLUMN of the other one")
    elif likes[best] > plain + (BETTER if "red" not in best else BETTER / 3):
        text = f"the recorded pictures of camera {name!r} are {best} compared with the environment's"
        yield Finding("error", "picture", text, "record as the environment draws, or turn one of them")


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Correlate two pictures: 1 for pictures that differ in brightness and contrast only."""
    x, y = a - a.mean(), b - b.mean()
    return float((x * y).sum() / max(np.sqrt((x * x).sum() * (y * y).sum()), 1e-9))


def _mean(pictures: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
    return np.asarray(np.stack(pictures).astype(np.float64).mean(0, keepdims=True))


def _replayed(suite: Suite, source: LeRobotSource | None) -> list[Finding]:
    """Execute recorded actions from their recorded seed, and compare the states and the success with the recording.

    A recording with noise stores the clean actions instead of the executed ones, so that the replay need not succeed.
    """
    if source is None or not source.demonstration_seeds:
        return []
    seeds, names = source.column("seed").astype(int), {task.prompt: name for name, task in suite.tasks.items()}
    noisy = bool(read_json(source.root / RECORDING).get("noise")) if (source.root / RECORDING).is_file() else False
    tried, solved, likes = 0, 0, []
    for begin in source.starts[:REPLAYED].tolist():
        name, rows = names.get(source.tasks[source.task[begin]]), slice(begin, int(source.end[begin]))
        if name is None or rows.stop - begin > suite.longest_episode:
            continue
        environment = suite.open(name, (), suite.longest_episode)
        try:
            success, states = _executed(environment, int(seeds[begin]), source.action[rows])
        finally:
            environment.close()
        tried, solved = tried + 1, solved + success
        likes.append(_correlation_over_time(source.state[rows][: LOOK * len(states) : LOOK], states))
    if not tried:
        return []
    like = np.nan_to_num(np.stack(likes), nan=-np.inf).max(0)
    other = np.flatnonzero(np.isfinite(like) & (like < MOVES_ALIKE)).tolist()
    if other and len(like) == len(suite.state_names):
        moved = ", ".join(suite.state_names[dim] for dim in other)
        text = f"recorded actions, executed from the seed of {tried} episodes, do not move {moved} as recorded"
    elif solved or noisy:
        return [Finding("note", "replay", f"recorded actions, executed from their seed, solve {solved} of {tried} episodes again")]
    else:
        text = f"recorded actions, executed from their seed, solve none of {tried} episodes"
    return [Finding("error", "replay", text, "check sign and range of each action (a gripper reversed?), rate, absolute against relative")]


def _executed(environment: Environment, seed: int, actions: NDArray[np.float32]) -> tuple[bool, NDArray[np.float32]]:
    """Execute actions; return whether the task was solved and the state before every LOOK-th action."""
    environment.reset(seed)
    states = []
    for step, action in enumerate(actions):
        if step % LOOK == 0:
            states.append(environment.observe().state)
        result = environment.step(action)
        if result.done:
            return result.success, np.stack(states)
    return False, np.stack(states)


def _correlation_over_time(recorded: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """Correlate recorded and found states over time: [S]; NaN for a dimension that hardly moved in the recording."""
    if recorded.shape != found.shape or len(found) < 4:
        return np.full(found.shape[1], np.nan)
    a, b = (each.astype(np.float64) - each.mean(0) for each in (recorded, found))
    size = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    like = np.where(size > 0, (a * b).sum(0) / np.maximum(size, 1e-12), 0)
    return np.asarray(np.where(np.ptp(recorded, axis=0) > STILL * np.abs(recorded).max(0), like, np.nan))
