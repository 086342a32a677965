"""Flow matching: the one object that training and sampling both call.

Owns: the pair (x_t, target) of a training step, the masked loss, and sampling. Does not know: networks, robots, devices.

    training   actions, noise, t --training_pair--> x_t --network--> prediction --loss(target, mask)--> (sum, count)
    sampling   noise = x at t = 0 --network, num_flow_steps times--> x at t = 1 = actions

Lipman et al. 2022 (arXiv 2210.02747); Black et al. 2024 (arXiv 2410.24164).
Shape letters: B batch, H action horizon, A action dim. The methods accept any [B, ...]; chunks are [B, H, A].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm.flow.checks import check_finite, check_mask, check_same_shape
from pi0fm.flow.config import DATA, NOISE, SCORE, VELOCITY, FlowConfig
from pi0fm.flow.conversion import convert
from pi0fm.flow.path import ProbabilityPath, expand, path_named
from pi0fm.flow.solver import Velocity, evaluate, integrate, uniform_grid
from pi0fm.flow.time_density import Likelihood, TimeDensity, density_named
from pi0fm_client.errors import ConfigError


@dataclass(frozen=True)
class FlowPair:
    """Training pair: the network's input x_t and the target of its prediction.

    target: the quantity named by `prediction`; under "velocity" it is the conditional velocity.
    """

    x_t: Float[Tensor, "B *rest"]
    target: Float[Tensor, "B *rest"]
    prediction: str = VELOCITY

    @property
    def velocity_target(self) -> Tensor:
        """The target of a network that predicts velocities. Raises ConfigError for another prediction: use `target`."""
        if self.prediction != VELOCITY:
            raise ConfigError(f"velocity_target needs flow option prediction 'velocity', found {self.prediction!r}; use target")
        return self.target


@dataclass(frozen=True)
class FlowMatching:
    """Probability path, density of training times, and solver of the sampling.

    prediction: the quantity that the network predicts, one of QUANTITIES.
    loss_weighting: "none", or "likelihood" to estimate the maximum-likelihood bound (arXiv 2101.09258) under any time density.
    time_margin: the distance kept from t = 0 and t = 1 where a conversion or the likelihood weight is singular.
    solver: a word of SOLVERS, which `sample` runs, or of STOCHASTIC_SOLVERS: flow/sampling.py runs all of them.
    noise_level: h of euler_maruyama, as a multiple of g.
    """

    path: ProbabilityPath
    time_density: TimeDensity
    solver: str = "euler"
    num_flow_steps: int = 10
    prediction: str = VELOCITY
    loss_weighting: str = "none"
    time_margin: float = 1e-3
    tolerance: float = 1e-5
    noise_level: float = 1.0

    @classmethod
    def from_config(cls, config: FlowConfig) -> "FlowMatching":
        """Make the flow of a configuration."""
        path = path_named(config.path)
        density = density_named(config.time_density, path, config.time_margin, config.logit_normal_mu, config.logit_normal_s)
        alike = ("solver", "num_flow_steps", "prediction", "loss_weighting", "time_margin", "tolerance", "noise_level")
        return cls(path, density, **{name: getattr(config, name) for name in alike})

    def times(self, uniform_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Map uniform numbers in [0, 1) to training times, one each."""
        return self.time_density.quantile(uniform_B)

    def training_pair(
        self,
        actions_BHA: Float[Tensor, "B *rest"],
        t_B: Float[Tensor, " B"],
        noise_BHA: Float[Tensor, "B *rest"],
        mask_BHA: Bool[Tensor, "B *rest"] | None = None,
    ) -> FlowPair:
        """Make `x_t = alpha_t x_1 + sigma_t x_0` and the target; for CondOT and velocities the target is `actions - noise`.

        mask_BHA: entries that sampling will hold at 0 (padded dimensions); x_t and target are 0 there, even where the actions
            are not finite. Leave padded *steps* out of it unless sampling masks them too, or the network learns to read the end
            of an episode from zeros that sampling never shows it.
        Values are not checked: this is the training step, and a check would wait for the device.
        """
        x_1, x_0 = actions_BHA, noise_BHA
        if mask_BHA is not None:
            x_1, x_0 = _masked(x_1, mask_BHA), _masked(x_0, mask_BHA)
        x_t = self.path.sample(x_0, x_1, t_B)
        if self.prediction == VELOCITY:
            target = self.path.conditional_velocity(x_0, x_1, t_B)
        elif self.prediction == NOISE:
            target = x_0
        elif self.prediction == DATA:
            target = x_1
        else:
            target = -x_0 / expand(self.path.sigma(t_B), x_0)
        return FlowPair(x_t, target, self.prediction)

    def loss(
        self,
        velocity_BHA: Float[Tensor, "B *rest"],
        velocity_target_BHA: Float[Tensor, "B *rest"],
        mask_BHA: Bool[Tensor, "B *rest"],
        t_B: Float[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(sum of squared errors, count) over the entries whose mask is True; both float32 for any input type.

        The caller divides by the count over all workers and micro-batches, so that every real entry weighs the same.
        A masked entry adds exactly 0 to the sum and to every gradient, even where it is NaN.
        t_B: the times of the pair, needed (and used) only under loss_weighting "likelihood".
        """
        check_same_shape("the prediction", velocity_BHA, velocity_target_BHA)
        check_mask(mask_BHA, velocity_BHA)
        # float32 from here: squares of bfloat16 differences would keep 8 bits.
        precise = torch.promote_types(velocity_BHA.dtype, torch.float32)
        # Mask the difference, not its square: the gradient of a masked square is 0 times NaN.
        error = _masked(velocity_BHA.to(precise) - velocity_target_BHA.to(precise), mask_BHA)
        squares = error.square()
        if self.loss_weighting == "likelihood":
            if t_B is None:
                raise ConfigError(
                    "loss_weighting 'likelihood' needs the times of the pair: pass t_B to loss, or set loss_weighting to 'none'"
                )
            squares = squares * expand(self.likelihood_weight(t_B), squares)
        return squares.sum().float(), mask_BHA.sum().float()

    def mean_loss(
        self,
        velocity_BHA: Float[Tensor, "B *rest"],
        velocity_target_BHA: Float[Tensor, "B *rest"],
        mask_BHA: Bool[Tensor, "B *rest"],
        t_B: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the loss of one batch on one worker: mean square over its real entries; 0 when it has none."""
        total, count = self.loss(velocity_BHA, velocity_target_BHA, mask_BHA, t_B)
        return total / count.clamp(min=1)

    def likelihood_weight(self, t_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Weight of the squared error at t with which its mean over the time density is the likelihood bound, up to a constant.

        The density proportional to the bound's factor c_t, divided by the time density, so its mean is 1. For velocities
        `c = 1 / lam = 2 / g^2`; a score error is 1 / lam of a velocity error, and so on, hence
        `c = 1/lam, lam / sigma^2, lam alpha^2 / sigma^4, lam` for velocity, noise, data and score. 0 for t > 1 - time_margin.
        """
        log_target = Likelihood(self.time_margin, self.path).log_density(t_B)
        if self.prediction != VELOCITY:
            # Held constant below time_margin, where the factor of a noise prediction has no finite integral.
            inside = t_B.clamp(self.time_margin, 1 - self.time_margin)
            log_target = log_target + 2 * torch.log(self._velocity_per_unit(inside))
        log_density = self.time_density.log_density(t_B)
        # A time of density 0 is drawn only by rounding; its weight would be a quotient by 0.
        return torch.where(torch.isfinite(log_density), torch.exp(log_target - log_density), torch.zeros_like(t_B))

    def sample(
        self,
        velocity: Velocity,
        noise_BHA: Float[Tensor, "B *rest"],
        num_flow_steps: int | None = None,
        solver: str | None = None,
        mask: Bool[Tensor, "B *rest"] | None = None,
        *,
        times: Sequence[float] | None = None,
        check: bool = True,
    ) -> Float[Tensor, "B *rest"]:
        """Solve the flow's ODE from `prior_scale * noise` at t = 0 to the sample x at t = 1.

        velocity: the network, (x [B, ...], t [B]) -> the quantity named by `prediction`.
        noise_BHA: from N(0, I), drawn by the caller. num_flow_steps, solver: instead of this object's own.
        mask: entries that are False are 0 at every step, so that the rest cannot depend on the noise there.
        times: a precomputed grid instead of `self.grid(num_flow_steps)`.
        check: refuse a result that is not finite. One wait for the device after the last step; pass False inside a CUDA graph.
        """
        grid = self.grid(num_flow_steps) if times is None else times
        start = self.path.prior_scale * noise_BHA
        if mask is not None:
            check_mask(mask, noise_BHA)
            start = _masked(start, mask)
        x_1 = integrate(self.velocity_field(velocity, mask), start, grid, solver or self.solver, self.tolerance)
        if check:
            check_finite("the sample (or its noise, or the network's answer)", x_1)
        return x_1

    def grid(self, num_flow_steps: int | None = None) -> list[float]:
        """Sampling times from noise to data; the ends keep `time_margin` where the network's answer gives no velocity."""
        steps = self.num_flow_steps if num_flow_steps is None else num_flow_steps
        start, stop = self.interval()
        return uniform_grid(steps, start, stop)

    def interval(self) -> tuple[float, float]:
        """Longest interval of t on which the network's answer is trained and gives a finite velocity."""
        if self.prediction == VELOCITY:
            return 0.0, 1.0
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        alpha_0, sigma_1 = float(self.path.alpha(ends)[0]), float(self.path.sigma(ends)[1])
        needs_alpha = self.prediction in (NOISE, SCORE)
        # A score is trained on -x_0 / sigma, which has no finite variance at t = 1, so the network is untrained there.
        needs_sigma = self.prediction in (DATA, SCORE) or not bool(torch.isfinite(self.path.sigma_prime(ends)[1]))
        start = self.time_margin if needs_alpha and alpha_0 == 0 else 0.0
        stop = 1 - self.time_margin if needs_sigma and sigma_1 == 0 else 1.0
        return start, stop

    def velocity_field(self, network: Velocity, mask: Bool[Tensor, "B *rest"] | None = None) -> Velocity:
        """Make a velocity of the network: converted from its prediction, and 0 where the mask is False."""
        return _VelocityField(self.path, self.prediction, network, mask)

    def _velocity_per_unit(self, t: Tensor) -> Tensor:
        """|d velocity / d prediction| at fixed x_t: the error of the velocity for an error of 1 in the prediction."""
        alpha, sigma, lam = self.path.alpha(t), self.path.sigma(t), self.path.lam(t)
        if self.prediction == SCORE:
            return lam
        if self.prediction == NOISE:
            return lam / sigma
        return lam * alpha / sigma**2


@final
@dataclass(frozen=True, eq=False)
class _VelocityField:
    """Velocity converted from a network's answer, 0 where the mask is False."""

    path: ProbabilityPath
    prediction: str
    network: Velocity
    mask: Tensor | None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._velocity(self.network(x, t), x, t)

    def at(self, x: Tensor, t: float) -> Tensor:
        """Evaluate all rows at one time; a velocity needs no conversion, so no time tensor is made."""
        if self.prediction != VELOCITY:
            return self(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
        return self._velocity(evaluate(self.network, x, t), x, None)

    def _velocity(self, answer: Tensor, x: Tensor, t: Tensor | None) -> Tensor:
        check_same_shape("the network's answer", answer, x)
        value = answer.to(x.dtype)
        if t is not None:
            # Unchecked: the grid of `interval` keeps away from the singular ends, and a check of t would wait for the device.
            value = convert(self.path, value, x, t, self.prediction, VELOCITY, check=False)
        return value if self.mask is None else _masked(value, self.mask)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    check_mask(mask, x)
    return torch.where(mask, x, torch.zeros_like(x))
