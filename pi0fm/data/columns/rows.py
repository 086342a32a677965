"""The rows of the chosen episodes, and what is wrong in them.

Owns: which files are read, the rows in order, every comparison between rows and metadata. Does not know: pictures, normalisation, order of
training.

    chosen episodes -> their files (others may be absent) -> their rows -> sorted by `index` -> compared

    said twice                                              a difference
    dataset_from/to_index, length, rows, index              `bounds`, the episode's
    timestamp, frame_index, fps                             `time`, the episode's; `fps`, the data set's. Rows may have been taken out
    from/to_timestamp, timestamp, other episodes' spans     `video`, the episode's
    task_index, meta/tasks                                  `task`, the episode's
    shape in meta/info.json, width of each row              `width`, the episode's

Shape letters: N rows, S state dim, A action dim, E episodes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.faults import RECORD_AGAIN, Fault
from pi0fm.data.columns.metadata import Episodes, Info
from pi0fm.data.columns.tables import Numbers, integers, matrix, read_table, scalars
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError, DatasetError

ROUNDING = 1e-3  # seconds: float32 timestamps of a long episode, and what containers round to
ROWS_OF_A_RATE = 10_000  # enough for a median
STEPS_OF_A_RATE = 10  # fewer say nothing where rows were taken out
RATE_SHARE = 0.1  # how far the rows' usual distance in time may be from 1 / fps


@dataclass(frozen=True)
class Selection:
    """Which episodes are used. episodes: empty for all; exclude: of those; tasks: sentences, empty for all; min_frames: of an episode."""

    episodes: tuple[int, ...] = ()
    exclude: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    min_frames: int = 1


@dataclass(frozen=True)
class Rows:
    """Rows in ascending `index`. time [N]: seconds since the episode's start; task [N]: number in the table of tasks; seed: [N] or None.

    state, action: values and which rows have none. file [N]: number of each row's file in `files`.
    """

    files: tuple[Path, ...]
    file: NDArray[np.int64]
    index: NDArray[np.int64]
    episode: NDArray[np.int64]
    task: NDArray[np.int64]
    time: NDArray[np.float64]
    frame: NDArray[np.int64] | None
    seed: NDArray[np.int64] | None
    state: Numbers
    action: Numbers


def choose(episodes: Episodes, selection: Selection) -> NDArray[np.bool_]:
    """[E] which episodes are read. Raises ConfigError for a number that the data set does not have."""
    for name, wanted in (("dataset.episodes", selection.episodes), ("exclude_episodes", selection.exclude)):
        unknown = sorted(set(wanted) - set(episodes.number.tolist()))
        if unknown:
            low, high = (int(episodes.number[place]) for place in (0, -1)) if len(episodes.number) else (0, -1)
            raise ConfigError(f"{name} must lie in {low}..{high}, found {unknown[:8]}; correct the list")
    chosen = np.isin(episodes.number, selection.episodes) if selection.episodes else np.ones(len(episodes.number), dtype=bool)
    chosen &= ~np.isin(episodes.number, selection.exclude)
    return chosen if selection.min_frames <= 1 else chosen & (episodes.length >= selection.min_frames)


def refuse_unknown_sentences(wanted: Sequence[str], tasks: Mapping[int, str | None], root: Path) -> None:
    """Raise ConfigError for a sentence that no task has."""
    known = [text for text in tasks.values() if text is not None]
    for text in wanted:
        if text not in known:
            raise ConfigError(f"{root} has no instruction {text!r}: {nearest(text, known)}")


def read_rows(
    root: Path, episodes: Episodes, chosen: NDArray[np.bool_], embodiment: Embodiment, has: Callable[[str], bool], fps: float
) -> tuple[Rows, list[Fault]]:
    """The rows of the chosen episodes; what a missing or unreadable file takes away is a fault of each of its episodes.

    has: whether meta/info.json lists a column. Raises DatasetError when no file can be read.
    """
    state_dim, action_dim = embodiment.dims()
    named = _files(root, episodes, chosen)
    wanted = list(dict.fromkeys([*_keys(has), embodiment.state, embodiment.action]))
    numbers = episodes.number[chosen]
    everything = bool(chosen.all())
    faults: list[Fault] = []
    parts: list[dict[str, Any]] = []
    for place, (path, owners) in enumerate(named.items()):
        try:
            table = read_table(path, wanted)
        except DatasetError as error:
            text, _, remedy = str(error).partition("; ")
            if not owners:
                raise
            faults += [Fault("file", text, remedy, int(owner)) for owner in owners]
            continue
        episode = integers(table["episode_index"])
        if not everything:
            kept = np.isin(episode.values, numbers) & ~episode.bad
            if not kept.all():
                table = table.filter(kept)
                episode = integers(table["episode_index"])
        _refuse_bad(path, "episode_index", episode)
        index = integers(table["index"])
        _refuse_bad(path, "index", index)
        parts.append(
            {
                "file": np.full(len(table), place),
                "index": index.values,
                "episode": episode.values,
                "task": _or_sentinel(integers(table["task_index"])),
                "time": _times(path, table["timestamp"]) if "timestamp" in wanted else None,
                "frame": _or_sentinel(integers(table["frame_index"])) if "frame_index" in wanted else None,
                "seed": integers(table["seed"]) if "seed" in wanted else None,
                "state": matrix(table[embodiment.state], state_dim),
                "action": matrix(table[embodiment.action], action_dim),
            }
        )
    if not parts and faults:
        raise faults[0].error()
    rows = _sorted(tuple(named), parts, (state_dim, action_dim))
    return (_timed(rows, fps) if np.isnan(rows.time).all() else rows), faults


def compare(
    rows: Rows, episodes: Episodes, chosen: NDArray[np.bool_], info: Info, tasks: Mapping[int, str | None], embodiment: Embodiment
) -> Iterator[Fault]:
    """What rows and metadata say differently, and values that are none; of each episode and kind the first row."""
    yield from _bounds(rows, episodes, chosen, info)
    yield from _time(rows)
    yield from _rate(rows, info)
    yield from _spans(rows, episodes, chosen, info)
    counted = sorted(tasks) == list(range(len(tasks)))
    known = (rows.task >= 0) & (rows.task < len(tasks)) if counted else np.isin(rows.task, list(tasks))
    listed = ", ".join(map(str, list(tasks)[:8]))
    yield from _each(rows, ~known, "task", lambda row: f"has task_index {_told(rows.task[row])}, but meta/tasks.parquet has {listed}")
    yield from _numbers(rows, embodiment.state, rows.state)
    yield from _numbers(rows, embodiment.action, rows.action)


def _numbers(rows: Rows, column: str, numbers: Numbers) -> Iterator[Fault]:
    """Every row has as many numbers as meta/info.json says, all finite."""
    values = numbers.values

    def other_width(row: int) -> str:
        return f"must have {values.shape[1]} numbers in {column!r}, as meta/info.json says, found {numbers.found} in the first such row"

    def not_finite(row: int) -> str:
        return f"must have finite numbers in {column!r}, found {values[row].tolist()!s:.120}"

    yield from _each(rows, numbers.bad, "width", other_width)
    finite = np.isfinite(values)
    if not finite.all():
        yield from _each(rows, ~finite.all(axis=1), "not finite", not_finite)


def _keys(has: Callable[[str], bool]) -> list[str]:
    optional = [name for name in ("timestamp", "frame_index", "seed") if has(name)]
    return ["index", "episode_index", "task_index", *optional]


def _files(root: Path, episodes: Episodes, chosen: NDArray[np.bool_]) -> dict[Path, list[int]]:
    """The files that hold the chosen episodes' rows, each with the numbers of those; all files where an episode does not name its own.

    Raises DatasetError for a file that no episode names.
    """
    if any(path is None for path in episodes.files):
        found: dict[Path, list[int]] = {path: [] for path in sorted((root / "data").glob("*/*.parquet"))}
        if not found:
            raise DatasetError(f"{root / 'data'} holds no parquet file; {RECORD_AGAIN}")
        return found
    named: dict[Path, list[int]] = {}
    for path, number in zip(episodes.files, episodes.number.tolist(), strict=True):
        if path is not None:
            named.setdefault(path, []).append(number)
    if chosen.all():
        extra = [path for path in sorted((root / "data").glob("*/*.parquet")) if path not in named]
        if extra:
            raise DatasetError(f"{extra[0]} holds rows of no episode that {episodes.path} lists; remove the file, or list its episodes")
    picked = set(episodes.number[chosen].tolist())
    return {path: kept for path, owners in sorted(named.items()) if (kept := [number for number in owners if number in picked])}


def _sorted(files: tuple[Path, ...], parts: list[dict[str, Any]], widths: tuple[int, int]) -> Rows:
    def joined(name: str) -> NDArray[Any]:
        if len(parts) == 1:
            return np.asarray(parts[0][name])
        return np.concatenate([part[name] for part in parts]) if parts else np.zeros(0, dtype=np.int64)

    index = joined("index")
    order = None if (index[1:] > index[:-1]).all() else np.argsort(index, kind="stable")

    def arranged(values: NDArray[Any]) -> NDArray[Any]:
        return values if order is None else values[order]

    def numbers(name: str, width: int) -> Numbers:
        if not parts:
            return Numbers(np.zeros((0, width), np.float32), np.zeros(0, dtype=bool))
        found = next((part[name].found for part in parts if part[name].found), "")
        if len(parts) == 1:
            values, bad = parts[0][name].values, parts[0][name].bad
        else:
            values, bad = (np.concatenate([getattr(part[name], field) for part in parts]) for field in ("values", "bad"))
        return Numbers(arranged(values), arranged(bad), found)

    frame = arranged(joined("frame")) if parts and parts[0]["frame"] is not None else None
    seeds = [part["seed"] for part in parts]
    seed = None
    if seeds and all(each is not None and not each.bad.any() for each in seeds):  # a foreign column may have this name
        seed = arranged(np.concatenate([each.values for each in seeds]))
    return Rows(
        files=files,
        file=arranged(joined("file")),
        index=arranged(index),
        episode=arranged(joined("episode")),
        task=arranged(joined("task")),
        time=arranged(joined("time")) if parts and parts[0]["time"] is not None else np.full(len(index), np.nan),
        frame=frame,
        seed=seed,
        state=numbers("state", widths[0]),
        action=numbers("action", widths[1]),
    )


NO_NUMBER = np.iinfo(np.int64).min


def _timed(rows: Rows, fps: float) -> Rows:
    """The times of a data set without timestamps: frame_index, or the place in the episode, over the rate."""
    frame = rows.frame
    if frame is None:
        begins = np.flatnonzero(np.diff(rows.episode, prepend=rows.episode[:1] - 1))
        frame = np.arange(len(rows.episode)) - np.repeat(begins, np.diff(np.append(begins, len(rows.episode))))
    return replace(rows, time=frame / fps)


def _or_sentinel(numbers: Numbers) -> NDArray[np.int64]:
    return np.where(numbers.bad, NO_NUMBER, numbers.values) if numbers.bad.any() else numbers.values


def _times(path: Path, column: Any) -> NDArray[np.float64]:
    """NaN where a row has no time. Raises DatasetError for a column whose values are all of a type that is no number."""
    numbers = scalars(column)
    if len(column) and numbers.bad.all() and column.null_count < len(column):
        raise DatasetError(f"{path}: the column 'timestamp' must hold seconds as numbers, found {column.type}; {RECORD_AGAIN}")
    values = numbers.values.astype(np.float64, copy=False)
    return np.where(numbers.bad, np.nan, values) if numbers.bad.any() else values


def _told(value: Any) -> str:
    return "null or no whole number" if value == NO_NUMBER else str(value)


def _refuse_bad(path: Path, name: str, numbers: Numbers) -> None:
    if numbers.bad.any():
        row = int(np.flatnonzero(numbers.bad)[0])
        raise DatasetError(f"the column {name!r} of {path} must be whole numbers, found {numbers.found} in row {row}; {RECORD_AGAIN}")


def _each(rows: Rows, wrong: NDArray[np.bool_], kind: str, told: Callable[[int], str], remedy: str = RECORD_AGAIN) -> Iterator[Fault]:
    """A fault of each episode with a wrong row, of the first such row."""
    if not wrong.any():
        return
    places = np.flatnonzero(wrong)
    owners, first = np.unique(rows.episode[places], return_index=True)
    for owner, row in zip(owners.tolist(), places[first].tolist(), strict=True):
        where = f"row {rows.index[row]} of episode {owner} in {rows.files[rows.file[row]]}"
        yield Fault(kind, f"{where} {told(row)}", remedy, owner)


def _groups(rows: Rows, episodes: Episodes) -> tuple[NDArray[np.int64] | None, NDArray[np.int64], NDArray[np.int64]]:
    """(an order of the rows by episode, None where they have it; where each episode begins in it; where it ends)."""
    sorted_ = bool((rows.episode[1:] >= rows.episode[:-1]).all())
    order = None if sorted_ else np.argsort(rows.episode, kind="stable")
    owner = rows.episode if order is None else rows.episode[order]
    return order, np.searchsorted(owner, episodes.number, side="left"), np.searchsorted(owner, episodes.number, side="right")


def _bounds(rows: Rows, episodes: Episodes, chosen: NDArray[np.bool_], info: Info) -> Iterator[Fault]:
    """Episodes tile the rows: each has as many as it says, where it says."""
    order, starts, stops = _groups(rows, episodes)
    counts = stops - starts
    if order is None and counts.sum() == len(rows.episode):
        place: NDArray[Any] = np.repeat(np.arange(len(counts)), counts)
        strange: NDArray[Any] = np.zeros(0, dtype=np.int64)
    else:
        place = np.minimum(np.searchsorted(episodes.number, rows.episode), len(episodes.number) - 1)
        strange = np.flatnonzero(episodes.number[place] != rows.episode)
    if len(strange):
        row = int(strange[0])
        where = f"row {rows.index[row]} of {rows.files[rows.file[row]]}"
        yield Fault("bounds", f"{where} is of episode {rows.episode[row]}, which {episodes.path} does not list")
    clean = not len(strange)
    healthy = (episodes.stop - episodes.first == episodes.length) & (stops - starts == episodes.length) & (episodes.length > 0)
    if order is None and clean:
        off = rows.index != episodes.first[place] + np.arange(len(rows.index)) - starts[place]
        healthy[place[off]] = False
    else:
        healthy[:] = False
    for place in np.flatnonzero(chosen & ~healthy).tolist():
        number, first, stop, length = (int(each[place]) for each in (episodes.number, episodes.first, episodes.stop, episodes.length))
        own = rows.index[slice(starts[place], stops[place]) if order is None else order[starts[place] : stops[place]]]
        said = f"{episodes.path} says that episode {number} has {length} rows, {first} to {stop - 1}"
        text = ""
        if stop - first != length or length < 1:
            text = f"{said}, which are {stop - first}"
        elif len(own) != length:
            text = f"{said}, but {len(own)} rows name it"
        elif own[0] != first or own[-1] != stop - 1 or (np.diff(own) != 1).any():
            off = int(np.flatnonzero(own != np.arange(first, stop))[0])
            text = f"{said}, but the column 'index' has {own[off]} where {first + off} is due"
        if text:
            clean = False
            yield Fault("bounds", text, "correct meta/episodes, or record or download the data set again", number)
    if clean and chosen.all() and len(rows.index) != info.total_frames:
        yield Fault("bounds", f"{info.path} promises {info.total_frames} frames, but the parquet files hold {len(rows.index)}")


def _time(rows: Rows) -> Iterator[Fault]:
    """Time and frame_index rise from row to row of an episode; gaps are rows that were taken out."""
    same = rows.episode[1:] == rows.episode[:-1]
    wrong = ~(rows.time >= -ROUNDING)  # NaN too
    wrong[1:] |= same & ~(rows.time[1:] > rows.time[:-1])
    wrong |= np.isinf(rows.time)
    remedy = "correct the column, or record or download the data set again"
    rule = "above the one of the row before it"
    yield from _each(rows, wrong, "time", lambda row: f"must have a timestamp {rule}, found {rows.time[row]:g}", remedy)
    if rows.frame is not None:
        frame = rows.frame
        late = frame < 0
        late[1:] |= same & (frame[1:] <= frame[:-1])
        yield from _each(rows, late, "time", lambda row: f"must have a frame_index {rule}, found {_told(frame[row])}", remedy)


def _rate(rows: Rows, info: Info) -> Iterator[Fault]:
    steps = (rows.time[1:] - rows.time[:-1])[rows.episode[1:] == rows.episode[:-1]][:ROWS_OF_A_RATE]
    steps = steps[np.isfinite(steps) & (steps > 0)]
    if len(steps) < STEPS_OF_A_RATE:
        return
    usual = float(np.median(steps))
    if abs(usual * info.fps - 1) > RATE_SHARE:
        text = f"{info.path} says {info.fps:g} rows a second, but the column 'timestamp' has {1 / usual:g}"
        yield Fault("fps", text, f"write the right fps in {info.path}, or correct the column")


def _spans(rows: Rows, episodes: Episodes, chosen: NDArray[np.bool_], info: Info) -> Iterator[Fault]:
    """Each chosen episode has a span of a file of its own, as long as its rows need."""
    remedy = "correct meta/episodes, or record or download the data set again"
    period = 1 / info.fps
    order, starts, stops = _groups(rows, episodes)
    last = np.full(len(episodes.number), np.nan)
    some = np.flatnonzero(stops > starts)
    last[some] = rows.time[stops[some] - 1 if order is None else order[stops[some] - 1]]
    for column, videos in episodes.videos.items():
        where = f"{episodes.path} says that the video of {column!r}"
        ends = np.where(np.isnan(videos.end), videos.begin + np.nan_to_num(last) + period, videos.end)
        before: dict[Path | None, tuple[float, int]] = {}
        exists: dict[Path | None, bool] = {}
        places = np.flatnonzero(chosen)
        for place in places[np.argsort(videos.begin[places], kind="stable")].tolist():
            number, file = int(episodes.number[place]), videos.files[place]
            begin, end = float(videos.begin[place]), float(ends[place])
            if file not in exists:
                exists[file] = file is not None and file.is_file()
            if not exists[file]:
                yield Fault("video", f"the data set's video {file} is missing", "download or record the data set again", number)
            if not begin >= -ROUNDING or not end > begin:
                yield Fault(
                    "video", f"{where} of episode {number} lies from {begin:g} to {end:g} s of {file}, which is no span", remedy, number
                )
                continue
            if last[place] > end - begin + ROUNDING:
                text = f"{where} of episode {number} lasts {end - begin:g} s, but its last row is at {last[place]:g} s"
                yield Fault("video", text, remedy, number)
            held = before.get(file)
            if held is not None and begin < held[0] - period / 2:
                text = f"{where} of episode {number} begins at {begin:g} s of {file}, where episode {held[1]} lasts until {held[0]:g} s"
                yield from (Fault("video", text, remedy, each) for each in (number, held[1]))  # either may be the wrong one
            before[file] = max((end, number), held or (end, number))
