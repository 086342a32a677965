"""Checks of a data set that need a policy's prompt or its pictures, made before the first step.

Owns: instructions against a tokenizer, first and last picture of every file, or all. Does not know: the caller (a run, `pi0fm doctor`).

    instruction   empty, or longer than the network's prompt     every sentence that a used row has; with a state in the prompt the longest
    video         cannot be opened, or lacks a row's picture     `ends`: the rows at both ends of each file; `all`: every row
    stored        null                                           every row, by the file's own count of them
    stored        broken, missing, no colour picture             as for a video, in each parquet file
    any           a mean other than in meta/episodes             `all`
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0fm.data.chain import Chain, Sample
from pi0fm.data.columns.faults import Fault
from pi0fm.data.columns.lerobot_source import Clip, LeRobotSource
from pi0fm.data.columns.metadata import read_means
from pi0fm.data.columns.tables import may_be_null, read_faults
from pi0fm.data.config import DatasetConfig, Extent
from pi0fm.data.pictures.decoding import TooFarError, decoded_at_full_size
from pi0fm.data.pictures.frame_cache import make_job, read_stored, wider_tolerance
from pi0fm.data.pictures.stored import is_empty
from pi0fm.data.prompt import bin_numbers
from pi0fm.machine import cores
from pi0fm_client.errors import DatasetError, ObservationError

TOO_FAR = "too far"  # replaced by `video` once the tolerance that all rows need is known
EPISODES_OF_A_MEAN = 3  # fewer give no usual shift
LEAST_SHIFT = 0.05  # of the mean of a channel in 0..1


def prompt_faults(source: LeRobotSource, chain: Chain) -> list[Fault]:
    """Faults of instructions that make no valid prompt, at the first row of every episode that has one."""
    frames, tokenizer = source.frames, chain.tokenizer
    state = chain.forward(Sample(source.state[frames], None)).state[:, : source.state.shape[1]]
    bad: list[tuple[NDArray[np.int64], str, bool]] = []
    needed = 0
    for task in np.unique(source.task[frames]).tolist():
        rows = np.flatnonzero(source.task[frames] == task)
        text = source.tasks[task]
        longest = rows[0]
        if tokenizer.with_state:  # a prompt is longest where the state's numbers have most characters
            widths = np.zeros(len(rows), dtype=np.int64)
            for dim in range(state.shape[1]):
                number = bin_numbers(state[rows, dim])
                widths += np.where(number >= 100, 3, np.where((number >= 10) | (number < 0), 2, 1))
            longest = rows[int(widths.argmax())]
        try:
            count = tokenizer.length(text, state[longest])
        except ObservationError as error:
            bad.append((rows, str(error), False))
            continue
        needed = max(needed, count)
        if count > tokenizer.max_tokens:
            bad.append((rows, f"the prompt must fit into {tokenizer.max_tokens} tokens, found {count}: {text!r:.120}", True))
    faults: list[Fault] = []
    for rows, rule, is_long in bad:
        remedy = "write the sentence into meta/tasks.parquet"
        if is_long:
            remedy = f"shorten it in meta/tasks.parquet, or type --model.max_prompt_tokens {needed}"
        episodes, first = np.unique(source.episode[frames[rows]], return_index=True)
        for episode, row in zip(episodes.tolist(), source.rows[frames[rows[first]]].tolist(), strict=True):
            faults.append(Fault("prompt", f"row {row} of episode {episode} of {source.root}: {rule}", remedy, episode))
    return faults


def picture_faults(
    source: LeRobotSource, config: DatasetConfig, extent: Extent, done: Callable[[int], None] = lambda count: None
) -> list[Fault]:
    """Faults of rows without a picture. done: called for every file.

    A file that fails is judged episode by episode, so that its other episodes are known to be good.
    """
    if extent == "none":
        return []
    means: dict[tuple[str, int], NDArray[np.float64]] = {}
    work: list[partial[list[Fault]]] = []
    for camera, clips in source.clips.items():
        ordered = sorted(clips, key=lambda clip: (clip.file, clip.begin))
        for _, group in groupby(ordered, key=lambda clip: clip.file):
            work.append(partial(_video_faults, source, config, camera, list(group), extent, means))
    for camera in source.stored_pictures:
        work.append(partial(_stored_faults, source, camera, extent, means))

    def judged(each: partial[list[Fault]]) -> list[Fault]:
        found = each()
        done(1)
        return found

    with ThreadPoolExecutor(cores()) as threads:
        faults = [fault for found in threads.map(judged, work) for fault in found]
    if any(fault.kind == TOO_FAR for fault in faults):
        wider = wider_tolerance(source, config)
        faults = [replace(fault, kind="video", remedy=fault.remedy + wider) if fault.kind == TOO_FAR else fault for fault in faults]
    return [*faults, *_mean_faults(source, means)]


def num_files(source: LeRobotSource) -> int:
    """Number of calls of `done` by `picture_faults`."""
    return sum(len({clip.file for clip in clips}) for clips in source.clips.values()) + len(source.stored_pictures)


def _video_faults(
    source: LeRobotSource,
    config: DatasetConfig,
    camera: str,
    clips: list[Clip],
    extent: Extent,
    means: dict[tuple[str, int], NDArray[np.float64]],
) -> list[Fault]:
    ends = (clips[0].first, clips[-1].first + clips[-1].count - 1)
    if extent == "ends" and not any(_picture_error(source, config, camera, row) for row in ends):
        return []
    faults = []
    for clip in clips:
        pieces = [(clip.first, clip.count)] if extent == "all" else [(clip.first, 1), (clip.first + clip.count - 1, 1)]
        mean = _Mean()
        lacking = [error for piece in pieces if (error := _picture_error(source, config, camera, *piece, mean)) is not None]
        for error in lacking[:1]:
            faults.append(Fault.of(TOO_FAR if isinstance(error, TooFarError) else "video", error, clip.episode))
        if extent == "all" and not lacking:
            means[camera, clip.episode] = mean.value()
    return faults


class _Mean:
    """Mean colour of pictures, each channel in 0..1."""

    def __init__(self) -> None:
        self._sum, self._count = np.zeros(3), 0

    def add(self, picture: NDArray[np.uint8]) -> None:
        self._sum += picture[::4, ::4].mean(axis=(0, 1)) / 255  # every 16th pixel: a sample, as in LeRobot's statistics
        self._count += 1

    def value(self) -> NDArray[np.float64]:
        return self._sum / max(self._count, 1)


def _picture_error(
    source: LeRobotSource, config: DatasetConfig, camera: str, first: int, count: int = 1, mean: _Mean | None = None
) -> DatasetError | None:
    """Error of the first row without a picture, None where all have one. mean: receives each picture."""
    try:
        for picture in decoded_at_full_size(make_job(source, config, camera, first, first + count, 1)):
            if mean is not None:
                mean.add(picture)
    except DatasetError as error:
        return error
    return None


def _stored_faults(source: LeRobotSource, camera: str, extent: Extent, means: dict[tuple[str, int], NDArray[np.float64]]) -> list[Fault]:
    bad: dict[int, Fault] = {}
    found: dict[int, _Mean] = {}
    places = source.stored(camera) if extent == "all" else _ends(source, camera)
    for place, value in places:
        episode = int(source.episode[place])
        if episode in bad:
            continue
        try:
            found.setdefault(episode, _Mean()).add(read_stored(source, camera, place, value))
        except DatasetError as error:
            bad[episode] = Fault.of("picture", error, episode)
    if extent == "all":
        means.update({(camera, episode): mean.value() for episode, mean in found.items() if episode not in bad})
    return list(bad.values())


def _ends(source: LeRobotSource, camera: str) -> Iterator[tuple[int, object]]:
    """First and last row of every file, and rows without a picture; row groups that cannot hold one are not read."""
    for number, path in enumerate(source.files):
        with read_faults(path), pq.ParquetFile(path) as file:
            last = file.num_row_groups - 1
            empty = may_be_null(file.metadata, source.embodiment.cameras[camera])
        for group in sorted({0, last, *empty} if last >= 0 else set()):
            rows = list(source.stored(camera, number, [group]))
            ends = {0} if group == 0 else set()
            ends |= {len(rows) - 1} if group == last else set()
            yield from (row for at, row in enumerate(rows) if at in ends or (group in empty and is_empty(row[1])))


def _mean_faults(source: LeRobotSource, means: Mapping[tuple[str, int], NDArray[np.float64]]) -> list[Fault]:
    """Faults of episodes whose mean colour differs from meta/episodes by more than the shift that all episodes share.

    A writer's codec or sampling shifts every episode alike; another episode's video shifts one. Statistics that are equal for all
    episodes identify none.
    """
    faults = []
    for camera, column in source.embodiment.cameras.items():
        known = {episode: mean for episode, mean in read_means(source.root, column).items() if (camera, episode) in means}
        if len(known) < EPISODES_OF_A_MEAN:
            continue
        recorded = np.array(list(known.values()))
        recorded = recorded / 255 if recorded.max() > 1 else recorded
        measured = np.array([means[camera, episode] for episode in known])
        off = np.abs(measured - recorded - np.median(measured - recorded, axis=0)).max(axis=1)
        if np.ptp(recorded, axis=0).max() < LEAST_SHIFT / 10:
            continue
        for place in np.flatnonzero(off > max(LEAST_SHIFT, 8 * float(np.median(off)))).tolist():
            colours = [" ".join(f"{value:.2f}" for value in each[place]) for each in (measured, recorded)]
            whose = f"{column!r} of episode {list(known)[place]} of {source.root}"
            text = f"{whose} has a mean colour of {colours[0]}, but meta/episodes says {colours[1]}"
            faults.append(Fault("video", text, "download or record the pictures again, or correct the statistics", list(known)[place]))
    return faults
