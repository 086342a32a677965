"""Metadata of a LeRobot data set (format v3.0): meta/info.json, meta/episodes, meta/tasks.parquet.

Owns: reading them in every layout that LeRobot's versions and converters have written, and their faults.
Does not know: the rows.

    meta/info.json        features, fps, number of frames, paths of files
    meta/episodes/*/*     an episode per row: number, first and last row, its file of rows, the file and span of each of its videos
    meta/tasks.parquet    number -> sentence; a number is a key: there may be gaps, and it may begin anywhere
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0fm.data.columns.faults import RECORD_AGAIN, Fault
from pi0fm.data.columns.tables import ColumnValues, concatenate, integers, is_text, matrix, read_faults, read_table, scalars, texts
from pi0fm.files import visible
from pi0fm_client.errors import DatasetError

FORMAT = "v3."
PICTURES = ("video", "image")
BOUNDS = ("length", "dataset_from_index", "dataset_to_index")
DATA_PLACE = ("data/chunk_index", "data/file_index")
VIDEO_PLACE = ("chunk_index", "file_index", "from_timestamp")
CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class Info:
    """Contents of meta/info.json that are needed.

    shapes: of the columns without pictures; names: of columns' dimensions, where given; pictures: column -> `video` or `image`;
    sizes: picture column -> (height, width), in each form that is given.
    """

    path: Path
    fps: float
    total_frames: int
    total_episodes: int | None
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, tuple[str, ...]]
    pictures: dict[str, str]
    sizes: dict[str, tuple[tuple[int, int], ...]]
    depth: frozenset[str]
    data_path: str | None
    video_path: str | None


LONGEST_SIDE = 2**20  # of a feature's shape


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DatasetError."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DatasetError(f"{path} is not readable ({' '.join(str(error).split()):.120}); {RECORD_AGAIN}") from None


def read_info(root: Path, repo_id: str) -> Info:
    """Read meta/info.json. Raises DatasetError for another format, or for an entry that is missing or of another form."""
    path = root / "meta" / "info.json"
    tree = read_json(path)
    version = str(tree.get("codebase_version", "unknown"))
    if not version.startswith(FORMAT):
        raise DatasetError(
            f"{root} is a LeRobot data set {version}, v3.0 is needed; convert it: "
            f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={repo_id or root.name}"
        )
    lacking = [key for key in ("features", "fps", "total_frames") if tree.get(key) is None]
    if lacking:
        raise DatasetError(f"{path} lacks {', '.join(lacking)}; {RECORD_AGAIN}")
    features = tree["features"]
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise DatasetError(f"features of {path} must be an object of objects, found {features!r:.80}; {RECORD_AGAIN}")
    fps = _number(tree["fps"])
    if fps is None or fps <= 0:
        raise DatasetError(f"fps of {path} must be a number above 0, found {tree['fps']!r:.40}; write the control rate there")
    totals: dict[str, int] = {}
    for name in ("total_frames", "total_episodes"):
        total = _number(tree.get(name))
        if tree.get(name) is not None and (total is None or total != int(total) or total < 0):
            raise DatasetError(f"{name} of {path} must be a whole number, found {tree[name]!r:.40}; write how many there are")
        if total is not None:
            totals[name] = int(total)
    pictures = {name: str(feature["dtype"]) for name, feature in features.items() if feature.get("dtype") in PICTURES}
    return Info(
        path=path,
        fps=fps,
        total_frames=totals["total_frames"],
        total_episodes=totals.get("total_episodes"),
        shapes={name: shape for name, feature in features.items() if name not in pictures and (shape := _shape(feature)) is not None},
        names={name: found for name, feature in features.items() if (found := _names(feature))},
        pictures=pictures,
        sizes={name: _sizes(features[name]) for name in pictures},
        depth=frozenset(name for name in pictures if _is_depth(features[name])),
        data_path=_pattern(tree.get("data_path")),
        video_path=_pattern(tree.get("video_path")),
    )


def _names(feature: dict[str, Any]) -> tuple[str, ...]:
    """Distinct names of a column's dimensions, flat or under one heading; none where their number differs."""
    found = feature.get("names")
    if isinstance(found, Mapping) and len(found) == 1:
        found = next(iter(found.values()))
    names = tuple(map(str, found)) if isinstance(found, list) else ()
    return names if len(set(names)) == len(names) and _shape(feature) == (len(names),) else ()


@dataclass(frozen=True)
class Videos:
    """Videos of one column by episode: file and its two numbers, span in seconds, NaN where unknown."""

    files: tuple[Path, ...]
    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    begin: NDArray[np.float64]
    end: NDArray[np.float64]


@dataclass(frozen=True)
class Episodes:
    """Contents of meta/episodes by ascending episode number, E rows. files: of each episode's rows, None where none is named.

    tasks: the sentences noted for an episode, None where none are; path: the folder, for messages.
    """

    path: Path
    number: NDArray[np.int64]
    first: NDArray[np.int64]
    stop: NDArray[np.int64]
    length: NDArray[np.int64]
    files: tuple[Path | None, ...]
    videos: dict[str, Videos]
    tasks: tuple[frozenset[str] | None, ...]
    faults: tuple[Fault, ...] = field(default=())


