"""Choice of the sampler, made only here.

Owns: the function of each solver's name, and the random numbers that it needs. Does not know: where they come from.

    solver                                 runs                            increments [K, B, ...]
    euler midpoint heun rk4 dopri5         FlowMatching.sample             none
    euler_maruyama                         stochastic.sample_sde           num_flow_steps of them
    ancestral                              stochastic.sample_ancestral     num_flow_steps of them
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pi0fm.flow.config import ANCESTRAL, EULER_MARUYAMA, SOLVERS, STOCHASTIC_SOLVERS, FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import Velocity
from pi0fm.flow.stochastic import sample_ancestral, sample_sde
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError

SAMPLERS = (*SOLVERS, *STOCHASTIC_SOLVERS)


def sample(
    flow: FlowMatching,
    network: Velocity,
    noise: Float[Tensor, "B *rest"],
    mask: Bool[Tensor, "B *rest"] | None = None,
    *,
    num_flow_steps: int | None = None,
    solver: str | None = None,
    increments: Float[Tensor, "K B *rest"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B *rest"]:
    """Sample x at t = 1 from `noise` ~ N(0, I), by the given solver.

    num_flow_steps, solver: instead of the flow's own; solver is a word of SAMPLERS.
    increments, generator: the random numbers of a stochastic solver, `num_increments` of them; a solver of the ODE reads neither.
    Raises ConfigError for an unknown solver and a stochastic one without random numbers, FlowError as the sampler.
    """
    word = solver or flow.solver
    steps = flow.num_flow_steps if num_flow_steps is None else num_flow_steps
    if word not in SAMPLERS:
        raise ConfigError(f"unknown solver {word!r}: {nearest(word, SAMPLERS)}")
    if word == EULER_MARUYAMA:
        return sample_sde(flow, network, noise, flow.noise_level, steps, generator=generator, increments=increments, mask=mask)
    if word == ANCESTRAL:
        return sample_ancestral(flow, network, noise, steps, generator=generator, increments=increments, mask=mask)
    return flow.sample(network, noise, steps, word, mask)


def num_increments(flow: FlowMatching, num_flow_steps: int | None = None, solver: str | None = None) -> int:
    """Number of standard normal numbers per entry in addition to its noise: one per step of a stochastic solver, else none."""
    steps = flow.num_flow_steps if num_flow_steps is None else num_flow_steps
    return steps if (solver or flow.solver) in STOCHASTIC_SOLVERS else 0


def overridden(
    config: FlowConfig, num_flow_steps: int | None = None, solver: str | None = None, noise_level: float | None = None
) -> FlowConfig:
    """Change the sampling of `config`; None keeps a value, except a noise_level that the new solver does not read.

    Raises ConfigError as FlowConfig does.
    """
    chosen = solver or config.solver
    kept = config.noise_level if chosen == EULER_MARUYAMA else 1.0
    return replace(
        config,
        num_flow_steps=config.num_flow_steps if num_flow_steps is None else num_flow_steps,
        solver=chosen,
        noise_level=kept if noise_level is None else noise_level,
    )
