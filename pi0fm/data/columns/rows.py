"""Rows of the chosen episodes, and their faults.

Owns: which files are read, the order of rows, every comparison between rows and metadata. Does not know: pictures, normalisation, order of
training.

    chosen episodes -> their files (others may be absent) -> their rows -> each episode's together, by `index` -> compared

    recorded twice                                          fault of a difference
    dataset_from/to_index, length, rows, index              `bounds`, the episode's
    timestamp, frame_index, fps                             `time`, the episode's; `fps`, the data set's. Rows may have been removed
    from/to_timestamp, timestamp, other episodes' spans     `video`, the episode's
    order of episodes, order of their videos                `video`, of each episode out of place
    task_index, meta/tasks                                  `task`, the episode's
    shape in meta/info.json, width of each row              `width`, the episode's

Shape letters: N rows, S state dim, A action dim, E episodes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.faults import RECORD_AGAIN, Fault, faulty_episodes
from pi0fm.data.columns.metadata import Episodes, Info
from pi0fm.data.columns.tables import ColumnValues, concatenate, integers, matrix, read_table, scalars
from pi0fm.data.config import Selection
from pi0fm.files import visible
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError, DatasetError

ROUNDING = 1e-3  # seconds: rounding of float32 timestamps in a long episode, and of containers
RATE_SHARE = 0.1  # largest relative deviation of the rows' median period from 1 / fps
APART = 0.45  # periods; from 0.5 on another picture is nearest
NO_NUMBER = np.iinfo(np.int64).min
CORRECT = "correct the column, or record or download the data set again"
CORRECT_EPISODES = "correct meta/episodes, or record or download the data set again"


@dataclass(frozen=True)
class Rows:
    """Rows grouped by episode and in ascending `index`, episodes in the order of their first rows.

    time [N]: seconds since the episode's start; task [N]: number in the table of tasks; frame, seed: [N] or None.
    state, action: values, and which rows lack them. file [N]: number of each row's file in `files`.
    """

    files: tuple[Path, ...]
    file: NDArray[np.int64]
    index: NDArray[np.int64]
    episode: NDArray[np.int64]
    task: NDArray[np.int64]
    time: NDArray[np.float64]
    frame: NDArray[np.int64] | None
    seed: NDArray[np.int64] | None
    state: ColumnValues
    action: ColumnValues

    def take(self, places: NDArray[Any]) -> "Rows":
        """Select rows by place, in any order."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        taken: dict[str, Any] = {name: each if each is None else each[places] for name, each in arrays.items()}
        return replace(self, **taken)


_ARRAYS = tuple(field.name for field in fields(Rows) if field.name != "files")


def selected_episodes(episodes: Episodes, selection: Selection) -> NDArray[np.bool_]:
    """[E] True for each episode that is read. Raises ConfigError for a number that the data set does not have."""
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


def read_rows(root: Path, episodes: Episodes, chosen: NDArray[np.bool_], embodiment: Embodiment, info: Info) -> tuple[Rows, list[Fault]]:
    """Read the rows of the chosen episodes; a missing or unreadable file is a fault of each of its episodes.

    Raises DatasetError when no file can be read.
    """
    state_dim, action_dim = embodiment.dims()
    named = _files(root, episodes, chosen)
    keys = ["index", "episode_index", "task_index", *(name for name in ("timestamp", "frame_index", "seed") if name in info.shapes)]
    wanted = list(dict.fromkeys([*keys, embodiment.state, embodiment.action]))
    numbers = episodes.number[chosen]
    faults: list[Fault] = []
    parts: list[Rows] = []
    for place, (path, owners) in enumerate(named.items()):
        try:
            table = read_table(path, wanted)
        except DatasetError as error:
            if not owners:
                raise
            faults += [Fault.of("file", error, owner) for owner in owners]
            continue
        episode = integers(table["episode_index"])
        kept = np.isin(episode.values, numbers) & ~episode.bad
        if not (chosen.all() or kept.all()):
            table, episode = table.filter(kept), episode[kept]
        index = integers(table["index"])
        _refuse_bad(path, "episode_index", episode)
        _refuse_bad(path, "index", index)
        seed = integers(table["seed"]) if "seed" in wanted else None
        parts.append(
            Rows(
                files=tuple(named),
                file=np.full(len(table), place),
                index=index.values,
                episode=episode.values,
                task=integers(table["task_index"]).filled(NO_NUMBER),
                time=_times(path, table["timestamp"]) if "timestamp" in wanted else np.full(len(table), np.nan),
                frame=integers(table["frame_index"]).filled(NO_NUMBER) if "frame_index" in wanted else None,
                seed=None if seed is None or seed.bad.any() else seed.values,  # a column of another meaning may have this name
                state=matrix(table[embodiment.state], state_dim),
                action=matrix(table[embodiment.action], action_dim),
            )
        )
    if not parts:
        raise faults[0].error()
    rows = _sort_by_episode(_concatenated(parts))
    return (_with_times(rows, info.fps) if np.isnan(rows.time).all() else rows), faults


