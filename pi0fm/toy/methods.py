"""Three ways to train the same network: flow matching, and its two ancestors.

Owns: the loss of each, its batch and learning rate, and which flow its network answers for. Does not know: the training loop, figures.

    method           loss of a step                                        ODEs solved a step   the network answers
      flow_matching  || v(x_t, t) - u_t(x_t | x_1) ||^2 (arXiv 2210.02747)  none                 what `prediction` says
      cnf            - log p_1(x_1) (arXiv 1806.07366)                      two                  velocity
      diffusion      || e(x_t, t) - x_0 ||^2 on the VP path (2006.11239)    none                 noise

Each is, once trained, a `FlowMatching` with a network: the same code samples all three and computes the density of all three.
Shape letters: B batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.toy.cnf import negative_log_likelihood
from pi0fm.toy.network import PlaneField

Loss = Callable[[PlaneField, Tensor, torch.Generator], Tensor]
"""(network, data [B, 2], generator) -> scalar."""

FLOW_MATCHING, CNF, DIFFUSION = "flow_matching", "cnf", "diffusion"
CNF_SOLVER, CNF_STEPS = "rk4", 3
"""Of the CNF's training: the cheapest found that the CNF does not learn to cheat. Midpoint with 4 steps was: a fine grid then gives an NLL
0.3 nats worse than the training believed."""


@final
@dataclass(frozen=True)
class Method:
    """How a network is trained, and what it is afterwards.

    flow: samples and gives densities with the trained network. title: for figures.
    """

    name: str
    title: str
    flow: FlowMatching
    loss: Loss
    global_batch_size: int
    learning_rate: float


def flow_matching(config: FlowConfig) -> Method:
    """Conditional flow matching with any path, time density, prediction and weighting."""
    flow = FlowMatching.from_config(config)
    return Method(FLOW_MATCHING, "flow matching", flow, matching_loss(flow), 1024, 1e-2)


def cnf(config: FlowConfig) -> Method:
    """Maximum likelihood through the ODE; of `config` only the solver of the sampling has a meaning."""
    flow = FlowMatching.from_config(FlowConfig(time_density="uniform", solver=config.solver))

    def loss(network: PlaneField, x_1: Tensor, generator: torch.Generator) -> Tensor:
        return negative_log_likelihood(network, x_1, CNF_SOLVER, CNF_STEPS)

    return Method(CNF, "CNF", flow, loss, 128, 1e-2)


def diffusion(config: FlowConfig) -> Method:
    """DDPM: VP path, uniform times, noise prediction, plain square; of `config` only the solver of the sampling has a meaning."""
    flow = FlowMatching.from_config(FlowConfig(path="vp", time_density="uniform", prediction="noise", solver=config.solver))
    return Method(DIFFUSION, "diffusion", flow, matching_loss(flow), 1024, 1e-2)


def matching_loss(flow: FlowMatching) -> Loss:
    """`E || network(x_t, t) - target ||^2`, weighted as the flow says, with one t and one noise for each point.

    The uniform numbers behind the times are stratified, one in each of B equal parts of [0, 1): unbiased, and less noisy.
    """

    def loss(network: PlaneField, x_1: Float[Tensor, "B 2"], generator: torch.Generator) -> Float[Tensor, ""]:
        parts = torch.arange(len(x_1), dtype=x_1.dtype)
        uniform = (parts + torch.rand(len(x_1), generator=generator, dtype=x_1.dtype)) / len(x_1)
        # Rounding may reach 1, where some densities have no quantile.
        t = flow.times(uniform.clamp(max=1 - torch.finfo(x_1.dtype).eps))
        x_0 = torch.randn(x_1.shape, generator=generator, dtype=x_1.dtype)
        pair = flow.training_pair(x_1, t, x_0)
        return flow.mean_loss(network(pair.x_t, t), pair.target, torch.ones_like(x_1, dtype=torch.bool), t)

    return loss
