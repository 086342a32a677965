"""The options of `pi0fm flow demo`.

Owns: the words, their ranges, and which of them a method has no use for. Does not know: how anything is trained.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pi0fm.flow.matching import FlowConfig
from pi0fm.flow.solver import check_solver
from pi0fm.options import nearest, option
from pi0fm.toy import methods
from pi0fm.toy.datasets import DATASETS, dataset_named
from pi0fm.toy.training import Budget
from pi0fm_client.errors import ConfigError

SECONDS = 15.0
METHODS = ("all", "flow", "cnf", "diffusion")
FLOW_ONLY = ("path", "time_density", "prediction", "loss_weighting")


@dataclass(frozen=True)
class DemoConfig:
    """What `pi0fm flow demo` shows. Raises ConfigError for an unknown word, a number out of range, an option without a use."""

    dataset: str = option("moons", f"data in the plane: {', '.join(DATASETS)}")
    method: str = option("all", f"what to train, or all to compare: {', '.join(METHODS)}")
    path: str | None = option(None, "flow matching's path: cond_ot (when left out), cosine, vp, ve")
    time_density: str | None = option(None, "flow matching's training times: uniform (when left out), pi0, logit_normal, likelihood")
    prediction: str | None = option(None, "what flow matching's network answers: velocity (when left out), noise, data, score")
    loss_weighting: str | None = option(None, "flow matching's weights: none (when left out), likelihood")
    solver: str = option("midpoint", "ODE solver of the sampling, for every method: euler, midpoint, heun, rk4, dopri5")
    seconds: float | None = option(None, f"processor seconds of training for each method, {SECONDS:g} when left out")
    steps: int | None = option(None, "steps of training for each method instead of seconds: the same result at every run")
    seed: int = option(0, "of weights, data and noise, at least 0")
    output_dir: Path = option(Path("outputs/flow-demo"), "folder of the page and its pictures; an earlier demo there is replaced")

    def __post_init__(self) -> None:
        dataset_named(self.dataset)
        check_solver(self.solver)
        if self.method not in METHODS:
            raise ConfigError(f"unknown method {self.method!r}: {nearest(self.method, METHODS)}")
        idle = [name for name in FLOW_ONLY if getattr(self, name) is not None]
        if self.method in ("cnf", "diffusion") and idle:
            raise ConfigError(f"--{idle[0]} is flow matching's, found it with --method {self.method}; leave it out, or type --method flow")
        if self.seconds is not None and self.steps is not None:
            raise ConfigError(f"seconds or steps, not both: found {self.seconds:g} and {self.steps}; leave --seconds or --steps out")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds must be above 0, found {self.seconds:g}; type --seconds {SECONDS:g}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, found {self.seed}; type --seed 0")
        _ = self.budget, self.flow

    @property
    def budget(self) -> Budget:
        """What each training may spend."""
        if self.steps is not None:
            return Budget(steps=self.steps)
        return Budget(seconds=SECONDS if self.seconds is None else self.seconds)

    @property
    def flow(self) -> FlowConfig:
        """The flow that flow matching trains; its solver is every method's."""
        return FlowConfig(
            path=self.path or "cond_ot",
            time_density=self.time_density or "uniform",
            prediction=self.prediction or "velocity",
            loss_weighting=self.loss_weighting or "none",
            solver=self.solver,
        )

    def methods(self) -> tuple[methods.Method, ...]:
        """The methods to train, flow matching first."""
        each = {"flow": methods.flow_matching, "cnf": methods.cnf, "diffusion": methods.diffusion}
        return tuple(make(self.flow) for name, make in each.items() if self.method in ("all", name))