def row_faults(
    rows: Rows,
    episodes: Episodes,
    chosen: NDArray[np.bool_],
    info: Info,
    tasks: Mapping[int, str | None],
    embodiment: Embodiment,
    *,
    any_video_order: bool = False,
) -> list[Fault]:
    """Faults where rows and metadata differ or a value is invalid: the first row of each episode and kind."""
    begins = np.flatnonzero(np.diff(rows.episode, prepend=rows.episode[:1] - 1))
    owners = rows.episode[begins]
    place = np.minimum(np.searchsorted(episodes.number, owners), len(episodes.number) - 1)
    known = episodes.number[place] == owners
    starts, stops = (np.zeros(len(episodes.number), dtype=np.int64) for _ in range(2))
    starts[place[known]], stops[place[known]] = begins[known], np.append(begins[1:], len(rows.episode))[known]
    strange = begins[~known]
    faults = [*_bound_faults(rows, episodes, chosen, starts, stops, strange, info), *_time_faults(rows)]
    timed = chosen & (stops > starts) & ~np.isin(episodes.number, faulty_episodes(faults))
    faults += [*_rate_faults(rows, episodes, timed, starts, stops, info), *_span_faults(rows, episodes, chosen, starts, stops, info)]
    faults += [] if any_video_order else _order_faults(episodes, chosen)
    counted = sorted(tasks) == list(range(len(tasks)))
    right = (rows.task >= 0) & (rows.task < len(tasks)) if counted else np.isin(rows.task, list(tasks))
    keys = ", ".join(map(str, list(tasks)[:8]))
    faults += _first_faults(rows, ~right, "task", lambda row: f"has task_index {_shown(rows.task[row])}, but meta/tasks.parquet has {keys}")
    return [*faults, *_value_faults(rows, embodiment.state, rows.state), *_value_faults(rows, embodiment.action, rows.action)]


def _value_faults(rows: Rows, column: str, numbers: ColumnValues) -> Iterator[Fault]:
    """Faults of rows without as many finite numbers as meta/info.json says."""
    values = numbers.values

    def other_width(row: int) -> str:
        return f"must have {values.shape[1]} numbers in {column!r}, as meta/info.json says, found {numbers.found} in the first such row"

    def not_finite(row: int) -> str:
        return f"must have finite numbers in {column!r}, found {values[row].tolist()!s:.120}"

    yield from _first_faults(rows, numbers.bad, "width", other_width)
    finite = np.isfinite(values)
    if not finite.all():
        yield from _first_faults(rows, ~finite.all(axis=1), "not finite", not_finite)


def _files(root: Path, episodes: Episodes, chosen: NDArray[np.bool_]) -> dict[Path, list[int]]:
    """Files that hold the chosen episodes' rows, with the episodes' numbers; all files where an episode names none.

    Raises DatasetError for a file that no episode names.
    """
    if any(path is None for path in episodes.files):
        found: dict[Path, list[int]] = {path: [] for path in visible(root / "data", "*/*.parquet")}
        if not found:
            raise DatasetError(f"{root / 'data'} holds no parquet file; {RECORD_AGAIN}")
        return found
    named: dict[Path, list[int]] = {}
    for path, number in zip(episodes.files, episodes.number.tolist(), strict=True):
        if path is not None:
            named.setdefault(path, []).append(number)
    if chosen.all():
        extra = [path for path in visible(root / "data", "*/*.parquet") if path not in named]
        if extra:
            raise DatasetError(f"{extra[0]} holds rows of no episode that {episodes.path} lists; remove the file, or list its episodes")
    picked = set(episodes.number[chosen].tolist())
    return {path: kept for path, owners in sorted(named.items()) if (kept := [number for number in owners if number in picked])}


