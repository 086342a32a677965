"""Forms of resizing a picture to the network's square, one for each that weights were trained with.

Owns: their names, the box that the content fills, the refusal of a picture whose size differs from the data set's.
Does not know: pixels (images), which form a policy has (its bundle says).

    antialias   openpi's: the box is the integer part of size / ratio, filtered where it is scaled down
    plain       LeRobot's: the same box, bilinear interpolation between four pixels however far it is scaled down
    rounded     bundles of pi0fm before format 3: the box is rounded, filtered
"""

from typing import Any, Literal

from pi0fm_client.errors import DatasetError

Sizes = tuple[tuple[int, int], ...]
Resize = Literal["antialias", "plain", "rounded"]
ANTIALIAS: Resize = "antialias"
RESIZES: tuple[Resize, ...] = ("antialias", "plain", "rounded")


def content_box(height: int, width: int, size: int, resize: Resize) -> tuple[int, int]:
    """(height, width) of a picture inside the square; at least one pixel each."""
    ratio = max(width / size, height / size)
    if resize == "rounded":
        scale = size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    return max(1, int(height / ratio)), max(1, int(width / ratio))


def refuse_size(what: str, picture: Any, sizes: Sizes) -> None:
    """Raise DatasetError for a picture [height, width, 3] that does not have each of `sizes`. what: names the picture in the message."""
    for declared in sizes:
        if picture.shape[:2] != declared:
            height, width = picture.shape[:2]
            raise DatasetError(
                f"{what} is {height} pixels high and {width} wide, but meta/info.json says {declared[0]} and {declared[1]}; "
                "correct the shape in meta/info.json, or download the data set again"
            )
