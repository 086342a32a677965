"""Density of a flow's samples: `log p_1` of action chunks, and the divergence of a velocity field, whose integral it is.

Owns: `div v = trace(dv/dx)` exactly or by random probes; the joint integration of a state and its log-density, forwards (sample and
density in one pass) and backwards (density of given chunks). Does not know: networks, observations, robots.

The instantaneous change of variables (Chen et al. 2018, arXiv 1806.07366, Theorem 1; used for flows in arXiv 2210.02747):

    d/dt x_t = v_t(x_t)      d/dt log p_t(x_t) = - div v_t(x_t)
    log p_1(x_1) = log p_0(x_0) - int_0^1 div v_t(x_t) dt

    push_forward    noise ----> actions       push_backward    noise <---- actions
                    log p_0 - int div                          the same, from the data end

    exact        D vector-Jacobian products, one for each entry of a state, vectorised with torch.func.vmap
    Hutchinson   n of them: mean of e' J e over Rademacher probes e (+1 or -1); FFJORD (arXiv 1810.01367); unbiased, variance
                 2 (||J_sym||_F^2 - sum diag^2) / n with J_sym = (J + J') / 2

p_0 is N(0, prior_scale^2 I). For CondOT and cosine that is the path's own p_0; for VP and VE it is the usual approximation,
and `log_prior` accepts a better one. Densities are in nats, of the normalised chunk, over its unmasked entries.
Gradients flow if the caller has them enabled; torch.no_grad is supported, torch.inference_mode is not.
Shape letters: B batch, H action horizon, A action dim, D entries of one state.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import vjp, vmap

from pi0fm.flow.checks import FlowError, check_finite, check_mask
from pi0fm.flow.config import STOCHASTIC_SOLVERS
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import Velocity, evaluate, integrate

Field = Callable[[Tensor], Tensor]

SOLVER_BESIDE_NOISE = "heun"
"""Solver of the probability-flow ODE of a flow that samples with noise: the ODE has the same marginals, and a density."""


@final
@dataclass(frozen=True)
class DensityResult:
    """Chunks at both ends of the flow.

    noise: at t = 0, divided by prior_scale, so that a typical chunk has norm sqrt(number of entries).
    actions: at t = 1. log_prob: log-density of `actions`, nats. Masked entries are 0.
    """

    noise: Float[Tensor, "B *rest"]
    actions: Float[Tensor, "B *rest"]
    log_prob: Float[Tensor, " B"]

    @property
    def noise_norm(self) -> Float[Tensor, " B"]:
        """Euclidean norm of the noise of each chunk."""
        return self.noise.flatten(1).square().sum(1).sqrt()


@dataclass(frozen=True)
class DensityOptions:
    """Options of a density's computation; every field has a working default.

    probes: [n, B, ...] of +1 and -1 for Hutchinson's estimate, one set for the whole trajectory; None is exact.
    num_flow_steps, solver, times: instead of the flow's own; `times` increases from noise to data. A flow whose own solver is
        stochastic is integrated with SOLVER_BESIDE_NOISE.
    chunk_size: products run at once by the exact divergence; None runs all.
    float64: state and integral in float64. The network is called in float64 and must answer in it (`module.double()`).
    log_prior: log p_0 of a state [B, ...] at t = 0, instead of N(0, prior_scale^2 I).
    """

    probes: Tensor | None = None
    num_flow_steps: int | None = None
    solver: str | None = None
    times: Sequence[float] | None = None
    chunk_size: int | None = None
    float64: bool = False
    log_prior: Callable[[Tensor], Tensor] | None = None


def log_prob(
    flow: FlowMatching,
    network: Velocity,
    actions: Float[Tensor, "B *rest"],
    mask: Bool[Tensor, "B *rest"] | None = None,
    options: DensityOptions | None = None,
) -> Float[Tensor, " B"]:
    """log p_1 of each chunk over its unmasked entries, in nats. See `push_backward`, which returns the noise too."""
    return push_backward(flow, network, actions, mask, options).log_prob


def push_backward(
    flow: FlowMatching,
    network: Velocity,
    actions: Float[Tensor, "B *rest"],
    mask: Bool[Tensor, "B *rest"] | None = None,
    options: DensityOptions | None = None,
) -> DensityResult:
    """Integrate `actions` back to noise, and compute their log-density.

    mask: entries that are False are held at 0 and excluded from density and divergence; they may be anything, NaN included.
    Raises FlowError for actions or a result that are not finite, a mask or probes of another shape, and a network that does not
    answer in float64 when asked to.
    """
    options = options or DensityOptions()
    grid = _grid(flow, options)
    check_finite("actions", actions, mask)
    x_1 = _prepared(actions, mask, options)
    x_0, integral = _integrated(flow, network, x_1, mask, options, grid[::-1])
    # The integral runs from data to noise, so it is minus the one of the formula.
    return _result(flow, x_0, x_1, -integral, mask, options)


def push_forward(
    flow: FlowMatching,
    network: Velocity,
    noise: Float[Tensor, "B *rest"],
    mask: Bool[Tensor, "B *rest"] | None = None,
    options: DensityOptions | None = None,
) -> DensityResult:
    """Sample and compute the log-density in one pass; the sample is that of `flow.sample` from the same N(0, I) noise."""
    options = options or DensityOptions()
    grid = _grid(flow, options)
    check_finite("noise", noise, mask)
    x_0 = flow.path.prior_scale * _prepared(noise, mask, options)
    x_1, integral = _integrated(flow, network, x_0, mask, options, grid)
    return _result(flow, x_0, x_1, integral, mask, options)


def gaussian_log_prob(x: Float[Tensor, "B *rest"], scale: float, mask: Bool[Tensor, "B *rest"] | None = None) -> Float[Tensor, " B"]:
    """log N(x; 0, scale^2 I) over the unmasked entries, nats."""
    each = -(x**2) / (2 * scale**2) - math.log(scale * math.sqrt(2 * math.pi))
    each = each if mask is None else torch.where(mask, each, torch.zeros_like(each))
    return each.flatten(1).sum(1)


def density_solver(flow: FlowMatching, options: DensityOptions | None = None) -> str:
    """ODE solver of a density: that of the options, else the flow's, else SOLVER_BESIDE_NOISE."""
    if options is not None and options.solver is not None:
        return options.solver
    return SOLVER_BESIDE_NOISE if flow.solver in STOCHASTIC_SOLVERS else flow.solver


