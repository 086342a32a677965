"""An alarm with a known rate of false ones: split conformal prediction over the spread of each chunk.

Owns: the threshold, its file in a bundle, whether it belongs to a policy as it was loaded. Does not know: where spreads come from.

    held-out episode   spread of a chunk at every `stride`-th row -> the largest      one number: moments of an episode are alike
    n episodes         the ceil((n + 1)(1 - rate))-th smallest of them -> threshold
    served             spread of a chunk > threshold -> alarm

The chance that an episode like the held-out ones raises an alarm at all is `rate` at most, for any distribution of the spread (Vovk et al.
2005; Lei et al. 2018). Episodes of another kind, such as the policy's own, are those that the alarm is for: `pi0fm eval` counts them.
The file is not part of the identity: a threshold changes no action.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi0fm import files, options
from pi0fm.policy.saved.manifest import CALIBRATION, identity, read_json
from pi0fm_client.errors import BundleError, ConfigError

if TYPE_CHECKING:  # torch, which the options of pi0fm calibrate do without
    from pi0fm.flow.matching import FlowMatching


@dataclass(frozen=True)
class Calibration:
    """threshold: of the spread, normalised units. false_alarm_rate: of episodes, as requested. episodes, chunks: numbers sampled.

    of: the identity of the bundle; robot, sampling: as the policy was loaded. dataset, stride: the held-out episodes, and rows from one
    chunk to the next.
    """

    threshold: float
    false_alarm_rate: float
    episodes: int
    chunks: int
    stride: int
    dataset: str
    of: str
    robot: str
    sampling: str

    def alarms(self, spreads: Sequence[float]) -> list[bool]:
        """Which of these chunks raise the alarm."""
        return [spread > self.threshold for spread in spreads]

    def metadata(self) -> dict[str, Any]:
        """The part of it that a robot is told."""
        return {name: getattr(self, name) for name in ("threshold", "false_alarm_rate", "episodes")}


def episodes_needed(rate: float) -> int:
    """The fewest episodes that determine a threshold of this rate. Raises ConfigError for a rate outside (0, 1)."""
    if not 0 < rate < 1:
        raise ConfigError(f"false_alarm_rate must lie in (0, 1), found {rate}; 0.1 is usual")
    return math.ceil(1 / rate - 1 - 1e-9)


def threshold(largest: Sequence[float], rate: float) -> float:
    """The threshold from each episode's largest spread. Raises ConfigError for too few episodes."""
    count, least = len(largest), episodes_needed(rate)
    if count < least:
        raise ConfigError(
            f"a false alarm rate of {rate:g} needs {least} held-out episodes or more, found {count}; give more, or type a larger "
            "--false_alarm_rate"
        )
    return sorted(largest)[math.ceil((count + 1) * (1 - rate) - 1e-9) - 1]


def write(path: Path, calibration: Calibration) -> None:
    """Write it into a bundle, replacing an older one."""
    with files.write_faults(path):
        files.write_json(path / CALIBRATION, asdict(calibration))


def read(path: Path) -> Calibration | None:
    """The calibration of a bundle, if it has one. Raises BundleError for one of another bundle, or a file that is damaged."""
    if not (path / CALIBRATION).is_file():
        return None
    try:
        found = options.decode(Calibration, read_json(path / CALIBRATION))
    except ConfigError as error:
        raise BundleError(f"{path / CALIBRATION} is no calibration ({error}); remove it, or type pi0fm calibrate {path}") from None
    if found.of != identity(path):
        raise BundleError(
            f"{path / CALIBRATION} must be of this bundle, {identity(path)}, found that of {found.of}; remove it, or type "
            f"pi0fm calibrate {path}"
        )
    return found


def sampling(flow: "FlowMatching") -> str:
    """Describe the sampling, which the spread of a chunk depends on besides weights and observation."""
    noise = f", noise level {flow.noise_level:g}" if flow.solver == "euler_maruyama" else ""
    return f"{flow.solver}, {flow.num_flow_steps} steps{noise}"
