"""Evaluate your own policy in a suite against another, from the same starts: python examples/06_own_evaluation.py [EPISODES [STEPS]].

Any object with `metadata` and `infer_batch` is a policy. Here: two baselines that a trained policy must beat on PushT, standing still and
a random walk. Install `pip install 'pi0fm[pusht]'`; other tasks: `pi0fm eval --help`.
"""

import sys
from functools import partial

import numpy as np

from pi0fm.eval.evaluate import WorkerSetup, in_this_process, run_episodes
from pi0fm.eval.rollouts.episode import Episode, RolloutSettings
from pi0fm.eval.statistics import mcnemar, wilson
from pi0fm.sim.catalog import open_environment
from pi0fm_client.types import ActionChunk

TASK, HORIZON = "pusht/push-t", 8
episodes = int(sys.argv[1]) if len(sys.argv) > 1 else 20
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300


class Baseline:
    """Random walk from the disc's position; `spread` is the standard deviation of a step in the table's units, 0 stands still."""

    def __init__(self, spread):
        self.metadata = {"action_horizon": HORIZON, "robot_action_dim": 2, "state_dim": 2}
        self.spread = spread

    def infer_batch(self, observations, noise_seeds=None):
        """Infer a chunk for each observation, a function of observation and seed, so that an evaluation can be repeated."""
        seeds = noise_seeds or [None] * len(observations)
        walks = [np.random.default_rng(seed).normal(0, self.spread, (HORIZON, 2)).cumsum(axis=0) for seed in seeds]
        return [ActionChunk((each.state + walk).astype(np.float32)) for each, walk in zip(observations, walks, strict=True)]


starts = [Episode(TASK, seed) for seed in range(1000, 1000 + episodes)]
results = {}
for name, spread in {"standing still": 0.0, "wandering": 40.0}.items():
    setup = WorkerSetup(partial(Baseline, spread), partial(open_environment, max_steps=steps), RolloutSettings(HORIZON))
    results[name] = [found.outcome == "success" for found in run_episodes(starts, setup, in_this_process)]
    rate = wilson(sum(results[name]), episodes)
    print(f"{name}: {sum(results[name])} of {episodes}, 95 % interval {rate.low:.0%} to {rate.high:.0%}")
pairs = list(zip(*results.values(), strict=True))
print(f"difference of the two on the same starts: p = {mcnemar(pairs.count((True, False)), pairs.count((False, True))):.2f}")
