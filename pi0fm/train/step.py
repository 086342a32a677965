"""One optimiser step: the thirty lines to read first.

    Batch -> t = times(uniform) -> training_pair(actions, t, noise) -> model(observation, x_t, t) -> masked sum of squares
             for real-time chunking the first rows are kept clean, at t = 1, and masked out of the loss (flow/committed.py)
          -> / valid elements of the whole global batch -> gradients, averaged over workers -> clip -> AdamW

Owns: the loss's normalisation. Does not know: where batches come from, when to log or save.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pi0fm.data.loading.batch import Batch
from pi0fm.flow.committed import held_rows, hold, row_times
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.train.optim import unwrapped
from pi0fm.train.parallel.accelerate import Accelerator


def train_step(
    model: Pi0,
    flow: FlowMatching,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    batches: Iterator[Batch],
    valid_elements: int,
    clip_norm: float,
) -> tuple[Tensor, Tensor]:
    """Train on the next `gradient_accumulation_steps` batches: (this worker's part of the mean loss, norm of the gradient), on the device.

    A norm that is not finite, the same on all workers, leaves weights and moments unchanged, without a host sync.
    valid_elements: entries of the whole global batch that the loss counts, over all workers, micro batches and flow draws, so that the
        gradient does not depend on the split.
    """
    micro_steps = accelerator.gradient_accumulation_steps
    # accelerate divides by the micro steps and the workers' gradients are averaged: both are undone here
    valid_elements = max(1, valid_elements)  # every row may be held
    scale = micro_steps * accelerator.num_processes / valid_elements
    part = torch.zeros((), device=accelerator.device)
    norm = torch.zeros((), device=accelerator.device)
    for _ in range(micro_steps):
        batch = next(batches).to(accelerator.device).augmented()
        with accelerator.accumulate(model):
            draws = batch.uniform.shape[1]  # pairs (noise, t) that train on one encoding of the observation
            t = flow.times(batch.uniform.flatten())
            actions, mask = batch.actions.repeat_interleave(draws, dim=0), batch.action_mask.repeat_interleave(draws, dim=0)
            pair = flow.training_pair(actions, t, batch.noise.flatten(0, 1))
            x_t, each_t = pair.x_t, t
            if batch.delays is not None:
                held = held_rows(batch.delays.flatten(), actions.shape[1])
                each_t = row_times(held, t)
                x_t, mask = hold(held, actions, x_t, mask)
            predicted = model(batch.observation, x_t, each_t)
            total, _ = flow.loss(predicted, pair.target, mask, t)
            # a loss that is not finite makes every gradient so, on every worker: all see the same norm, and none takes the step
            accelerator.backward(total * torch.where(total.detach().isfinite(), scale, math.nan))
            if accelerator.sync_gradients:
                norm = _clip(model, optimizer, accelerator, clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        part += total.detach() / valid_elements
    return part, norm


def _clip(model: Pi0, optimizer: torch.optim.Optimizer, accelerator: Accelerator, clip_norm: float) -> Tensor:
    """Clip, and return the gradient's norm. An optimiser other than ClippedAdamW is clipped in place, and applies non-finite gradients."""
    ours = unwrapped(optimizer)
    return accelerator.clip_grad_norm_(model.parameters(), clip_norm) if ours is None else ours.clip(clip_norm)
