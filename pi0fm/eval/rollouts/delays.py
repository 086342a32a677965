"""`pi0fm eval --realtime.delays_ms ...`: success, jumps and reaction time against the delay of the policy.

Owns: `RealtimeConfig`, the grid of modes, delays and episodes, its sums. Does not know: how an episode runs (eval/rollouts/realtime), the
page.
"""

import logging
import os
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pi0fm import files, machine, progress
from pi0fm.eval.config import StartsConfig, checked_cameras, refuse_seen_seeds, resolve_execution_horizon
from pi0fm.eval.policy import open_policy, read_metadata
from pi0fm.eval.report.page import OWN_FILES, ROWS, refuse_ended
from pi0fm.eval.rollouts.episode import noise_seed
from pi0fm.eval.rollouts.realtime import ASYNCHRONOUS, MODES, SYNCHRONOUS, DrivenEpisode, Infer, Timing, drive
from pi0fm.eval.rollouts.rollout import check_fit
from pi0fm.eval.statistics import Interval, wilson
from pi0fm.options import nearest, option
from pi0fm.policy.load_options import GUIDANCE, GUIDED, HARD_PREFIX, TOKEN_VARIABLE
from pi0fm.sim import catalog
from pi0fm.sim.environment import Environment
from pi0fm.sim.suite import Suite
from pi0fm_client import execution, wire
from pi0fm_client.errors import ConfigError
from pi0fm_client.execution import Message
from pi0fm_client.types import ActionChunk, ActionPrefix

MEASURED = "measured"


@dataclass(frozen=True)
class DelayGrid:
    """Grid of delays and modes. Raises ConfigError for an unknown mode and a number out of range."""

    delays_ms: tuple[str, ...] = option(
        ("0", "50", "100", "200", "400"), f"delays of an answer, on the simulator's clock; {MEASURED} takes the time of each inference here"
    )
    jitter_ms: float = option(0.0, "standard deviation of random additions to each delay, in ms")
    modes: tuple[str, ...] = option(
        (),
        f"modes from {', '.join(MODES)}; when not given {SYNCHRONOUS}, {ASYNCHRONOUS}, {GUIDED}, and {HARD_PREFIX} for a policy trained "
        "with rtc.max_delay; a server continues chunks in the one mode it was started with, or not at all",
    )

    def __post_init__(self) -> None:
        for word in self.delays_ms:
            if word != MEASURED and not (word.replace(".", "", 1).isdigit() and float(word) < 60_000):
                raise ConfigError(f"realtime.delays_ms are milliseconds below 60000, or {MEASURED}, found {word!r}; type 0,100,200")
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"realtime.modes must be known words, found {mode!r}: {nearest(mode, MODES)}")
        if not self.delays_ms or self.jitter_ms < 0:
            raise ConfigError(f"realtime needs a delay and a jitter of 0 or more, found {self.jitter_ms:g} ms; type 0,100,200")

    def timings(self, metadata: Mapping[str, Any], remote: bool) -> list[Timing]:
        """List every mode at every delay; without given modes, those that fit the policy."""
        delays = [None if word == MEASURED else float(word) for word in dict.fromkeys(self.delays_ms)]
        return [
            Timing(mode, delay, self.jitter_ms)
            for mode in dict.fromkeys(self.modes or _default_modes(metadata, remote))
            for delay in delays
        ]


@dataclass(frozen=True, kw_only=True)
class RealtimeConfig(StartsConfig):
    """Options of an evaluation whose simulator does not wait for the policy; episodes run one by one in this process."""

    realtime: DelayGrid = option(DelayGrid, "")
    output_dir: str = option("outputs/realtime", f"folder for report.html, summary.json and {ROWS}")


