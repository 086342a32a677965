"""Moving average of the trainable weights.

Owns: its tensors and its update. Does not know: the optimiser.
"""

import torch
from torch import Tensor, nn

from pi0fm.train.parallel.sharding import local


class Ema:
    """Average of the weights: `average <- d average + (1 - d) weights`, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The small d of the first updates keeps the random start out of a short run's average. decay None: the live weights, without a copy.
    Frozen weights are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self._live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.average: dict[str, Tensor] = {} if decay is None else {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after step `step`, counted from 0."""
        if self.decay is not None:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(
                [local(each) for each in self.average.values()], [local(each) for each in self._live.values()], 1.0 - decay
            )

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged trainable parameters by name, or the live ones where no average is kept."""
        return self.average if self.decay is not None else {name: value.detach() for name, value in self._live.items()}