def read_episodes(root: Path, info: Info, video_columns: Sequence[str], *, sentences: bool = False) -> Episodes:
    """Read meta/episodes, with the sentences of each on demand only.

    Raises DatasetError for a fault of the whole data set; faults of single episodes are in `faults`.
    """
    folder = root / "meta" / "episodes"
    paths = visible(folder, "*/*.parquet")
    if not paths:
        raise DatasetError(f"{root} has no meta/episodes; {RECORD_AGAIN}")
    tables = []
    for path in paths:
        with read_faults(path):
            present = pq.ParquetFile(path).schema_arrow.names
        tables.append(read_table(path, [name for name in dict.fromkeys(present) if not name.startswith("stats/")]))
    number = _whole(paths, tables, "episode_index")
    if number.bad.any():
        raise DatasetError(f"episode_index of {folder} must be whole numbers, found {number.found}; {RECORD_AGAIN}")
    order = np.argsort(number.values, kind="stable")
    numbers = number.values[order]
    twice = np.flatnonzero(np.diff(numbers) == 0)
    if len(twice):
        where = np.repeat(np.arange(len(paths)), [len(table) for table in tables])[order]
        first, second = paths[where[twice[0]]], paths[where[twice[0] + 1]]
        raise DatasetError(
            f"episode {numbers[twice[0]]} is listed twice, in {first} and {second}; remove the file or the rows that are repeated"
        )
    if info.total_episodes is not None and len(numbers) != info.total_episodes:
        raise DatasetError(f"{info.path} promises {info.total_episodes} episodes, but {folder} lists {len(numbers)}; {RECORD_AGAIN}")
    faults: list[Fault] = []

    def column(name: str, read: Any) -> NDArray[Any]:
        found: ColumnValues = read(paths, tables, name)
        values, bad = found.values[order], found.bad[order]
        for row in np.flatnonzero(bad).tolist():
            text = f"{folder} must give {name} of every episode, found {found.found} for episode {numbers[row]}"
            faults.append(Fault("metadata", text, RECORD_AGAIN, int(numbers[row])))
        return values

    length, first, stop = (column(name, _whole) for name in BOUNDS)
    names = set(tables[0].column_names)
    shared: dict[Any, Path] = {}  # one object per file: hashing a path again costs more than reading its rows
    files: tuple[Path | None, ...] = (None,) * len(numbers)
    if names.issuperset(DATA_PLACE):
        chunks, numbered = (_whole(paths, tables, name) for name in DATA_PLACE)
        placed = zip(
            chunks.values[order].tolist(), numbered.values[order].tolist(), (chunks.bad | numbered.bad)[order].tolist(), strict=True
        )
        files = tuple(None if bad else _place(shared, root, info.path, "data_path", info.data_path, *each) for *each, bad in placed)
    videos = {}
    for name in video_columns:
        chunk, file, begin = (
            column(f"videos/{name}/{part}", read) for part, read in zip(VIDEO_PLACE, (_whole, _whole, _real), strict=True)
        )
        end: NDArray[np.float64] = np.full(len(numbers), np.nan)
        if f"videos/{name}/to_timestamp" in names:
            noted_end = _real(paths, tables, f"videos/{name}/to_timestamp")
            end = np.where(noted_end.bad, np.nan, noted_end.values)[order]
        found = zip(chunk.tolist(), file.tolist(), strict=True)
        videos[name] = Videos(
            tuple(_place(shared, root, info.path, "video_path", info.video_path, *each, name) for each in found), chunk, file, begin, end
        )
    noted = [each for table in tables for each in _sentences(table)] if sentences else [None] * len(numbers)
    return Episodes(folder, numbers, first, stop, length, files, videos, tuple(noted[row] for row in order), tuple(faults))


def read_means(root: Path, column: str) -> dict[int, NDArray[np.float64]]:
    """Read the mean of a picture column's three channels by episode, where meta/episodes has its statistics."""
    found: dict[int, NDArray[np.float64]] = {}
    name = f"stats/{column}/mean"
    for path in visible(root / "meta" / "episodes", "*/*.parquet"):
        with read_faults(path):
            present = pq.ParquetFile(path).schema_arrow.names
        if name in present:
            table = read_table(path, ["episode_index", name])
            means = matrix(table[name], 3)
            numbers = integers(table["episode_index"]).values
            found |= {
                int(number): mean.astype(np.float64) for number, mean, bad in zip(numbers, means.values, means.bad, strict=True) if not bad
            }
    return found


def read_tasks(root: Path) -> dict[int, str | None]:
    """Read sentences by number. Raises DatasetError for a table without numbers or sentences, or with one number for two sentences."""
    path = root / "meta" / "tasks.parquet"
    table = read_table(path)
    keys, words = _task_columns(path, table)
    found: dict[int, str | None] = {}
    for key, sentence in zip(keys, words, strict=True):
        text = None if sentence is None else str(sentence)
        if key in found and found[key] != text:
            raise DatasetError(f"{path} gives task {key} two sentences, {found[key]!r:.60} and {text!r:.60}; keep one of them")
        found[key] = text
    return found