def _concatenated(parts: Sequence[Rows]) -> Rows:
    """Concatenate the rows of several files."""
    if len(parts) == 1:
        return parts[0]
    every = {name: [getattr(part, name) for part in parts] for name in _ARRAYS}
    arrays: dict[str, Any] = {
        name: None if any(each is None for each in found) else concatenate(found) if name in ("state", "action") else np.concatenate(found)
        for name, found in every.items()
    }
    return replace(parts[0], **arrays)


def _sort_by_episode(rows: Rows) -> Rows:
    """Sort rows into the order of `Rows`, in which a healthy data set is already."""
    if (rows.index[1:] > rows.index[:-1]).all() and (rows.episode[1:] >= rows.episode[:-1]).all():
        return rows
    numbers, own = np.unique(rows.episode, return_inverse=True)
    first = np.full(len(numbers), np.iinfo(np.int64).max)
    np.minimum.at(first, own, rows.index)
    return rows.take(np.lexsort((rows.index, rows.episode, first[own])))


def _with_times(rows: Rows, fps: float) -> Rows:
    """Set the times of a data set without timestamps: frame_index, or the place in the episode, divided by the rate."""
    return replace(rows, time=(_places_in_episode(rows) if rows.frame is None else rows.frame) / fps)


def _places_in_episode(rows: Rows) -> NDArray[np.int64]:
    """[N] place of each row in its episode, from 0."""
    begins = np.flatnonzero(np.diff(rows.episode, prepend=rows.episode[:1] - 1))
    return np.arange(len(rows.episode)) - np.repeat(begins, np.diff(np.append(begins, len(rows.episode))))


def _times(path: Path, column: Any) -> NDArray[np.float64]:
    """Seconds of each row, NaN where it has none. Raises DatasetError for a column of a type that is no number."""
    numbers = scalars(column)
    if len(column) and numbers.bad.all() and column.null_count < len(column):
        raise DatasetError(f"{path}: the column 'timestamp' must hold seconds as numbers, found {column.type}; {RECORD_AGAIN}")
    return replace(numbers, values=numbers.values.astype(np.float64, copy=False)).filled(np.nan)


def _shown(value: Any) -> str:
    return "null or no whole number" if value == NO_NUMBER else str(value)


def _refuse_bad(path: Path, name: str, numbers: ColumnValues) -> None:
    if numbers.bad.any():
        row = int(np.flatnonzero(numbers.bad)[0])
        raise DatasetError(f"the column {name!r} of {path} must be whole numbers, found {numbers.found} in row {row}; {RECORD_AGAIN}")


def _first_faults(
    rows: Rows, wrong: NDArray[np.bool_], kind: str, told: Callable[[int], str], remedy: str = RECORD_AGAIN
) -> Iterator[Fault]:
    """Fault of the first wrong row of each episode."""
    if not wrong.any():
        return
    places = np.flatnonzero(wrong)
    owners, first = np.unique(rows.episode[places], return_index=True)
    for owner, row in zip(owners.tolist(), places[first].tolist(), strict=True):
        yield Fault(kind, f"{_where(rows, row)} {told(row)}", remedy, owner)


def _where(rows: Rows, row: int) -> str:
    return f"row {rows.index[row]} of episode {rows.episode[row]} in {rows.files[rows.file[row]]}"


