"""A picture that a parquet file holds: as bytes, as the path of a file, or both.

Owns: finding its bytes, which modes of pictures are colour. Does not know: data sets, sizes of the network.

    8-bit colour, gray, palette, with or without alpha -> RGB; a gray value is red, green and blue, alpha is dropped
    16-bit, 32-bit, floating point                     -> refused: a depth map, or values of an unknown range
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pi0fm_client.errors import DatasetError

COLOUR = ("RGB", "RGBA", "RGBX", "L", "LA", "La", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB")


def stored_picture(value: Any, folders: Sequence[Path], what: str) -> NDArray[np.uint8]:
    """Decode a row's value to uint8 [height, width, 3]. folders: bases of a relative path; what: names the row in messages.

    Raises DatasetError for an empty value, a missing file, a broken picture, or one that is no colour picture.
    """
    content = _content(value, folders, what)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.mode not in COLOUR:
                raise DatasetError(
                    f"{what} must be a colour or gray picture of 8 bits, found mode {picture.mode!r}, a depth map; leave this camera out"
                )
            return np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise DatasetError(f"{what} cannot be decoded ({reason:.120}); record or download the data set again") from None


def _content(value: Any, folders: Sequence[Path], what: str) -> bytes:
    content, path = value, None
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        content, path = None, value
    if isinstance(content, bytes) and content:
        return content
    if not isinstance(path, str) or not path:
        raise empty_picture_error(what, value)
    try:
        file = next((each for folder in folders if (each := folder / path).is_file()), None)
        if file is not None:
            return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{what} is the file {path:.120}, which cannot be read ({reason}); copy it again") from None
    raise DatasetError(f"{what} names the file {path:.120}, which is not in {folders[0]}; copy the pictures too")


def is_empty(value: Any) -> bool:
    """Whether a row holds neither a picture nor the path of one."""
    return not (any(value.get(name) for name in ("bytes", "path")) if isinstance(value, Mapping) else value)


def empty_picture_error(what: str, value: Any) -> DatasetError:
    """Make the error of a row without a picture."""
    found = "null" if value is None else "neither bytes nor a path"
    return DatasetError(f"{what} must be a picture, found {found}; leave the episode out")
