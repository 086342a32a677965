"""Comparison of flow matching, CNF and diffusion: the same data, network, budget and measures.

Owns: the order train -> measure for each method, every figure of demo.json. Does not know: pictures, pages, files.

    NLL              -log p_1 of held-out points by pi0fm.flow.density: exact divergence, RK4 on a fine grid, the same for all methods
    common NLL       the worst of the methods' best held-out NLLs: every method reaches it
    train_seconds    of training until a method's averaged weights are at the common NLL or below, at the marks of its curve
    speedup          train_seconds of the CNF over those of flow matching
    distance         sliced Wasserstein-2 of samples to equally many held-out points: root of the mean over directions of the squared
                     distance of the two sorted projections (Bonneel et al. 2015, doi 10.1007/s10851-014-0506-3)
    common distance  1.1 times the worst of the methods' distances at their finest: every method reaches it
    evaluations      the fewest evaluations per sample from which on the distance stays within the common distance

Every method and every number of evaluations uses the same noise and points: curves differ by the sampler alone.
Shape letters: B points, K directions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow.checks import FlowError
from pi0fm.flow.density import DensityOptions, log_prob
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import CountedVelocity, Velocity, num_evaluations
from pi0fm.flow.stochastic import sample_ancestral, sde_grid
from pi0fm.toy.datasets import Dataset
from pi0fm.toy.methods import CNF, DIFFUSION, FLOW_MATCHING, Method, PlaneField
from pi0fm.toy.training import NllAtMark, train

HELD_OUT, CURVE_POINTS, SAMPLES = 4000, 800, 2000
FINE_STEPS, CURVE_STEPS = 40, 16
NEAR_NATS = 0.05  # nats
DISTANCE_MARGIN = 1.1
DIRECTIONS = 64
EVALUATIONS = (2, 4, 8, 12, 16, 24, 32, 64, 128)
ANCESTRAL_STEPS = (10, 20, 50, 100, 200, 500, 1000)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)


class DistanceAtEvaluations(NamedTuple):
    """Distance of samples to held-out points at a number of evaluations per sample."""

    evaluations: int
    distance: float


@final
@dataclass(frozen=True)
class Outcome:
    """One trained method and its measures.

    nll: of HELD_OUT points, nats. samples: SAMPLES points, sampled at its finest.
    ode: quality by the flow's solver. ancestral: quality by ancestral sampling, for the diffusion only.
    """

    method: Method
    network: PlaneField
    curve: tuple[NllAtMark, ...]
    nll: float
    samples: Float[Tensor, "B 2"]
    ode: tuple[DistanceAtEvaluations, ...]
    ancestral: tuple[DistanceAtEvaluations, ...] = ()

    @property
    def sampler(self) -> tuple[DistanceAtEvaluations, ...]:
        """The quality of ancestral sampling for the diffusion, of the ODE for the others."""
        return self.ancestral or self.ode


@final
@dataclass(frozen=True)
class Comparison:
    """All methods' outcomes. entropy: NLL of the data's density on the held-out points. floor: distance between two sets of data."""

    dataset: Dataset
    seed: int
    outcomes: tuple[Outcome, ...]
    entropy: float
    floor: float

    def figures(self) -> dict[str, Any]:
        """Return every figure of demo.json and of the page; None where no mark reaches a common NLL or distance."""
        by_name = {outcome.method.name: outcome for outcome in self.outcomes}
        curves = {name: outcome.curve for name, outcome in by_name.items()}
        best = [min(mark.nll for mark in curve) for curve in curves.values()]
        common_nll, near_nll = max(best), min(best) + NEAR_NATS
        common_distance = DISTANCE_MARGIN * max(outcome.sampler[-1].distance for outcome in self.outcomes)
        train_seconds = {name: seconds_to(curve, common_nll) for name, curve in curves.items()}
        ours, theirs = train_seconds.get(FLOW_MATCHING), train_seconds.get(CNF)
        return {
            "dataset": self.dataset.name,
            "solver": self.outcomes[0].method.flow.solver,
            "methods": [{"name": name, "title": outcome.method.title} for name, outcome in by_name.items()],
            "shown": self.outcomes[0].method.title,
            "nll": {name: outcome.nll for name, outcome in by_name.items()},
            "entropy": self.entropy,
            "common_nll": common_nll,
            "train_seconds": train_seconds,
            "near_nll": near_nll,
            "seconds_to_near": {name: seconds_to(curve, near_nll) for name, curve in curves.items()},
            "trained_seconds": {name: curve[-1].seconds for name, curve in curves.items()},
            "trained_steps": {name: curve[-1].steps for name, curve in curves.items()},
            "common_distance": common_distance,
            "floor": self.floor,
            "evaluations": {name: fewest_evaluations(outcome.sampler, common_distance) for name, outcome in by_name.items()},
            "probability_flow_evaluations": fewest_evaluations(by_name[DIFFUSION].ode, common_distance) if DIFFUSION in by_name else None,
            "speedup": theirs / ours if ours is not None and theirs is not None else None,
            "held_out": HELD_OUT,
            "held_out_along_training": CURVE_POINTS,
            "samples": SAMPLES,
            "curves": {name: _rows(curve) for name, curve in curves.items()},
            "qualities": {name: _rows(outcome.sampler) for name, outcome in by_name.items()},
        }


def compare(
    dataset: Dataset, methods: Sequence[Method], seed: int, *, seconds: float | None = None, steps: int | None = None
) -> Comparison:
    """Train every method for `seconds` or `steps`, and measure it. Raises FlowError when a training diverges."""
    # a stream different from the trainings', which start at the seed
    generator = torch.Generator().manual_seed(2**32 + seed)
    held_out = dataset.sample(HELD_OUT, generator)
    other, noise = dataset.sample(SAMPLES, generator), torch.randn(SAMPLES, 2, generator=generator)
    outcomes = []
    for method in methods:
        flow, target = method.flow, held_out[:SAMPLES]

        def along_training(network: PlaneField, flow: FlowMatching = method.flow) -> float:
            try:
                return held_out_nll(flow, network, held_out[:CURVE_POINTS], CURVE_STEPS)
            except FlowError:
                return math.inf  # early in training the field may be too rough for any grid

        network, curve = train(method, dataset, seed, along_training, seconds=seconds, steps=steps)
        nll = held_out_nll(flow, network, held_out, FINE_STEPS)
        if not math.isfinite(nll):
            longer = f"train longer with --seconds {2 * curve[-1].seconds:.0f}"
            raise FlowError(f"{method.title}: the held-out NLL must be finite, found {nll}; {longer}")
        ode, samples = quality_curve(ode_samplers(flow, noise), network, target)
        ancestral: tuple[DistanceAtEvaluations, ...] = ()
        if method.name == DIFFUSION:
            ancestral, samples = quality_curve(ancestral_samplers(flow, noise, seed), network, target)
        outcomes.append(Outcome(method, network, curve, nll, samples, ode, ancestral))
    entropy = -float(dataset.log_prob(held_out).double().mean())
    return Comparison(dataset, seed, tuple(outcomes), entropy, sliced_wasserstein(other, held_out[:SAMPLES]))


def grid(flow: FlowMatching, num_steps: int) -> list[float]:
    """Return times from noise to data: uniform in t where the path's velocity is finite on [0, 1], else in ln(alpha / sigma).

    VP needs the latter near data.
    """
    finite = torch.isfinite(flow.path.sigma_prime(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    return flow.grid(num_steps) if bool(finite.all()) else sde_grid(flow, num_steps)


@torch.no_grad()
def held_out_nll(flow: FlowMatching, network: Velocity, x: Float[Tensor, "B 2"], num_steps: int) -> float:
    """Return the mean of -log p_1 over the points, nats, by RK4 with `num_steps` steps and the exact divergence."""
    options = DensityOptions(times=grid(flow, num_steps), solver="rk4")
    return -float(log_prob(flow, network, x, options=options).double().mean())


def sliced_wasserstein(x: Float[Tensor, "B 2"], y: Float[Tensor, "B 2"]) -> float:
    """Return the sliced Wasserstein-2 distance of two sets of equally many points, over DIRECTIONS directions evenly spread."""
    angles = math.pi * (torch.arange(DIRECTIONS, dtype=x.dtype) + 0.5) / DIRECTIONS
    directions = torch.stack([torch.cos(angles), torch.sin(angles)])
    difference = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return math.sqrt(float(difference.square().mean()))


Sampler = Callable[[Velocity], Tensor]
"""Function from a network to samples, from one fixed noise."""


def ode_samplers(flow: FlowMatching, noise: Float[Tensor, "B 2"]) -> Iterator[Sampler]:
    """Yield samplers by the flow's solver, coarse to fine: by number of steps on a fixed grid, by tolerance for dopri5."""
    steps = sorted({max(1, evaluations // num_evaluations(flow.solver, 1)) for evaluations in EVALUATIONS if flow.solver != "dopri5"})
    fixed = [(flow, count) for count in steps]
    adaptive = [(replace(flow, tolerance=tolerance), flow.num_flow_steps) for tolerance in TOLERANCES]
    for each, count in fixed or adaptive:
        yield partial(each.sample, noise_BHA=noise, times=grid(each, count), check=False)


def ancestral_samplers(flow: FlowMatching, noise: Float[Tensor, "B 2"], seed: int) -> Iterator[Sampler]:
    """Yield ancestral samplers by number of steps, each with the same random numbers."""
    for count in ANCESTRAL_STEPS:
        yield partial(sample_ancestral, flow, noise=noise, num_steps=count, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def quality_curve(
    samplers: Iterable[Sampler], network: Velocity, held_out: Float[Tensor, "B 2"]
) -> tuple[tuple[DistanceAtEvaluations, ...], Float[Tensor, "B 2"]]:
    """Return the quality of each sampler, infinite where a sample is not finite, and the samples of the last."""
    curve, sample = [], held_out
    for sampler in samplers:
        sample = sampler(counted := CountedVelocity(network))
        distance = sliced_wasserstein(sample, held_out) if bool(torch.isfinite(sample).all()) else math.inf
        curve.append(DistanceAtEvaluations(counted.num_evaluations, distance))
    return tuple(curve), sample


def fewest_evaluations(curve: Sequence[DistanceAtEvaluations], distance: float) -> int | None:
    """Return the fewest evaluations from which on all distances are at or below `distance`; None where the last is above it."""
    found = None
    for quality in reversed(curve):
        if not quality.distance <= distance:
            break
        found = quality.evaluations
    return found


def seconds_to(curve: Sequence[NllAtMark], nll: float) -> float | None:
    """Return the seconds of training at the first mark at or below `nll`; None where there is none."""
    return next((mark.seconds for mark in curve if mark.nll <= nll), None)


def _rows(curve: Sequence[NllAtMark] | Sequence[DistanceAtEvaluations]) -> list[dict[str, float | None]]:
    """Return the rows for JSON, with null for infinity."""
    return [{name: value if math.isfinite(value) else None for name, value in row._asdict().items()} for row in curve]
