"""AdamW, warm-up and cosine.

Owns: the optimiser's options, its parameter groups, the learning rate as a pure function of the step. Does not know: the loop.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from pi0fm.errors import ConfigError
from pi0fm.options import option


@dataclass(frozen=True)
class OptimizerConfig:
    """openpi's defaults."""

    learning_rate: float = option(2.5e-5, "peak learning rate")
    final_learning_rate_ratio: float = option(0.1, "learning rate at the last step over the peak")
    warmup_steps: int = option(1000, "steps from 0 to the peak")
    beta1: float = option(0.9, "decay of the mean gradient")
    beta2: float = option(0.95, "decay of the mean squared gradient")
    weight_decay: float = option(1e-10, "pull of the matrices towards 0; norms and biases have none")
    clip_norm: float = option(1.0, "largest norm of the gradient")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ConfigError(f"learning_rate and clip_norm must be > 0, found {self.learning_rate} and {self.clip_norm}")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise ConfigError(f"final_learning_rate_ratio must lie in [0, 1], found {self.final_learning_rate_ratio}")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError(f"warmup_steps and weight_decay must be >= 0, found {self.warmup_steps} and {self.weight_decay}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1 and beta2 must lie in [0, 1), found {self.beta1} and {self.beta2}")


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over what trains, in one fused kernel; the moments have the type of the weights, float32 under every precision."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step 0..steps-1: linear warm-up to the peak, then a half cosine to `final_learning_rate_ratio` of it.

    Warm-up takes at most a tenth of the run, so that a short run reaches its peak.
    """
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    low = config.final_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
