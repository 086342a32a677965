"""Resizing of pictures to the network's square, without distortion.

Owns: resizing with padding. Does not know: cameras, ranges of the network.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pi0fm.data.pictures.resizing import ANTIALIAS, Resize, content_box


def resize_with_padding(images: NDArray[np.uint8], size: int, resize: Resize = ANTIALIAS) -> NDArray[np.uint8]:
    """Resize uint8 [n, height, width, 3] to [n, size, size, 3]: the longer side fills the square, black bands pad the other.

    Bilinear, in one of the forms of pictures/resizing.py. A picture that has the size already is returned as it is.
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    box = content_box(height, width, size, resize)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    if resize == "plain":
        resized = F.interpolate(pixels.float(), size=box, mode="bilinear", align_corners=False).round_().to(torch.uint8)
    else:
        resized = F.interpolate(pixels, size=box, mode="bilinear", antialias=True, align_corners=False)
    padded = np.zeros((len(images), size, size, 3), dtype=np.uint8)
    top, left = (size - box[0]) // 2, (size - box[1]) // 2
    padded[:, top : top + box[0], left : left + box[1]] = resized.permute(0, 2, 3, 1).numpy()
    return padded
