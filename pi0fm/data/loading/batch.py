"""Tensors of one forward pass, and their transfer between memories.

Owns: `Batch`, its copies on a device or in page-locked memory, its tensors by name. Does not know: where samples come from.
Shape letters: B micro batch, K flow draws, H horizon, A action dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pi0fm.data.pictures.augmentation import Augmentation, augment
from pi0fm.models.observation import ModelObservation


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass.

    actions: [B, H, A] normalised and padded; action_mask: [B, H, A], False past the episode's end and on padded dimensions;
    noise: [B, K, H, A], K flow draws of each observation; uniform: [B, K] in [0, 1), which the time density maps to t;
    delays: [B, K], number of leading rows of a chunk that are held clean (flow/committed.py), None for none;
    augmentation: changes still to be made to the pictures on the device, None for none.
    """

    observation: ModelObservation
    actions: Float[Tensor, "B H A"]
    action_mask: Bool[Tensor, "B H A"]
    noise: Float[Tensor, "B K H A"]
    uniform: Float[Tensor, "B K"]
    augmentation: Augmentation | None = None
    delays: Int64[Tensor, "B K"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`; copies from page-locked memory do not block."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Copy to page-locked memory."""
        return self._each(Tensor.pin_memory)

    def augmented(self) -> "Batch":
        """Apply the augmentation on the batch's device; the batch itself where there is none."""
        if self.augmentation is None:
            return self
        seen = replace(self.observation, images=augment(self.observation.images, self.augmentation))
        return replace(self, observation=seen, augmentation=None)

    def tensors(self) -> list[Tensor]:
        """List all tensors."""
        return list(self.named().values())

    def named(self) -> dict[str, Tensor]:
        """All tensors by name, such as `noise` and `observation.state`."""
        found: dict[str, Tensor] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                found[item.name] = value
            elif value is not None:
                found |= {f"{item.name}.{inner.name}": getattr(value, inner.name) for inner in fields(value)}
        return found

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor]) -> "Batch":
        """Inverse of `named`."""
        parts: dict[str, dict[str, Tensor]] = {"": {}, "observation": {}, "augmentation": {}}
        for name, tensor in tensors.items():
            part, _, inner = name.rpartition(".")
            parts[part][inner] = tensor
        augmentation = Augmentation(**parts["augmentation"]) if parts["augmentation"] else None
        return cls(ModelObservation(**parts["observation"]), **parts[""], augmentation=augmentation)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch.from_named({name: change(tensor) for name, tensor in self.named().items()})