def _bound_faults(
    rows: Rows,
    episodes: Episodes,
    chosen: NDArray[np.bool_],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    strange: NDArray[np.int64],
    info: Info,
) -> Iterator[Fault]:
    """Faults of episodes whose rows differ in number or place from meta/episodes. strange: first rows of unlisted episodes."""
    for row in strange[:1].tolist():
        where = f"row {rows.index[row]} of {rows.files[rows.file[row]]}"
        yield Fault("bounds", f"{where} is of episode {rows.episode[row]}, which {episodes.path} does not list")
    clean = not len(strange)
    healthy = (episodes.stop - episodes.first == episodes.length) & (stops - starts == episodes.length) & (episodes.length > 0)
    owner = np.minimum(np.searchsorted(episodes.number, rows.episode), len(episodes.number) - 1)
    off = rows.index != episodes.first[owner] + np.arange(len(rows.index)) - starts[owner]
    healthy[owner[off]] = False
    for place in np.flatnonzero(chosen & ~healthy).tolist():
        number, first, stop, length = (int(each[place]) for each in (episodes.number, episodes.first, episodes.stop, episodes.length))
        own = rows.index[starts[place] : stops[place]]
        listing = f"{episodes.path} says that episode {number} has {length} rows, {first} to {stop - 1}"
        text = ""
        if stop - first != length or length < 1:
            text = f"{listing}, which are {stop - first}"
        elif len(own) != length:
            text = f"{listing}, but {len(own)} rows name it"
        elif (own != np.arange(first, stop)).any():
            wrong = int(np.flatnonzero(own != np.arange(first, stop))[0])
            text = f"{listing}, but the column 'index' has {own[wrong]} where {first + wrong} is due"
        if text:
            clean = False
            yield Fault("bounds", text, CORRECT_EPISODES, number)
    if clean and chosen.all() and len(rows.index) != info.total_frames:
        yield Fault("bounds", f"{info.path} promises {info.total_frames} frames, but the parquet files hold {len(rows.index)}")


def _time_faults(rows: Rows) -> Iterator[Fault]:
    """Faults of timestamps and frame_index that do not rise within an episode; a gap is a removed row, and no fault."""
    same = rows.episode[1:] == rows.episode[:-1]
    wrong = ~(rows.time >= -ROUNDING)  # NaN too
    wrong[1:] |= same & ~(rows.time[1:] > rows.time[:-1])
    wrong |= np.isinf(rows.time)
    rule = "above that of the row before it"
    yield from _first_faults(rows, wrong, "time", lambda row: f"must have a timestamp {rule}, found {rows.time[row]:g}", CORRECT)
    if rows.frame is not None:
        frame = rows.frame
        late = frame < 0
        late[1:] |= same & (frame[1:] <= frame[:-1])
        yield from _first_faults(rows, late, "time", lambda row: f"must have a frame_index {rule}, found {_shown(frame[row])}", CORRECT)


def _rate_faults(
    rows: Rows, episodes: Episodes, timed: NDArray[np.bool_], starts: NDArray[np.int64], stops: NDArray[np.int64], info: Info
) -> Iterator[Fault]:
    """Faults of episodes whose timestamp and frame_index, at the rate of meta/info.json, are nearest to different pictures.

        timestamp * fps - frame_index
        within 0.45                       the same picture
        0 0 0 2 2 3 3 ..                  rows were removed and the rest renumbered: most are a period apart, the span is long enough
        0 .. 5, slowly                    another clock, where the video's span is as long as by that clock
        any number, the same everywhere   another origin, where the rows hold the pictures, or frame_index begins elsewhere
        anything else                     another rate, unit or origin: a fault

    timed: episodes whose times rise. A data set with another rate throughout has one fault, not one per episode.
    """
    frame = _places_in_episode(rows) if rows.frame is None else rows.frame
    with np.errstate(over="ignore", invalid="ignore"):
        ahead = rows.time * info.fps - frame
    apart = np.flatnonzero(np.abs(ahead) > APART)
    if not len(apart):
        return
    owners, first = np.unique(rows.episode[apart], return_index=True)
    wrong: list[tuple[int, int, float]] = []  # place of the episode, its first such row, median periods between rows
    for place, row in zip(np.searchsorted(episodes.number, owners).tolist(), apart[first].tolist(), strict=True):
        if place < len(timed) and timed[place] and episodes.number[place] == rows.episode[row]:
            own = slice(starts[place], stops[place])
            steps = np.diff(rows.time[own]) * info.fps / np.diff(frame[own])
            usual = float(np.median(steps)) if len(steps) else 1.0
            ends = [float(videos.end[place] - videos.begin[place]) for videos in episodes.videos.values()]
            if not _times_are_consistent(ahead[own], rows.time[own], frame[own], usual, ends, info.fps):
                wrong.append((place, row, usual))
    others = [usual for _, _, usual in wrong if abs(usual - 1) > RATE_SHARE]
    if len(others) > timed.sum() / 2:
        text = f"{info.path} says {info.fps:g} rows a second, but the column 'timestamp' has {info.fps / float(np.median(others)):g}"
        yield Fault("fps", text, f"write the right fps in {info.path}, or correct the column")
        return
    for place, row, usual in wrong:
        due = f"frame_index {frame[row]}" if rows.frame is not None else f"place {frame[row]} in the episode"
        rate = f" (the episode has {info.fps / usual:g})" if abs(usual - 1) > RATE_SHARE else ""
        found = f"{_where(rows, row)} has timestamp {rows.time[row]:g} s"
        text = f"{found}, but {due} at {info.fps:g} rows a second{rate} is {frame[row] / info.fps:g} s"
        yield Fault("time", text, CORRECT, int(episodes.number[place]))


