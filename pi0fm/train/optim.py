"""AdamW with fused gradient clipping; learning rate with warm-up and cosine decay.

Owns: the optimiser and its options, its parameter groups, the learning rate as a pure function of the step. Does not know: the loop.
"""

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from pi0fm.train.components import OptimizerConfig
from pi0fm.train.parallel.sharding import cutting_group, local


@final
class ClippedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose kernel scales each gradient as it reads it, which saves a separate pass for clipping.

    All parameters share one step count: torch's `step` keeps one for each, and spends a third of its time on them (docs/LOG.md).
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=learning_rate, betas=betas, fused=True)
        self._divisor: Tensor | None = None
        self._refused: Tensor | None = None

    def allocate_moments(self) -> None:
        """Make zero moments for every parameter without any, and the shared count, on the parameters' device as the kernel requires."""
        missing = [parameter for group in self.param_groups for parameter in group["params"] if not self.state[parameter]]
        if missing:
            held = (state["step"] for state in self.state.values() if state)
            count = next(held, torch.zeros((), device=missing[0].device))
            for parameter in missing:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": count, **moments}

    def clip(self, largest_norm: float) -> Tensor:
        """Return the norm of all gradients, over the rows of every worker.

        The next `step` scales the gradients to a norm of at most `largest_norm`, and changes nothing if the norm is not finite.
        There is no host sync: the kernel reads the norm on the device, as with torch.amp.GradScaler.
        """
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm([local(gradient) for gradient in gradients])
        if gradients and (group := cutting_group(gradients[0])) is not None:  # all of a network is sharded, or none of it
            square = norm.square()
            torch.distributed.all_reduce(square, group=group)
            norm = square.sqrt()
        self._divisor, self._refused = (norm / largest_norm).clamp_(min=1.0), (~norm.isfinite()).float()
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step with the present gradients, clipped if `clip` was called before. A closure is refused."""
        if closure is not None:
            raise TypeError("ClippedAdamW takes no closure: compute the loss and its gradient before the step")
        self.allocate_moments()
        taken = 1.0 if self._refused is None else 1.0 - self._refused
        for count in {id(state["step"]): state["step"] for state in self.state.values()}.values():
            count.add_(taken)
        for group in self.param_groups:
            if not (moved := [parameter for parameter in group["params"] if parameter.grad is not None]):
                continue
            states = [self.state[parameter] for parameter in moved]
            torch._fused_adamw_(
                [local(parameter) for parameter in moved],
                [local(parameter.grad) for parameter in moved],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=self._divisor,
                found_inf=self._refused,
            )
        self._divisor = self._refused = None


def unwrapped(optimizer: torch.optim.Optimizer) -> ClippedAdamW | None:
    """Return the ClippedAdamW, out of accelerate's wrapper if needed; None for another optimiser."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, ClippedAdamW) else None


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> ClippedAdamW:
    """Make AdamW over the trainable parameters; its moments have the type of the weights, float32 under every precision."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return ClippedAdamW(groups, config.learning_rate, (config.beta1, config.beta2))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step 0..steps-1: linear warm-up to the peak, then a half cosine to `final_learning_rate_ratio` of the peak.

    The cosine ends after `decay_steps`, else with the run. Warm-up takes at most a tenth of that, so that a short run reaches its peak.
    """
    steps = config.decay_steps or steps
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
