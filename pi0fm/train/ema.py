"""The moving average of the weights that train.

Owns: its tensors and its update. Does not know: the optimiser.
"""

import torch
from torch import Tensor, nn

from pi0fm.train.parallel.sharding import local


class Ema:
    """`average <- d average + (1 - d) weights`, with d = min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not
    averaged with its random start. decay None follows the weights exactly and keeps no copy. What is frozen is its own average.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self._live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.average: dict[str, Tensor] = {} if decay is None else {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (counted from 0)."""
        if self.decay is not None:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(
                [local(each) for each in self.average.values()], [local(each) for each in self._live.values()], 1.0 - decay
            )

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters that train, by name; the live ones where no average is kept."""
        return self.average if self.decay is not None else {name: value.detach() for name, value in self._live.items()}
