"""How good a trained field is: NLL in nats, and samples against evaluations of the network.

Owns: the fine grid, the held-out NLL, the sliced Wasserstein distance, the curve of distance against evaluations. Does not know: how
a network was trained.

    NLL        -log p_1 of held-out points by pi0fm.flow.likelihood: exact divergence, RK4 on a fine grid, the same for all methods
    distance   sliced Wasserstein-2 between samples and as many held-out points: root of the mean over directions of the squared
               distance of the two sorted projections (Bonneel et al. 2015, doi 10.1007/s10851-014-0506-3)

The same noise and the same points serve every method and every number of evaluations, so a curve shows the sampler, not luck.
Shape letters: B points, K directions.
"""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow import likelihood
from pi0fm.flow.ancestral import sample_ancestral
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sde import sde_grid
from pi0fm.flow.solver import Counted, Velocity, num_evaluations

DIRECTIONS = 64
EVALUATIONS = (2, 4, 8, 12, 16, 24, 32, 64, 128)
ANCESTRAL_STEPS = (10, 20, 50, 100, 200, 500, 1000)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)


@final
@dataclass(frozen=True)
class Quality:
    """Distance of samples to held-out points, for so many evaluations of the network a sample."""

    evaluations: int
    distance: float


def grid(flow: FlowMatching, num_steps: int) -> list[float]:
    """Times from noise to data on which a smooth field is followed with equal care.

    Uniform in t where the path's velocity is finite on [0, 1]; else uniform in ln(alpha / sigma), which VP needs near data.
    """
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    if bool(torch.isfinite(flow.path.sigma_prime(ends)).all()):
        return flow.grid(num_steps)
    return sde_grid(flow, num_steps)


@torch.no_grad()
def log_prob(flow: FlowMatching, network: Velocity, x: Float[Tensor, "B 2"], num_steps: int = 24) -> Float[Tensor, " B"]:
    """log p_1(x) in nats by RK4 with `num_steps` steps and the exact divergence."""
    options = likelihood.DensityOptions(times=grid(flow, num_steps), solver="rk4")
    return likelihood.log_prob(flow, network, x, options=options)


def held_out_nll(flow: FlowMatching, network: Velocity, x: Float[Tensor, "B 2"], num_steps: int = 24) -> float:
    """Mean of -log p_1 over the points, nats."""
    return -float(log_prob(flow, network, x, num_steps).double().mean())


def sliced_wasserstein(x: Float[Tensor, "B 2"], y: Float[Tensor, "B 2"]) -> float:
    """Sliced Wasserstein-2 distance of two sets of equally many points, over DIRECTIONS directions evenly spread."""
    angles = math.pi * (torch.arange(DIRECTIONS, dtype=x.dtype) + 0.5) / DIRECTIONS
    directions = torch.stack([torch.cos(angles), torch.sin(angles)])
    difference = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return math.sqrt(float(difference.square().mean()))


@torch.no_grad()
def ode_curve(
    flow: FlowMatching, network: Velocity, noise: Float[Tensor, "B 2"], held_out: Float[Tensor, "B 2"]
) -> tuple[tuple[Quality, ...], Float[Tensor, "B 2"]]:
    """Quality of the flow's own solver, by number of steps on a fixed grid, by tolerance for dopri5; and the finest samples."""
    curve: list[Quality] = []
    sample = noise
    if flow.solver == "dopri5":
        for tolerance in TOLERANCES:
            counted = Counted(network)
            sample = replace(flow, tolerance=tolerance).sample(counted, noise, times=grid(flow, flow.num_flow_steps), check=False)
            curve.append(Quality(counted.num_evaluations, _distance(sample, held_out)))
        return tuple(curve), sample
    each = num_evaluations(flow.solver, 1)
    for count in sorted({max(1, evaluations // each) for evaluations in EVALUATIONS}):
        sample = flow.sample(network, noise, times=grid(flow, count), check=False)
        curve.append(Quality(each * count, _distance(sample, held_out)))
    return tuple(curve), sample


@torch.no_grad()
def ancestral_curve(
    flow: FlowMatching, network: Velocity, noise: Float[Tensor, "B 2"], held_out: Float[Tensor, "B 2"], seed: int
) -> tuple[tuple[Quality, ...], Float[Tensor, "B 2"]]:
    """(quality of ancestral sampling, its finest samples); one evaluation a step."""
    curve, sample = [], noise
    for count in ANCESTRAL_STEPS:
        sample = sample_ancestral(flow, network, noise, count, generator=torch.Generator().manual_seed(seed))
        curve.append(Quality(count, _distance(sample, held_out)))
    return tuple(curve), sample


def fewest(curve: tuple[Quality, ...], distance: float) -> int | None:
    """The fewest evaluations from which on the distance stays at or below `distance`; None where the last is above it.

    `From which on`: a coarse sampler that comes close by luck does not count.
    """
    found = None
    for quality in reversed(curve):
        if not quality.distance <= distance:
            break
        found = quality.evaluations
    return found


def _distance(sample: Tensor, held_out: Tensor) -> float:
    """Infinite where a coarse sampler has left the numbers."""
    return sliced_wasserstein(sample, held_out) if bool(torch.isfinite(sample).all()) else math.inf
