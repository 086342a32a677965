"""Simulation speed of several environments in one process, relative to one environment.

Owns: the two sides and a policy without cost. Does not know: how an environment steps or renders.

    together   one rollout of N environments, a start position each                       : steps per processor second; at least 0.9 of
    alone      one rollout of 1 environment, the same start positions one after the other : its steps per processor second

Both run the same episodes with the same actions and render every `execution_horizon` steps. Processor seconds count every thread of the
software renderer. A ratio below 1 is the cost of sharing a process: caches, switches between GL contexts, larger batches.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, final

import numpy as np

from pi0fm import progress
from pi0fm.bench.config import SimulationOptions
from pi0fm.bench.harness.measure import BenchReport, paired_ratio
from pi0fm.eval.rollouts.episode import Episode, RolloutSettings
from pi0fm.eval.rollouts.rollout import BatchedRollout, run_all
from pi0fm.sim import catalog
from pi0fm.sim.suite import Suite
from pi0fm_client.types import ActionChunk, Observation


@final
class RandomPolicy:
    """Policy that returns random actions, a function of the seed, without delay."""

    def __init__(self, suite: Suite, horizon: int) -> None:
        self.metadata: dict[str, Any] = {"action_horizon": horizon}
        self._range, self._shape = suite.range_of_actions(), (horizon, len(suite.action_names))

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        """Return a chunk for each seed."""
        seeds = noise_seeds or range(len(observations))
        return [ActionChunk(np.random.default_rng(seed).uniform(*self._range, self._shape).astype(np.float32)) for seed in seeds]


def measure(options: SimulationOptions) -> BenchReport:
    """Run both sides in this process; `speed` is that of all environments together, relative to one at a time."""
    figures: dict[str, Any] = {}
    for task in options.tasks:
        progress.say(f"{task}, {options.environments} environments, {options.rounds} rounds")
        suite, name = catalog.find(task)
        build = partial(catalog.open_environment, max_steps=options.max_steps)
        settings = RolloutSettings(options.execution_horizon)
        policy = RandomPolicy(suite, options.execution_horizon)
        episodes = [Episode(catalog.report_name(task), seed) for seed in range(1, options.environments + 1)]
        with ExitStack() as stack:
            together, alone = (
                stack.enter_context(closing(BatchedRollout(build, policy, settings, count))) for count in (options.environments, 1)
            )
            steps = sum(result.steps for result in run_all(episodes, together))
            ratio = paired_ratio(
                lambda: list(run_all(episodes, alone)),  # noqa: B023  called in this turn of the loop
                lambda: list(run_all(episodes, together)),  # noqa: B023
                options.rounds,
                warm_up=1,
                clock=time.process_time,
            )
        figures[f"{suite.name}/{name}"] = {
            "speed": ratio.median,
            "interval": ratio.interval,
            "together_ms_a_step": 1e3 * ratio.second_seconds / steps,
            "alone_ms_a_step": 1e3 * ratio.first_seconds / steps,
        }
    return BenchReport({"tasks": figures, "environments": options.environments, "steps": options.max_steps, "rounds": options.rounds})