def _task_columns(path: Path, table: pa.Table) -> tuple[list[int], list[Any]]:
    """(numbers, sentences) of tasks.parquet: sentences as pandas' index, or as a column; numbers as a column, or as pandas' index."""
    text = [field.name for field in table.schema if is_text(field.type)]
    whole = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    name = next((name for name in ("task", "tasks", "__index_level_0__") if name in text), text[0] if len(text) == 1 else None)
    if name is None and not len(table):
        return [], []
    if name is None:
        raise DatasetError(f"{path} must hold one column with sentences, found {', '.join(table.column_names):.200}; {RECORD_AGAIN}")
    sentences = texts(path, table[name])
    index = next((each for each in ("__index_level_0__", "index") if each in whole), None)
    key = "task_index" if "task_index" in table.column_names else index
    if key is None:
        ranges = [each for each in (table.schema.pandas_metadata or {}).get("index_columns", []) if isinstance(each, dict)]
        if not ranges:
            raise DatasetError(f"{path} must hold the column task_index, found {', '.join(table.column_names):.200}; {RECORD_AGAIN}")
        return list(range(ranges[0]["start"], ranges[0]["stop"], ranges[0]["step"])), sentences
    numbers = integers(table[key])
    if numbers.bad.any():
        raise DatasetError(f"task_index of {path} must be whole numbers, found {numbers.found}; {RECORD_AGAIN}")
    return numbers.values.tolist(), sentences


def _sentences(table: pa.Table) -> list[frozenset[str] | None]:
    if "tasks" not in table.column_names:
        return [None] * len(table)
    return [frozenset(map(str, each)) if isinstance(each, list) and each else None for each in table["tasks"].to_pylist()]


def _whole(paths: Sequence[Path], tables: Sequence[pa.Table], name: str) -> ColumnValues:
    return _joined(paths, tables, name, integers)


def _real(paths: Sequence[Path], tables: Sequence[pa.Table], name: str) -> ColumnValues:
    found = _joined(paths, tables, name, scalars)
    bad = found.bad | ~np.isfinite(found.values)
    return ColumnValues(found.values.astype(np.float64), bad, found.found or ("a number that is not finite" if bad.any() else ""))


def _joined(paths: Sequence[Path], tables: Sequence[pa.Table], name: str, read: Any) -> ColumnValues:
    """Concatenate a column over all files. Raises DatasetError for a file without it."""
    parts = []
    for path, table in zip(paths, tables, strict=True):
        if name not in table.column_names:
            raise DatasetError(f"{path} lacks the column {name!r}; {RECORD_AGAIN}")
        parts.append(read(table[name]))
    return concatenate(parts)


def _place(
    known: dict[Any, Path], root: Path, path: Path, name: str, pattern: str | None, chunk: int, file: int, video_key: str = ""
) -> Path:
    key = (chunk, file, video_key)
    if key in known:
        return known[key]
    if pattern is None:
        raise DatasetError(f"{path} must give {name}, the pattern of file names, found none; {RECORD_AGAIN}")
    try:
        return known.setdefault(key, root / pattern.format(video_key=video_key, chunk_index=chunk, file_index=file))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DatasetError(f"{name} of {path} is {pattern!r}, which names an unknown field ({error}); {RECORD_AGAIN}") from None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if np.isfinite(number) else None


def _shape(feature: dict[str, Any]) -> tuple[int, ...] | None:
    shape = feature.get("shape")
    if not isinstance(shape, list | tuple) or not all(type(each) is int and 0 <= each <= LONGEST_SIDE for each in shape):
        return None
    return tuple(shape)


def _sizes(feature: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """(height, width) by `shape`, with the channels first or last, and by the video's entry."""
    shape, names = feature.get("shape"), feature.get("names")
    sides = list(shape) if isinstance(shape, list | tuple) and all(type(each) is int for each in shape) else []
    if len(sides) == 3:
        sides = sides[1:] if sides[0] in CHANNELS and sides[2] not in CHANNELS else sides[:2]
    words = [name for name in names if name in ("height", "width")] if isinstance(names, list | tuple) else []
    if words == ["width", "height"]:
        sides.reverse()
    found = [(sides[0], sides[1])] if len(sides) == 2 else []
    for note in (feature.get("info"), feature.get("video_info")):
        pair = [note.get(f"video.{side}") for side in ("height", "width")] if isinstance(note, dict) else []
        if len(pair) == 2 and all(type(each) is int for each in pair):
            found.append((pair[0], pair[1]))
    return tuple(dict.fromkeys(found))


def _pattern(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _is_depth(feature: dict[str, Any]) -> bool:
    notes = [feature.get("info"), feature.get("video_info"), feature]
    return any(isinstance(note, dict) and (note.get("is_depth_map") or note.get("video.is_depth_map")) for note in notes)
