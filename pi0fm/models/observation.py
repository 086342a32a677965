"""Input of a network, in tensors and normalised units.

Owns: `ModelObservation`, the conversion of pictures from uint8 to [-1, 1]. Does not know: robots, files, units.
Shape letters: B batch, C cameras, L prompt tokens, S padded state dim.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

PROMPT_MULTIPLE = 8  # prompts are trimmed to the batch's longest, rounded up: few distinct shapes, little padding


@dataclass(frozen=True)
class ModelObservation:
    """Batch of observations.

    images: uint8 [B, C, height, width, 3]; they stay uint8 until they are on the device, a quarter of the bytes to move.
    image_mask: [B, C], False where a camera is missing.
    prompt_tokens, prompt_mask: [B, L], False on padding.
    state: [B, S], normalised, zero on padded dimensions.
    """

    images: UInt8[Tensor, "B C height width 3"]
    image_mask: Bool[Tensor, "B C"]
    prompt_tokens: Int64[Tensor, "B L"]
    prompt_mask: Bool[Tensor, "B L"]
    state: Float[Tensor, "B S"]

    def to(self, device: torch.device) -> "ModelObservation":
        """Copy to `device`; copies from pinned memory do not block."""
        return ModelObservation(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})

    def trimmed(self, multiple: int = PROMPT_MULTIPLE) -> "ModelObservation":
        """Drop the cameras that no row has and the prompt columns that no row uses, rounded up to a multiple.

        Masked tokens take no position and are never seen, so no answer changes. Reads masks: call it on the host.
        """
        cameras = self.image_mask.any(dim=0)
        longest = int(self.prompt_mask.sum(dim=1).max())
        kept = min(self.prompt_mask.shape[1], -(-longest // multiple) * multiple)
        images, image_mask = self.images, self.image_mask
        if not bool(cameras.all()):
            images, image_mask = images[:, cameras], image_mask[:, cameras]
        return ModelObservation(images, image_mask, self.prompt_tokens[:, :kept], self.prompt_mask[:, :kept], self.state)

    def padded(self, rows: int, cameras: int, prompt_tokens: int) -> "ModelObservation":
        """Append masked cameras and prompt columns, and repeat the last row: the inverse of `trimmed`. No picture is copied needlessly."""
        missing, free = cameras - self.images.shape[1], prompt_tokens - self.prompt_tokens.shape[1]
        prompt = (F.pad(each, (0, free)) for each in (self.prompt_tokens, self.prompt_mask))
        images, image_mask = self.images, self.image_mask
        if missing:
            images, image_mask = F.pad(images, (0, 0) * 3 + (0, missing)), F.pad(image_mask, (0, missing))
        found: tuple[Tensor, ...] = (images, image_mask, *prompt, self.state)
        if rows > len(self):
            repeated = torch.arange(rows).clamp(max=len(self) - 1)
            found = tuple(each[repeated] for each in found)
        return ModelObservation(*found)

    def is_whole(self) -> bool:
        """Whether every camera and every prompt token of every row is real, so that no mask is needed. Reads masks, as `trimmed` does."""
        return bool(self.image_mask.all() and self.prompt_mask.all())

    def __len__(self) -> int:
        return self.state.shape[0]


def pixels(images: UInt8[Tensor, "*n height width 3"]) -> Float[Tensor, "*n 3 height width"]:
    """Convert uint8 [..., height, width, 3] in 0..255 to float32 [..., 3, height, width] in [-1, 1], SigLIP's range."""
    return images.movedim(-1, -3).float() * (2.0 / 255.0) - 1.0