def exact_divergence(
    field: Field, x: Float[Tensor, "B *rest"], entries: Sequence[int] | None = None, chunk_size: int | None = None
) -> tuple[Float[Tensor, "B *rest"], Float[Tensor, " B"]]:
    """(v(x), div v(x)).

    field: acts on each state of a batch separately, as every network in evaluation mode does.
    entries: positions in a flattened state where v is not constantly 0, so that padding costs nothing; all by default.
    chunk_size: how many products run at once; memory grows with it. None runs all of them.
    """
    value, pullback = _value_and_pullback(field, x)
    width = x[0].numel()
    positions = torch.arange(width, device=x.device) if entries is None else torch.tensor(list(entries), dtype=torch.long, device=x.device)
    rows = torch.nn.functional.one_hot(positions, width).to(x.dtype)
    if not len(positions):
        return value, x.new_zeros(x.shape[0])
    each: Tensor = vmap(lambda row: _quadratic(pullback, row.reshape(1, *x.shape[1:]).expand_as(x)), chunk_size=chunk_size)(rows)
    return value, each.sum(0)


def hutchinson_divergence(
    field: Field, x: Float[Tensor, "B *rest"], probes: Float[Tensor, "n B *rest"]
) -> tuple[Float[Tensor, "B *rest"], Float[Tensor, " B"]]:
    """(v(x), estimate of div v(x)): the mean of `e' J e` over the probes; one forward pass, one backward pass per probe."""
    if len(probes) == 1 and not torch.is_grad_enabled():
        return _by_one_backward_pass(field, x, probes[0])
    value, pullback = _value_and_pullback(field, x)
    if len(probes) == 1:
        # Without vmap a single probe runs on any kernel that has a backward pass.
        return value, _quadratic(pullback, probes[0])
    each: Tensor = vmap(lambda probe: _quadratic(pullback, probe))(probes)
    return value, each.mean(0)


def _grid(flow: FlowMatching, options: DensityOptions) -> list[float]:
    grid = flow.grid(options.num_flow_steps) if options.times is None else list(options.times)
    if grid[0] > grid[-1]:
        raise FlowError(f"the times of a density must increase from noise to data, found {grid[0]:g} to {grid[-1]:g}")
    return grid


