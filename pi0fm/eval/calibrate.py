"""Calibration of a bundle's alarm on episodes that its policy never saw.

Owns: `CalibrateConfig`, the choice of episodes, the largest spread of each. Does not know: how a threshold is made of them
(policy/saved/calibration).
"""

from typing import Any

import numpy as np

from pi0fm import progress
from pi0fm.eval.open_loop import choose_moments, open_episodes, read_moments, read_policy
from pi0fm.eval.recorded_config import CalibrateConfig
from pi0fm.eval.rollouts.episode import noise_seed
from pi0fm.policy.saved import bundle, calibration
from pi0fm.policy.saved.calibration import Calibration
from pi0fm_client.errors import ConfigError


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Sample a chunk at every moment, write the threshold into the bundle, and return the figures.

    Raises ConfigError for episodes that the policy was trained on, and too few of them, before a picture is read; BundleError for the
    bundle, DatasetError for the data set, OutputError for a bundle that cannot be written.
    """
    asked = config.open_loop()
    judged = read_policy(asked)
    source, trained = open_episodes(asked, judged)
    stride, place = choose_moments(asked, judged, source)
    episodes = np.unique(source.episode[place])
    seen = [] if trained is None else sorted(set(episodes.tolist()) & trained)
    if seen:
        raise ConfigError(
            f"calibration needs episodes that the policy never saw, but it was trained on {len(seen)} of these {len(episodes)}; train with "
            "--validation.episodes N, which holds N out, or give another data set"
        )
    calibration.threshold([0.0] * len(episodes), config.false_alarm_rate)  # refuses too few episodes before the pictures are read
    moments, policy = read_moments(config.dataset, judged, source, place), bundle.load(config.bundle, config)
    spreads = np.empty(len(place))
    with progress.step("calibrating", len(place)) as bar:
        for batch in np.array_split(np.arange(len(place)), -(-len(place) // config.batch_size)):
            observations = [moments.observation(source, int(number)) for number in batch]
            named = zip(moments.episode[batch].tolist(), source.rows[moments.place[batch]].tolist(), strict=True)
            seeds = [noise_seed(config.seed, "calibrate", episode, row) for episode, row in named]
            spreads[batch] = [chunk.scores["spread"] for chunk in policy.infer_batch(observations, seeds)]
            bar.advance(len(batch))
    largest = [float(spreads[moments.episode == episode].max()) for episode in episodes]
    found = Calibration(
        threshold=calibration.threshold(largest, config.false_alarm_rate),
        false_alarm_rate=config.false_alarm_rate,
        episodes=len(episodes),
        chunks=len(place),
        stride=stride,
        dataset=source.repo_id or source.root.name,
        of=policy.metadata["identity"],
        robot=config.robot or bundle.robot_names(config.bundle)[0],
        sampling=calibration.sampling(policy.flow),
    )
    calibration.write(config.bundle, found)
    return {
        "threshold": found.threshold,
        "false_alarm_rate": found.false_alarm_rate,
        "episodes": found.episodes,
        "chunks": found.chunks,
        "largest_spreads": {"median": float(np.median(largest)), "max": max(largest)},
        "chunks_above": float((spreads > found.threshold).mean()),
        "trained_on": "no" if trained is not None else "not known: another data set",
        "identity": found.of,
        "bundle": str(config.bundle),
    }
