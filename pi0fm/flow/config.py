"""Options of a flow, as a run and a bundle store them.

Owns: `FlowConfig`, the names of paths, densities, solvers and quantities. Does not know: their mathematics; torch is not imported, so that
a command line is parsed quickly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pi0fm.options import nearest, option
from pi0fm_client.errors import ConfigError

PATHS = ("cond_ot", "cosine", "vp", "ve")
DENSITIES = ("uniform", "pi0", "logit_normal", "likelihood")
FIXED_GRID_SOLVERS = ("euler", "midpoint", "heun", "rk4")
SOLVERS = (*FIXED_GRID_SOLVERS, "dopri5")
EULER_MARUYAMA, ANCESTRAL = "euler_maruyama", "ancestral"
STOCHASTIC_SOLVERS = (EULER_MARUYAMA, ANCESTRAL)
"""Names of the samplers that solve no ODE; flow/sampling.py runs them."""
VELOCITY, NOISE, DATA, SCORE = "velocity", "noise", "data", "score"
QUANTITIES = (VELOCITY, NOISE, DATA, SCORE)
LOSS_WEIGHTINGS = ("none", "likelihood")


@dataclass(frozen=True)
class FlowConfig:
    """Options of a run's flow. Raises ConfigError for an unknown name or a number out of range."""

    path: str = option("cond_ot", "probability path from noise to data: cond_ot (pi0), cosine, vp (DDPM), ve")
    time_density: str = option("pi0", "density of the training times: pi0, uniform, logit_normal, likelihood")
    logit_normal_mu: float = option(0.0, "centre of the logit of t under logit_normal; above 0 leans to data")
    logit_normal_s: float = option(1.0, "spread of the logit of t under logit_normal, above 0")
    solver: str = option("euler", "sampler: euler, midpoint, heun, rk4, dopri5; or with noise: euler_maruyama, ancestral (DDPM's)")
    noise_level: float = option(1.0, "euler_maruyama's noise as a multiple of g, 0 or more; 0 is the ODE, 1 the reverse diffusion")
    num_flow_steps: int = option(10, "steps of the sampling, at least 1; dopri5 tries its inverse as the first step size")
    prediction: str = option("velocity", "quantity that the network predicts: velocity, noise, data, score")
    loss_weighting: str = option("none", "none, or likelihood: weigh times as maximum likelihood does, under any time density")
    time_margin: float = option(1e-3, "distance kept from t = 0 and t = 1 where path or weight is singular, in (0, 0.5)")
    tolerance: float = option(1e-5, "relative and absolute tolerance of dopri5, above 0")

    def __post_init__(self) -> None:
        _check_word("path", self.path, PATHS)
        _check_word("time_density", self.time_density, DENSITIES)
        _check_word("solver", self.solver, (*SOLVERS, *STOCHASTIC_SOLVERS))
        _check_word("prediction", self.prediction, QUANTITIES)
        _check_word("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        if self.num_flow_steps < 1:
            raise ConfigError(f"flow option num_flow_steps must be at least 1, found {self.num_flow_steps}; pi0 uses 10")
        if not 0 < self.time_margin < 0.5:
            raise ConfigError(f"flow option time_margin must lie in (0, 0.5), found {self.time_margin}; the default is 0.001")
        if not 0 < self.tolerance < math.inf:
            raise ConfigError(f"flow option tolerance must be above 0, found {self.tolerance}; the default is 1e-5")
        if not 0 <= self.noise_level < math.inf:
            raise ConfigError(f"flow option noise_level must be 0 or more, found {self.noise_level}; 1 is the reverse diffusion")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Raise ConfigError for an option that the chosen density or solver does not read and that is not at its default."""
        if self.solver != EULER_MARUYAMA and self.noise_level != 1:
            rule = f"flow option noise_level belongs to solver {EULER_MARUYAMA}, found {self.noise_level} with {self.solver}"
            raise ConfigError(f"{rule}; set solver to {EULER_MARUYAMA}, or leave noise_level out")
        if self.time_density != "logit_normal" and (self.logit_normal_mu, self.logit_normal_s) != (0, 1):
            found = f"{self.logit_normal_mu} and {self.logit_normal_s} with {self.time_density}"
            rule = f"flow options logit_normal_mu and logit_normal_s belong to time_density logit_normal, found {found}"
            raise ConfigError(f"{rule}; set time_density to logit_normal, or leave them out")
        refuse_logit_normal(self.logit_normal_mu, self.logit_normal_s)


def refuse_logit_normal(mu: float, s: float) -> None:
    """Raise ConfigError for a centre or spread that gives no density."""
    if not (math.isfinite(mu) and 0 < s < math.inf):
        raise ConfigError(f"logit_normal needs a finite mu and s > 0, found mu {mu} and s {s}")


def _check_word(name: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise ConfigError(f"unknown flow option {name} {word!r}: {nearest(word, known)}")
