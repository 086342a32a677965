"""What of a data set can only be judged with a policy's prompt, or by looking at pictures; done before the first step.

Owns: instructions against a tokenizer, first and last picture of every file, or all. Does not know: who asks (a run, `pi0fm doctor`).

    instruction   empty, or longer than the network's prompt     every sentence that a used row has; with a state in the prompt the longest
    video         cannot be opened, or lacks a row's picture     `ends`: the rows at both ends of each file; `all`: every row
    stored        null, broken, not there, no colour picture     the same of each parquet file
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from pi0fm.data.chain import Chain, Sample
from pi0fm.data.columns.faults import Fault
from pi0fm.data.columns.lerobot_source import Clip, DatasetConfig, LeRobotSource
from pi0fm.data.columns.tables import reading
from pi0fm.data.pictures.decoding import cores, decoded
from pi0fm.data.pictures.frame_cache import make_job, read_stored
from pi0fm.data.prompt import bin_numbers
from pi0fm_client.errors import DatasetError, ObservationError

Extent = Literal["none", "ends", "all"]


def judge_prompts(source: LeRobotSource, chain: Chain) -> list[Fault]:
    """The instructions that no prompt can be made of; of each the first row of every episode that has it."""
    frames = source.frames
    state = chain.forward(Sample(source.state[frames], None)).state[:, : source.state.shape[1]]
    faults: list[Fault] = []
    for task in np.unique(source.task[frames]).tolist():
        rows = np.flatnonzero(source.task[frames] == task)
        text = source.tasks[task]
        longest = rows[0]
        if chain.tokenizer.with_state:  # as many tokens as the numbers of the state have letters
            widths = np.zeros(len(rows), dtype=np.int64)
            for dim in range(state.shape[1]):
                number = bin_numbers(state[rows, dim])
                widths += np.where(number >= 100, 3, np.where((number >= 10) | (number < 0), 2, 1))
            longest = rows[int(widths.argmax())]
        try:
            chain.tokenizer([text], state[longest][None])
        except ObservationError as error:
            episodes, first = np.unique(source.episode[frames[rows]], return_index=True)
            for episode, row in zip(episodes.tolist(), source.rows[frames[rows[first]]].tolist(), strict=True):
                rule, _, remedy = str(error).partition("; ")
                faults.append(Fault("prompt", f"row {row} of episode {episode} of {source.root}: {rule}", _longer(chain, remedy), episode))
    return faults


def _longer(chain: Chain, remedy: str) -> str:
    """What would help: room for a prompt that is too long, a sentence for one that is empty."""
    if not remedy:
        return "write the sentence into meta/tasks.parquet"
    return f"shorten it in meta/tasks.parquet, or type --model.max_prompt_tokens {2 * chain.tokenizer.max_tokens} or more"


def judge_pictures(
    source: LeRobotSource, config: DatasetConfig, extent: Extent, done: Callable[[int], None] = lambda count: None
) -> list[Fault]:
    """The pictures that rows lack. done: is told of every file.

    A file that fails is judged episode by episode, so that the others of it are known to be good.
    """
    if extent == "none":
        return []
    work: list[partial[list[Fault]]] = []
    for camera, clips in source.clips.items():
        ordered = sorted(clips, key=lambda clip: (clip.file, clip.begin))
        for _, group in groupby(ordered, key=lambda clip: clip.file):
            work.append(partial(_judge_video, source, config, camera, list(group), extent))
    for camera in source.stored_pictures:
        work.append(partial(_judge_stored, source, camera, extent))

    def judged(each: partial[list[Fault]]) -> list[Fault]:
        found = each()
        done(1)
        return found

    with ThreadPoolExecutor(cores()) as threads:
        return [fault for found in threads.map(judged, work) for fault in found]


def num_files(source: LeRobotSource) -> int:
    """How often `judge_pictures` calls `done`."""
    return sum(len({clip.file for clip in clips}) for clips in source.clips.values()) + len(source.stored_pictures)


def _judge_video(source: LeRobotSource, config: DatasetConfig, camera: str, clips: list[Clip], extent: Extent) -> list[Fault]:
    first, last = clips[0], clips[-1]
    if extent == "ends" and not any(_lacks(source, config, camera, row) for row in (first.first, last.first + last.count - 1)):
        return []
    faults = []
    for clip in clips:
        pieces = [(clip.first, clip.count)] if extent == "all" else [(clip.first, 1), (clip.first + clip.count - 1, 1)]
        lines = [line for piece in pieces for line in _lacks(source, config, camera, *piece)]
        faults += [_fault("video", line, clip.episode) for line in lines[:1]]
    return faults


def _lacks(source: LeRobotSource, config: DatasetConfig, camera: str, first: int, count: int = 1) -> list[str]:
    """Why rows have no picture; empty when they have."""
    try:
        for _ in decoded(make_job(source, config, camera, first, first + count, 16)):
            pass
    except DatasetError as error:
        return [str(error)]
    return []


def _judge_stored(source: LeRobotSource, camera: str, extent: Extent) -> list[Fault]:
    bad: dict[int, Fault] = {}
    places = source.stored(camera) if extent == "all" else _ends(source, camera)
    for place, value in places:
        episode = int(source.episode[place])
        if episode in bad:
            continue
        try:
            read_stored(source, camera, place, value)
        except DatasetError as error:
            bad[episode] = _fault("picture", str(error), episode)
    return list(bad.values())


def _ends(source: LeRobotSource, camera: str) -> Iterator[tuple[int, object]]:
    """Of every file the first row of its first group and the last of its last; other groups are not read."""
    for number, path in enumerate(source.files):
        with reading(path), pq.ParquetFile(path) as file:
            groups = range(file.num_row_groups)
            if not groups:
                continue
            for group in dict.fromkeys((groups[0], groups[-1])):
                rows = list(source.stored(camera, number, [group]))
                yield from (rows[:1] if group == groups[0] else []) + (rows[-1:] if group == groups[-1] else [])


def _fault(kind: str, line: str, episode: int) -> Fault:
    text, _, remedy = line.partition("; ")
    return Fault(kind, text, remedy or "record or download the data set again", episode)
