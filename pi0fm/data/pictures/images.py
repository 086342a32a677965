"""Pictures of any size to the network's square, without distortion.

Owns: resizing with padding. Does not know: cameras, ranges of the network.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray


def resize_with_padding(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 [n, height, width, 3] to [n, size, size, 3]: the longer side fills the square, black bands pad the other.

    Bilinear with antialiasing. A picture that has the size already is returned as it is.
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, size=(new_height, new_width), mode="bilinear", antialias=True, align_corners=False)
    padded = np.zeros((len(images), size, size, 3), dtype=np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    padded[:, top : top + new_height, left : left + new_width] = resized.permute(0, 2, 3, 1).numpy()
    return padded
