"""The log-density and the noise of predicted or given chunks under a policy.

Owns: `Scores` and their options, the velocity of fixed observations, sampling with its density, the Jacobian of the chain.
Does not know: files, simulators, which seed a call has.

    predicted   noise --- flow.sample and the divergence, one pass ---> chunk, log_prob, noise_norm
                noise --- a stochastic solver, or another than the density's ---> chunk --- push_backward ---> log_prob, noise_norm
    given       chunk --- chain.forward, push_backward ---> log_prob, noise_norm

Which density: log p(chunk | observation) of the *normalised* chunk under the probability-flow ODE of the policy, in nats, over the
robot's own H x A entries; padded dimensions are held at 0 and are no part of it. It is the density of the solver's
samples as its steps become small. `log_jacobian` added to it gives the density in robot units.
Shape letters: B batch, H action horizon, A action dim (robot's for arrays, the network's for tensors).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from pi0fm.data.chain import Chain, DeltaActions, Normalize, PadDimensions, Sample
from pi0fm.flow.config import FIXED_GRID_SOLVERS
from pi0fm.flow.density import DensityOptions, DensityResult, density_solver, push_backward, push_forward
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import sample
from pi0fm.flow.solver import Velocity, check_solver
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import CachedVelocity, Pi0
from pi0fm.models.prefix_cache import KeyValue, PrefixCache
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Observation


@dataclass(frozen=True)
class ScoreOptions:
    """How scores are computed.

    num_probes: of Hutchinson's estimate, drawn from each chunk's noise seed; 0 is the exact divergence, H A products a step.
    num_flow_steps, solver: of the density, in place of the policy's own; a solver of the ODE. A policy that samples with noise is
        scored with flow.density.SOLVER_BESIDE_NOISE unless a solver is named.
    float64: suffix, state and integral in float64, behind a prefix in the policy's own precision.
    chunk_size: products of the exact divergence that run at once; memory grows with it, None runs all.
    Raises ConfigError for numbers out of range and an unknown solver.
    """

    num_probes: int = 1
    num_flow_steps: int | None = None
    solver: str | None = None
    float64: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_probes < 0:
            raise ConfigError(f"num_probes must be 0 or more, found {self.num_probes}; 0 is the exact divergence")
        for name in ("num_flow_steps", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, found {value}; leave it out for the policy's own")
        if self.solver is not None:
            check_solver(self.solver)

    def density(self, probes: Tensor | None) -> DensityOptions:
        """The same for the flow library."""
        return DensityOptions(probes, self.num_flow_steps, self.solver, chunk_size=self.chunk_size, float64=self.float64)


@final
@dataclass(frozen=True)
class Scores:
    """Of one chunk each; float64 [B].

    log_prob: log-density of the normalised chunk given its observation, nats.
    noise_norm: Euclidean norm of the noise that the flow carries to the chunk; sqrt(H A) is typical of the policy's samples.
    log_jacobian: log |d normalised / d robot units|, the same for every chunk.
    """

    log_prob: NDArray[np.float64]
    noise_norm: NDArray[np.float64]
    log_jacobian: float

    @property
    def robot_log_prob(self) -> NDArray[np.float64]:
        """Log-density of the chunk in robot units, nats."""
        return self.log_prob + self.log_jacobian

    def each(self) -> list[dict[str, float]]:
        """`ActionChunk.scores` of each chunk."""
        return [
            {"log_prob": float(density), "noise_norm": float(norm)} for density, norm in zip(self.log_prob, self.noise_norm, strict=True)
        ]


def make_scores(pushed: DensityResult, chain: Chain, horizon: int) -> Scores:
    """Convert the flow's tensors to Scores."""
    density, norm = (tensor.double().cpu().numpy() for tensor in (pushed.log_prob, pushed.noise_norm))
    return Scores(density, norm, log_jacobian(chain, horizon))


def conditioned(model: Pi0, cache: PrefixCache, state: Float[Tensor, "B S"], chunks: int = 1) -> Velocity:
    """(x, t) -> the network's answer for the cached observations, `chunks` rows each.

    Float64 needs a `model.double()` and takes the cache as it is: the prefix keeps the rounding of its own precision.
    """
    if model.action_in.weight.dtype == torch.float64:
        layers = tuple(KeyValue(layer.key.double(), layer.value.double()) for layer in cache.layers)
        cache, state = replace(cache, layers=layers), state.double()
    return CachedVelocity(model, cache, state, chunks=chunks)


def sample_and_score(
    flow: FlowMatching,
    velocity: Velocity,
    scoring: Velocity,
    noise: Float[Tensor, "B H A"],
    mask: Bool[Tensor, "B H A"],
    options: ScoreOptions,
    *,
    probes: Float[Tensor, "n B H A"] | None,
    increments: Float[Tensor, "K B H A"] | None,
) -> DensityResult:
    """Chunks from noise, by the flow's own sampler, with their density; call it under torch.no_grad.

    One pass where the density is computed along the very trajectory that samples; else the chunk first, then backwards from it.
    scoring: `velocity`, or its float64 form under that option.
    """
    same_steps = options.num_flow_steps in (None, flow.num_flow_steps)
    density = options.density(probes)
    # dopri5 would choose other steps with a density in its state, and so another chunk.
    same_path = flow.solver in FIXED_GRID_SOLVERS and density_solver(flow, density) == flow.solver
    if same_steps and same_path and not options.float64:
        return push_forward(flow, velocity, noise, mask, density)
    chunk = sample(flow, velocity, noise, mask, increments=increments)
    pushed = push_backward(flow, scoring, chunk, mask, density)
    # The sampled chunk, in its own precision: scores never change a robot's actions.
    return DensityResult(pushed.noise, chunk, pushed.log_prob)


def log_jacobian(chain: Chain, horizon: int) -> float:
    """log |d normalised / d robot units| of a chunk: minus the logarithms of the scales, for each of `horizon` rows.

    Differences to the state and padding keep volumes.
    """
    total = 0.0
    for transform in chain.transforms:
        if isinstance(transform, Normalize):
            total -= horizon * float(np.log(transform.action.scale.astype(np.float64)).sum())
        elif not isinstance(transform, DeltaActions | PadDimensions):
            raise TypeError(f"the Jacobian of {type(transform).__name__} is not known: teach it to policy/sampling/scores.py")
    return total


def observe_given(chain: Chain, observations: Sequence[Observation], actions: NDArray[np.float32]) -> tuple[ModelObservation, Tensor]:
    """Observations for the network, and their chunks [B, H, robot A] normalised and padded as in training."""
    inputs = chain.observe(observations)
    state = np.stack([np.asarray(observation.state, dtype=np.float32) for observation in observations])
    normal = chain.forward(Sample(state, actions)).actions
    assert normal is not None
    return inputs, torch.from_numpy(np.ascontiguousarray(normal))
