"""Options of what judges a policy on recorded episodes: `pi0fm eval --dataset.root`, and `pi0fm calibrate`.

Owns: `OpenLoopConfig`, `CalibrateConfig`, their ranges. Does not know: how a data set or a bundle is read; torch is not imported, so that a
command line may read them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import DatasetConfig
from pi0fm.eval.policy import PolicyChoice
from pi0fm.options import option, refuse_below, required
from pi0fm.policy.load_options import LoadOptions
from pi0fm.policy.saved import calibration
from pi0fm_client.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OpenLoopConfig(PolicyChoice):
    """Options of an open-loop evaluation. Raises ConfigError for a number out of range."""

    dataset: DatasetConfig = option(DatasetConfig, "")
    embodiment: Embodiment = option(Embodiment, "")
    stride: int | None = option(None, "rows from one judged moment to the next; the policy's execution horizon when not given")
    moments: int = option(1000, "approximate limit of judged moments; beyond it some episodes are left out")
    batch_size: int = option(8, "observations per inference")
    likelihood: bool = option(False, "also compute the log-likelihood of the recorded chunks; takes about twice the time")
    worst: int = option(8, "number of moments with the largest errors that the report shows with pictures")
    traces: int = option(3, "number of episodes that the report shows by dimension, from the worst to the best")
    seed: int = option(0, "seed of the policy's noise")
    output_dir: str = option("outputs/open_loop", "folder for report.html, summary.json and moments.parquet")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(self, stride=1, moments=1, batch_size=1, worst=0, traces=0, seed=0)
        foreign = sorted(self.given_columns().keys() - {"cameras", "state", "action"})
        if foreign:
            raise ConfigError(
                f"the robot is the policy's: embodiment.{foreign[0]} cannot be given; columns can: cameras.NAME, state, action"
            )
        if self.likelihood and (self.remote or self.compile != "off"):
            found = self.policy if self.remote else f"compile {self.compile}"
            raise ConfigError(
                f"a likelihood needs the derivatives of a bundle's network, not compiled; found {found}; leave one of them out"
            )

    def settings_of_answers(self) -> tuple[Any, ...]:
        """Return the settings that answers depend on, in addition to policy, data set and moments."""
        return (
            self.num_flow_steps,
            self.solver,
            self.noise_level,
            self.robot,
            self.likelihood,
            self.seed,
            self.batch_size,
            self.given_columns(),
        )

    def given_columns(self) -> dict[str, Any]:
        """Return the columns that options give instead of the policy's."""
        return {name: value for name, value in vars(self.embodiment).items() if value != getattr(Embodiment(), name)}


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(LoadOptions):
    """Options of `pi0fm calibrate`. Raises ConfigError for a number out of range."""

    bundle: Path = required("folder of the policy")
    false_alarm_rate: float = option(0.1, "share of episodes like the held-out ones that may raise an alarm; 0.1 needs 9 episodes, 0.05 19")
    dataset: DatasetConfig = option(DatasetConfig, "")
    embodiment: Embodiment = option(Embodiment, "")
    stride: int | None = option(None, "rows from one chunk to the next; the policy's execution horizon when not given")
    moments: int = option(2000, "approximate limit of chunks; beyond it some episodes are left out")
    batch_size: int = option(8, "observations per inference")
    seed: int = option(0, "seed of the policy's noise")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(self, stride=1, moments=1, batch_size=1, seed=0)
        calibration.episodes_needed(self.false_alarm_rate)

    def open_loop(self) -> OpenLoopConfig:
        """Return the options of the open-loop evaluation."""
        alike = ("dataset", "embodiment", "stride", "moments", "batch_size", "seed", *vars(LoadOptions()))
        return OpenLoopConfig(policy=str(self.bundle), **{name: getattr(self, name) for name in alike})