def _prepared(x: Tensor, mask: Tensor | None, options: DensityOptions) -> Tensor:
    """Cast x to the precision of the integration, with 0 where masked, and check the shapes of probes and mask."""
    if options.probes is not None and (options.probes.ndim < 1 or options.probes.shape[1:] != x.shape):
        raise FlowError(f"probes must be of shape [n, {', '.join(map(str, x.shape))}], found {list(options.probes.shape)}")
    x = x.to(torch.float64 if options.float64 else torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x
    check_mask(mask, x)
    return torch.where(mask, x, torch.zeros_like(x))


def _integrated(
    flow: FlowMatching, network: Velocity, x: Tensor, mask: Tensor | None, options: DensityOptions, grid: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(state at the end of the grid, integral of the divergence along the way)."""
    field = flow.velocity_field(_answering_in_float64(network) if options.float64 else network, mask)
    # One wait for the device, before the loop: padded dimensions of a chunk then cost no product.
    entries = None if mask is None or options.probes is not None else mask.flatten(1).any(0).nonzero().flatten().tolist()
    probes = None if options.probes is None else options.probes.to(x)
    if probes is not None and mask is not None:
        # A probe's masked entries would add the variance of derivatives that the density does not contain.
        probes = torch.where(mask, probes, torch.zeros_like(probes))

    # The integral of the divergence is one more coordinate of the state, so any solver, dopri5 too, carries both.
    start = torch.cat([x.flatten(1), x.new_zeros(x.shape[0], 1)], dim=1)
    joint = _StateAndDivergence(field, x.shape, probes, entries, options.chunk_size)
    end = integrate(joint, start, grid, density_solver(flow, options), flow.tolerance)
    return end[:, :-1].reshape(x.shape), end[:, -1]


@final
@dataclass(frozen=True, eq=False)
class _StateAndDivergence:
    """(velocity, divergence) as the velocity of a state [B, D + 1] whose last entry is the integral of the divergence."""

    field: Velocity
    shape: torch.Size
    probes: Tensor | None
    entries: Sequence[int] | None
    chunk_size: int | None

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        return self._velocity(state, lambda y: self.field(y, t))

    def at(self, state: Tensor, t: float) -> Tensor:
        """Evaluate all rows at one time, as sampling does, so that both compute the same numbers."""
        return self._velocity(state, lambda y: evaluate(self.field, y, t))

    def _velocity(self, state: Tensor, field: Field) -> Tensor:
        position = state[:, :-1].reshape(self.shape)
        if self.probes is None:
            velocity, divergence = exact_divergence(field, position, self.entries, self.chunk_size)
        else:
            velocity, divergence = hutchinson_divergence(field, position, self.probes)
        return torch.cat([velocity.flatten(1), divergence[:, None]], dim=1)


def _result(flow: FlowMatching, x_0: Tensor, x_1: Tensor, integral: Tensor, mask: Tensor | None, options: DensityOptions) -> DensityResult:
    prior = options.log_prior(x_0) if options.log_prior is not None else gaussian_log_prob(x_0, flow.path.prior_scale, mask)
    density = prior - integral
    check_finite("log_prob (or the network's answer)", density)
    return DensityResult(noise=x_0 / flow.path.prior_scale, actions=x_1, log_prob=density)


def _answering_in_float64(network: Velocity) -> Velocity:
    def checked(x: Tensor, t: Tensor) -> Tensor:
        answer = network(x, t)
        if answer.dtype != torch.float64:
            raise FlowError(f"a float64 density needs a network that answers in float64, found {answer.dtype}; call module.double() first")
        return answer

    return checked


def _by_one_backward_pass(field: Field, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """As `hutchinson_divergence` by plain autograd, without gradients: torch.func runs custom autograd functions on a slower path.

    Raises FlowError under torch.inference_mode, where every derivative would silently be 0.
    """
    if torch.is_inference_mode_enabled():
        raise FlowError("a divergence needs derivatives, found torch.inference_mode; use torch.no_grad")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        value = field(leaf)
    if not value.requires_grad:  # a field that does not read its state
        return value, x.new_zeros(x.shape[0])
    (pulled,) = torch.autograd.grad(value, leaf, probe, allow_unused=True, materialize_grads=True)
    return value.detach(), (pulled * probe).flatten(1).sum(1)


def _value_and_pullback(field: Field, x: Tensor) -> tuple[Tensor, Field]:
    """v(x), and the map from a cotangent e to e' J. A lambda: under pytest a nested function would be type-checked again."""
    result = vjp(field, x)
    return result[0], lambda cotangent: result[1](cotangent)[0]


def _quadratic(pullback: Field, probe: Tensor) -> Tensor:
    """e' J e for each state."""
    return (pullback(probe) * probe).flatten(1).sum(1)
