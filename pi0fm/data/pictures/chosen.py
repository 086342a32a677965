"""Pictures of chosen rows, from video or parquet files.

Owns: reading the files with as little decoding as possible. Does not know: the caller, the frame cache.
"""

import numpy as np
from numpy.typing import NDArray

from pi0fm import progress
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.config import DatasetConfig
from pi0fm.data.pictures.decoding import decoded
from pi0fm.data.pictures.frame_cache import make_job, read_stored
from pi0fm.data.pictures.images import resize_with_padding
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize


def pictures_at(
    source: LeRobotSource, dataset: DatasetConfig, place: NDArray[np.int64], size: int, resize: Resize = ANTIALIAS
) -> NDArray[np.uint8]:
    """Read pictures [M, C, size, size, 3] of the rows at `place` [M], ascending.

    A video is decoded up to the last chosen row of each episode, and only the pictures of chosen rows are kept.
    """
    cameras = list(source.embodiment.cameras)
    found = np.empty((len(place), len(cameras), size, size, 3), np.uint8)
    number = {int(each): k for k, each in enumerate(place)}
    work = sum(len(clips) for clips in source.clips.values()) + len(source.stored_pictures)
    with progress.step("reading pictures", work) as bar:
        for c, camera in enumerate(cameras):
            for clip in source.clips.get(camera, ()):
                wanted = place[(place >= clip.first) & (place < clip.first + clip.count)]
                if len(wanted):
                    last = int(wanted[-1]) + 1
                    for here, picture in enumerate(decoded(make_job(source, dataset, camera, clip.first, last, size, resize)), clip.first):
                        if here in number:
                            found[number[here], c] = picture
                bar.advance()
            if camera in source.stored_pictures:
                for here, value in source.stored(camera):
                    if here in number:
                        whole = read_stored(source, camera, here, value)
                        found[number[here], c] = resize_with_padding(whole[None], size, resize)[0]
                bar.advance()
    return found