@dataclass(frozen=True)
class ModeAtDelay:
    """Figures of one mode and delay, in milliseconds; jump and change as in eval/rollouts/realtime."""

    mode: str
    asked_ms: float | None
    success: Interval | None
    episodes: int
    crashes: int
    delay_ms: float
    reaction_ms: float
    jump: float
    change: float
    held: float
    own_ms: float

    def json(self) -> dict[str, Any]:
        """Return the figures of summary.json."""
        numbers = {name: _plain(getattr(self, name)) for name in ("delay_ms", "reaction_ms", "jump", "change", "held", "own_ms")}
        interval = None if self.success is None else [round(end, 4) for end in (self.success.rate, self.success.low, self.success.high)]
        return {
            "mode": self.mode,
            "asked_ms": MEASURED if self.asked_ms is None else self.asked_ms,
            "success": interval,
            "episodes": self.episodes,
            "crashes": self.crashes,
            **numbers,
        }


def evaluate_in_real_time(config: RealtimeConfig) -> tuple[dict[str, Any], list[ModeAtDelay]]:
    """Run the grid and write the report; return the command's last line and the cells.

    Raises as `eval.evaluate.evaluate` does, and ConfigError for a mode that the policy lacks, before the first episode.
    """
    from pi0fm.eval.report import realtime as report

    began, output = time.monotonic(), Path(config.output_dir)
    refuse_ended(output, (*OWN_FILES, ROWS))
    suites = catalog.suites_of(config.tasks)
    metadata = read_metadata(config)
    refuse_seen_seeds(config, metadata)
    cameras = checked_cameras(config, metadata)
    horizon = resolve_execution_horizon(config, metadata)
    timings = config.realtime.timings(metadata, config.remote)
    asks = _open_modes(config, metadata, {timing.mode for timing in timings})
    files.make_folder(output)
    logging.getLogger(execution.__name__).addFilter(_without_standstills)
    rows: list[DrivenEpisode] = []
    with progress.step("real time", len(timings) * len(config.tasks) * config.episodes) as bar:
        for task in config.tasks:
            suite = catalog.find(task)[0]
            limits = {"increments": list(suite.increments)}
            half_range = np.subtract(*reversed(suite.range_of_actions())) / 2
            environment = catalog.open_environment(task, cameras, config.max_steps)
            try:
                environment.reset(config.first_seed)
                check_fit(environment, environment.observe(), metadata, horizon)
                for timing, seed in ((timing, config.first_seed + k) for k in range(config.episodes) for timing in timings):
                    infer = asks.infer_in_mode(timing.mode, task, seed)
                    row = drive(environment, seed, infer, asks.flat, metadata, timing, horizon, limits, half_range)
                    rows.append(replace(row, task=task))
                    bar.advance(note=f"{timing.mode} {row.outcome}")
            finally:
                environment.close()
    cells = [_mode_at_delay(timing, rows) for timing in timings]
    facts = {
        "policy": {name: str(value) for name, value in metadata.items() if isinstance(value, str | int | float)},
        "settings": {
            "tasks": ", ".join(config.tasks),
            "seeds": f"{config.first_seed} to {config.first_seed + config.episodes - 1}",
            "control rate": ", ".join(f"{rate} Hz" for rate in sorted({suite.fps for suite in suites})),
            "execution horizon": str(horizon),
            "jitter": f"{config.realtime.jitter_ms:g} ms",
        },
        "sentences": {task: catalog.prompt_of(task) for task in config.tasks},
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(*sorted({package for suite in suites for package in suite.packages})),
    }
    seconds = time.monotonic() - began
    with files.write_faults(output):
        page = report.write(output, config.policy, cells, rows, facts, seconds)
    own = max(cell.own_ms for cell in cells)
    last = {"cells": [cell.json() for cell in cells], "own_ms_a_step": _plain(own), "seconds": round(seconds, 1), "report": str(page)}
    by_suite = {suite.name: [_mode_at_delay(timing, rows, suite).json() for timing in timings] for suite in suites}
    return last | {"by_suite": by_suite, "output_dir": str(output)}, cells


