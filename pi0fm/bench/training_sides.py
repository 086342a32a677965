"""One optimiser step of LeRobot's PI0, and one of ours, on a batch that is given.

Owns: what each side's step consists of. Does not know: clocks, memory, the other side's weights.

    LeRobot   its model's forward with noise and time given -> mean -> backward -> clip -> AdamW, as its `update_policy` does
    ours      train.step.train_step, the very function of `pi0fm train`, with accelerate's precision

Neither side's step reads data or averages weights. Ours takes its batch as the chain leaves it: bytes of pictures.
LeRobot is imported by who builds its policy, not here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pi0fm.bench.peer_cases import their_prefix
from pi0fm.data.loading.batch import Batch
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.train.optim import OptimizerConfig, make_optimizer
from pi0fm.train.parallel.accelerate import Accelerator, make_accelerator
from pi0fm.train.step import train_step


def make_flow() -> FlowMatching:
    """pi0's."""
    return FlowMatching.from_config(FlowConfig())


def their_loss(model: nn.Module, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """LeRobot's mean loss on one draw an observation; its tensors are prepared now. Its clock is 1 - t."""
    prefix, state = their_prefix(batch.observation, device), batch.observation.state.to(device)
    actions, noise = batch.actions.to(device), batch.noise[:, 0].to(device)
    time = (1.0 - make_flow().times(batch.uniform[:, 0])).to(device)

    def loss() -> Tensor:
        return model(*prefix, state, actions, noise, time).mean()

    return loss


def their_step(policy: Any, batch: Batch, device: torch.device, fused: bool, bfloat16: bool = False) -> Callable[[], float]:
    """One step of LeRobot's policy. fused: its AdamW with ours' kernel, else its own preset. bfloat16: under autocast."""
    preset = policy.config.get_optimizer_preset()
    policy.train()
    optimizer = preset.build(policy.get_optim_params())
    if fused:
        optimizer = torch.optim.AdamW(
            policy.get_optim_params(), lr=preset.lr, betas=preset.betas, weight_decay=preset.weight_decay, fused=True
        )
    loss_of = their_loss(policy.model, batch, device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def our_loss(model: Pi0, batch: Batch, device: torch.device) -> Tensor:
    """The mean loss that `train_step` sends backwards, when every entry of the batch is real."""
    flow, given = make_flow(), batch.to(device)
    draws = given.uniform.shape[1]
    t = flow.times(given.uniform.flatten())
    actions, mask = given.actions.repeat_interleave(draws, dim=0), given.action_mask.repeat_interleave(draws, dim=0)
    pair = flow.training_pair(actions, t, given.noise.flatten(0, 1))
    total, count = flow.loss(model(given.observation, pair.x_t, t), pair.target, mask, t)
    return total / count


def prepared(model: Pi0, precision: str, device: torch.device) -> tuple[Pi0, torch.optim.Optimizer, Accelerator]:
    """The model in training, its AdamW, and accelerate with the precision of `pi0fm train --precision`."""
    accelerator = make_accelerator(precision, 1, allow_cuda=device.type == "cuda")
    trained, optimizer = accelerator.prepare(model.to(device).train(), make_optimizer(OptimizerConfig(), model))
    return trained, optimizer, accelerator


def our_step(model: Pi0, batch: Batch, precision: str, device: torch.device) -> Callable[[], float]:
    """One step of ours, under accelerate."""
    return step_of(*prepared(model, precision, device), batch)


def step_of(model: Pi0, optimizer: torch.optim.Optimizer, accelerator: Accelerator, batch: Batch) -> Callable[[], float]:
    """One step of what `prepared` gave; several may share it, with other batches."""
    flow, clip, batches = make_flow(), OptimizerConfig().clip_norm, _again(batch)
    valid = int(batch.action_mask.sum()) * batch.uniform.shape[1]

    def step() -> float:
        loss, _ = train_step(model, flow, optimizer, accelerator, batches, valid, clip)
        return float(loss)

    return step


def _again(batch: Batch) -> Iterator[Batch]:
    """The batch without end, trimmed each time as the chain trims what it makes."""
    while True:
        yield replace(batch, observation=batch.observation.trimmed())