def _times_are_consistent(
    ahead: NDArray[np.float64], time: NDArray[np.float64], frame: NDArray[np.int64], usual: float, spans: Sequence[float], fps: float
) -> bool:
    """Whether an episode's times are right although they differ from its frame_index. usual: median periods between rows."""
    if abs(usual - 1) > RATE_SHARE or not spans:
        return abs(usual - 1) <= RATE_SHARE
    whole = np.rint(ahead)
    if (np.abs(ahead - whole) < 0.25).all() and whole[0] >= 0 and (np.diff(whole) >= 0).all():
        return all(bool(np.isnan(span)) or span * fps > time[-1] * fps + 0.5 for span in spans)
    by_time, by_frame = time[-1] + 1 / fps, (frame[-1] + 1) / fps
    begun = min(abs(ahead[0]), abs(time[0] * fps)) <= APART
    return bool(begun) and all(np.isnan(span) or abs(span - by_time) < abs(span - by_frame) - 0.1 / fps for span in spans)


def _order_faults(episodes: Episodes, chosen: NDArray[np.bool_]) -> Iterator[Fault]:
    """Faults of videos that are ordered neither by episode number nor by row, as every LeRobot tool writes them."""
    places = np.flatnonzero(chosen)
    remedy = f"{CORRECT_EPISODES}; where the videos do have that order, type --dataset.any_video_order true"
    for column, videos in episodes.videos.items():
        found = np.lexsort((videos.begin[places], videos.file[places], videos.chunk[places]))
        displaced = min((np.flatnonzero(found != due) for due in (np.arange(len(places)), np.argsort(episodes.first[places]))), key=len)
        for rank in displaced.tolist():
            number, there = int(episodes.number[places[rank]]), int(episodes.number[places[found[rank]]])
            rule = f"{episodes.path} must give videos in the order of their episodes"
            text = f"{rule}, found {column!r} of episode {there} where {number} is due"
            yield Fault("video", text, remedy, number)


def _span_faults(
    rows: Rows, episodes: Episodes, chosen: NDArray[np.bool_], starts: NDArray[np.int64], stops: NDArray[np.int64], info: Info
) -> Iterator[Fault]:
    """Faults of chosen episodes whose span of a video file is missing, too short or overlaps another's."""
    period = 1 / info.fps
    last = np.full(len(episodes.number), np.nan)
    some = np.flatnonzero(stops > starts)
    last[some] = rows.time[stops[some] - 1]
    for column, videos in episodes.videos.items():
        where = f"{episodes.path} says that the video of {column!r}"
        ends = np.where(np.isnan(videos.end), videos.begin + np.nan_to_num(last) + period, videos.end)
        room = ends - videos.begin - last
        # a span ends one period after its last row; with some writers every span ends at it
        used = room[chosen & (stops > starts)]
        needed = period / 2 if len(used) and np.median(used) > period / 2 else -ROUNDING
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
                text = f"{where} of episode {number} goes from {begin:g} to {end:g} s of {file}, which is no span"
                yield Fault("video", text, CORRECT_EPISODES, number)
                continue
            if room[place] < needed:
                text = f"{where} of episode {number} lasts {end - begin:g} s, but its last row is at {last[place]:g} s"
                yield Fault("video", text, CORRECT_EPISODES, number)
            held = before.get(file)
            if held is not None and begin < held[0] - period / 2:
                text = f"{where} of episode {number} begins at {begin:g} s of {file}, where episode {held[1]} lasts until {held[0]:g} s"
                yield from (Fault("video", text, CORRECT_EPISODES, each) for each in (number, held[1]))  # either may be the wrong one
            before[file] = max((end, number), held or (end, number))
