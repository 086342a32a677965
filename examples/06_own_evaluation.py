"""Judge a policy of your own in a suite, on the same starts as another: python examples/06_own_evaluation.py [EPISODES [STEPS]].

Any object with `metadata` and `infer_batch` is a policy. Here: two floors that a trained one must beat on PushT, standing still and
wandering. `pip install 'pi0fm[pusht]'`; other tasks: `pi0fm eval --help`.
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


class Floor:
    """Goes on from where the disc is; `spread` is the deviation of one step in the table's units, 0 stands still."""

    def __init__(self, spread):
        self.metadata = {"action_horizon": HORIZON, "robot_action_dim": 2, "state_dim": 2}
        self.spread = spread

    def infer_batch(self, observations, noise_seeds=None):
        """One chunk for each observation; the same seed gives the same chunk, so that an evaluation can be repeated."""
        seeds = noise_seeds or [None] * len(observations)
        walks = [np.random.default_rng(seed).normal(0, self.spread, (HORIZON, 2)).cumsum(axis=0) for seed in seeds]
        return [ActionChunk((each.state + walk).astype(np.float32)) for each, walk in zip(observations, walks, strict=True)]


starts = [Episode(TASK, seed) for seed in range(1000, 1000 + episodes)]
results = {}
for name, spread in {"standing still": 0.0, "wandering": 40.0}.items():
    setup = WorkerSetup(partial(Floor, spread), partial(open_environment, max_steps=steps), RolloutSettings(HORIZON))
    results[name] = [found.outcome == "success" for found in run_episodes(starts, setup, in_this_process)]
    rate = wilson(sum(results[name]), episodes)
    print(f"{name}: {sum(results[name])} of {episodes}, 95 % interval {rate.low:.0%} to {rate.high:.0%}")
pairs = list(zip(*results.values(), strict=True))
print(f"the two differ on the same starts with p = {mcnemar(pairs.count((True, False)), pairs.count((False, True))):.2f}")