def _without_standstills(record: logging.LogRecord) -> bool:
    """Filter the executor's warnings of standstills, which the table counts."""
    return record.levelno > logging.WARNING


class _ModePolicy:
    """Policy as each mode calls it: a bundle in this process, or a server."""

    def __init__(self, config: RealtimeConfig, metadata: Mapping[str, Any], policy: Any) -> None:
        self._config, self._policy = config, policy
        self._keys: Mapping[str, str] = metadata.get("cameras") or {}
        self._state = str(metadata.get("state_key", "observation.state"))

    def flat(self, environment: Environment) -> Message:
        """Observe, as the flat map of keys that a robot sends."""
        seen = environment.observe()
        images = {key: seen.images[name] for name, key in self._keys.items() if name in seen.images}
        return {**images, self._state: seen.state, "prompt": seen.prompt}

    def infer_in_mode(self, mode: str, task: str, seed: int) -> Infer:
        """Return the call that answers in that mode; the noise of a call is the same in every mode."""
        policy, config = self._policy, self._config
        if config.remote:
            return lambda message, step: policy.infer(message, noise_seed(config.seed, task, seed, step))
        if mode in GUIDANCE:
            policy.guidance = mode

        def infer(message: Message, step: int) -> ActionChunk:
            own = dict(message)
            rows, delay = own.pop(wire.ACTION_PREFIX, None), own.pop(wire.INFERENCE_DELAY, 0)
            prefix = None if rows is None or mode not in GUIDANCE else ActionPrefix(rows, int(delay))
            seeds = [noise_seed(config.seed, task, seed, step)]
            chunk: ActionChunk = policy.infer_batch([policy.observation(own)], seeds, prefixes=[prefix])[0]
            return chunk

        return infer


def _default_modes(metadata: Mapping[str, Any], remote: bool) -> tuple[str, ...]:
    """Return the modes that are evaluated where none is named."""
    led = (GUIDED, *((HARD_PREFIX,) if metadata.get("rtc_max_delay") else ()))
    if remote:
        led = led[: wire.ACTION_PREFIX in metadata.get(wire.EXTENSIONS, ())]
    return (SYNCHRONOUS, ASYNCHRONOUS, *led)


def _open_modes(config: RealtimeConfig, metadata: Mapping[str, Any], modes: Set[str]) -> _ModePolicy:
    """Open the policy. Raises ConfigError for a mode that it does not support."""
    led = sorted(modes & set(GUIDANCE))
    if config.remote:
        from pi0fm_client.client import PolicyClient

        if len(led) > 1 or (led and wire.ACTION_PREFIX not in metadata.get(wire.EXTENSIONS, ())):
            raise ConfigError(
                f"{config.policy} continues chunks in the one mode it was started with, or not at all, found {', '.join(led)}; "
                "name one of them, or judge the bundle"
            )
        return _ModePolicy(config, metadata, PolicyClient(config.policy, token=os.environ.get(TOKEN_VARIABLE)))
    policy: Any = open_policy(config)
    for mode in led:
        policy.guidance = mode
        policy.refuse_prefixes()
    return _ModePolicy(config, metadata, policy)


def _mode_at_delay(timing: Timing, rows: list[DrivenEpisode], suite: Suite | None = None) -> ModeAtDelay:
    own = [row for row in rows if (row.mode, row.asked_ms) == (timing.mode, timing.delay_ms)]
    own = [row for row in own if suite is None or catalog.find(row.task)[0] is suite]
    ended = [row for row in own if row.outcome != "crash"]
    means = {name: _mean([getattr(row, name) for row in ended]) for name in ("delay_ms", "reaction_ms", "jump", "change", "held", "own_ms")}
    success = wilson(sum(row.outcome == "success" for row in ended), len(ended)) if ended else None
    return ModeAtDelay(timing.mode, timing.delay_ms, success, len(own), len(own) - len(ended), **means)


def _mean(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _plain(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
