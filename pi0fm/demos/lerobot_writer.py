"""Writer of LeRobot's data set format v3.0, one segment of episodes at a time.

Owns: the path and the schema of every file, the contents that the next segment needs. Does not know: how a data set is published,
where episodes come from. LeRobot's writer costs 8 to 11 ms of CPU per frame; a test compares the two file by file.

    data/chunk-000/file-007.parquet             the rows of segment 7, one row group per episode
    videos/<camera>/chunk-000/file-007.mp4      its pictures, one after the other
    meta/episodes/chunk-000/file-007.parquet    where each episode is in those, its statistics
    meta/{info.json, stats.json, tasks.parquet} of all segments; replaced, never changed in place: a hard link may share them
A thousand files fill a chunk. Shape letters: N frames, T frames of one episode, D numbers per frame.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0fm.demos.encoding import CODEC, EncodedDemonstration, join_videos
from pi0fm.demos.statistics import NAMES, Statistics, of_columns, union
from pi0fm.files import visible, write_bytes, write_json

CHUNK_FILES = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_PARQUET: Mapping[str, Any] = {"compression": "snappy", "use_dictionary": True, "write_page_checksum": True}
_COUNTERS: Mapping[str, Any] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    **{name: {"dtype": "int64", "shape": [1], "names": None} for name in ("frame_index", "episode_index", "index", "task_index")},
}
_ARROW_TYPES: Mapping[str, pa.DataType] = {"float32": pa.float32(), "int64": pa.int64()}


@dataclass(frozen=True)
class Layout:
    """Fixed parts of a growing data set. state_names, action_names: of their numbers; cameras: name -> (height, width)."""

    fps: int
    robot_type: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]]

    @property
    def features(self) -> dict[str, Any]:
        """LeRobot's `features`. `seed` is a column of the frames: LeRobot copies and merges columns, but no additional metadata."""
        features: dict[str, Any] = {
            "observation.state": {"dtype": "float32", "shape": [len(self.state_names)], "names": list(self.state_names)},
            "action": {"dtype": "float32", "shape": [len(self.action_names)], "names": list(self.action_names)},
            "seed": {"dtype": "int64", "shape": [1], "names": None},
        }
        for name, (height, width) in self.cameras.items():
            about = {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
            features[video_key(name)] = about | {"info": _video_info(height, width, self.fps)}
        return features | dict(_COUNTERS)

    @property
    def columns(self) -> dict[str, Any]:
        """Features that are columns of the parquet files."""
        return {name: feature for name, feature in self.features.items() if feature["dtype"] != "video"}


@dataclass(frozen=True)
class Contents:
    """Contents of a data set that the next segment needs.

    file: number of the next file. tasks: their sentences. columns: every frame, by feature, [N, D]. pictures: statistics by video feature.
    """

    episodes: int = 0
    file: int = 0
    tasks: tuple[str, ...] = ()
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    pictures: Mapping[str, Statistics] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.columns["index"]) if self.columns else 0

    @property
    def seeds(self) -> list[tuple[str, int]]:
        """(sentence, seed) of every episode, in order."""
        if not self.columns:
            return []
        first = self.columns["frame_index"][:, 0] == 0
        numbers, seeds = (self.columns[name][first, 0].tolist() for name in ("task_index", "seed"))
        return [(self.tasks[number], seed) for number, seed in zip(numbers, seeds, strict=True)]


def video_key(camera: str) -> str:
    """Feature name of a camera."""
    return f"observation.images.{camera}"


def read_contents(root: Path, layout: Layout) -> Contents:
    """Read the contents of the data set at `root`, written by this module or by LeRobot."""
    info = json.loads((root / "meta/info.json").read_text())
    stats = json.loads((root / "meta/stats.json").read_text())
    names = list(layout.columns)
    found = [pq.ParquetFile(path, page_checksum_verification=True) for path in visible(root / "data", "*/*.parquet")]
    table = pa.concat_tables(file.read(columns=names) for file in found).sort_by("index")
    words = pq.read_table(root / "meta/tasks.parquet").sort_by("task_index")
    pictures = {key: {name: np.array(stats[key][name]) for name in NAMES} for key in map(video_key, layout.cameras)}
    return Contents(
        episodes=info["total_episodes"],
        file=_next_file(root),
        tasks=tuple(words["task"].to_pylist()),
        columns={name: _matrix(table[name], feature["shape"][0]) for name, feature in layout.columns.items()},
        pictures=pictures,
    )


def write_segment(root: Path, layout: Layout, before: Contents, episodes: Sequence[EncodedDemonstration]) -> Contents:
    """Add `episodes` to the data set at `root`, which holds `before`; return the new contents.

    Raises OutputError when the episodes' videos do not fit together.
    """
    chunk, file = divmod(before.file, CHUNK_FILES)
    tasks = tuple(dict.fromkeys((*before.tasks, *(episode.prompt for episode in episodes))))
    rows: list[dict[str, NDArray[Any]]] = []
    lines: list[dict[str, Any]] = []
    pictures = dict(before.pictures)
    first = offset = before.frames
    for number, episode in enumerate(episodes, start=before.episodes):
        rows.append(_rows(episode, number, offset, tasks.index(episode.prompt), layout.fps))
        lines.append(_episode_line(episode, number, (chunk, file), rows[-1], (offset - first) / layout.fps, layout))
        for name, video in episode.images.items():
            key = video_key(name)
            pictures[key] = union(pictures[key], video.statistics) if key in pictures else video.statistics
        offset += len(episode.action)
    everything = [before.columns, *rows] if before.columns else rows
    columns = {name: np.concatenate([part[name] for part in everything]) for name in layout.columns}
    after = Contents(before.episodes + len(episodes), before.file + 1, tasks, columns, pictures)

    tables = [pa.table([_arrow(row[name], layout.columns[name]) for name in row], schema=_schema(layout)) for row in rows]
    _write_tables(root / DATA_PATH.format(chunk_index=chunk, file_index=file), tables)
    table = pa.Table.from_pydict({name: [line[name] for line in lines] for name in lines[0]})
    _write_tables(root / EPISODES_PATH.format(chunk_index=chunk, file_index=file), [table])
    for camera in layout.cameras:
        path = root / VIDEO_PATH.format(video_key=video_key(camera), chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        join_videos(path, [episode.images[camera].content for episode in episodes], layout.fps)
    _write_meta(root, layout, after)
    return after


def _rows(episode: EncodedDemonstration, number: int, offset: int, task: int, fps: int) -> dict[str, NDArray[Any]]:
    """Return the columns of one episode, each [T, D], in the order of the file."""
    length = len(episode.action)
    frame = np.arange(length)[:, None]
    return {
        "observation.state": episode.state,
        "action": episode.action,
        "seed": np.full((length, 1), episode.seed),
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full((length, 1), number),
        "index": frame + offset,
        "task_index": np.full((length, 1), task),
    }


def _episode_line(
    episode: EncodedDemonstration, number: int, place: tuple[int, int], rows: Mapping[str, NDArray[Any]], begins: float, layout: Layout
) -> dict[str, Any]:
    """Return the episode's row of meta/episodes. place: chunk and file; begins: seconds from the start of the videos."""
    length = len(episode.action)
    offset = int(rows["index"][0, 0])
    line: dict[str, Any] = {"episode_index": number, "tasks": [episode.prompt], "length": length}
    line |= {"data/chunk_index": place[0], "data/file_index": place[1], "dataset_from_index": offset, "dataset_to_index": offset + length}
    for camera in layout.cameras:
        key = f"videos/{video_key(camera)}"
        line |= {f"{key}/chunk_index": place[0], f"{key}/file_index": place[1]}
        line |= {f"{key}/from_timestamp": begins, f"{key}/to_timestamp": begins + length / layout.fps}
    found: dict[str, Statistics] = {name: of_columns(values) for name, values in rows.items()}
    found |= {video_key(camera): episode.images[camera].statistics for camera in layout.cameras}
    line |= {f"stats/{feature}/{name}": value.tolist() for feature, statistics in found.items() for name, value in statistics.items()}
    return line | {"meta/episodes/chunk_index": place[0], "meta/episodes/file_index": place[1]}


def _write_meta(root: Path, layout: Layout, written: Contents) -> None:
    """Write meta/. Quantiles are exact over all frames, where LeRobot takes means of the episodes'; those of pictures are LeRobot's."""
    info = {
        "codebase_version": "v3.0",
        "fps": layout.fps,
        "features": layout.features,
        "total_episodes": written.episodes,
        "total_frames": written.frames,
        "total_tasks": len(written.tasks),
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "robot_type": layout.robot_type,
        "splits": {"train": f"0:{written.episodes}"},
    }
    stats = {name: of_columns(values) for name, values in written.columns.items()} | dict(written.pictures)
    write_json(root / "meta/info.json", info)
    write_json(root / "meta/stats.json", {key: {name: value.tolist() for name, value in found.items()} for key, found in stats.items()})
    write_bytes(root / "meta/tasks.parquet", _tasks_file(written.tasks))


def _tasks_file(tasks: Sequence[str]) -> bytes:
    """Write a parquet file as pandas does for the column `task_index` and the index `task`, by which LeRobot looks tasks up."""
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ]
    names = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": {"encoding": "UTF-8"}}
    about = {"index_columns": ["task"], "column_indexes": [names], "columns": columns, "attributes": {}, "pandas_version": "2.3.3"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(about)}), file, **_PARQUET)
    return file.getvalue()


def _write_tables(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write one row group for each table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema, **_PARQUET) as file:
        for table in tables:
            file.write_table(table)


def _schema(layout: Layout) -> pa.Schema:
    """Return Arrow types, with the metadata by which Hugging Face's `datasets` opens the file."""
    fields, described = [], {}
    for name, feature in layout.columns.items():
        width, kind = feature["shape"][0], _ARROW_TYPES[feature["dtype"]]
        value = {"dtype": feature["dtype"], "_type": "Value"}
        fields.append(pa.field(name, kind if width == 1 else pa.list_(pa.field("element", kind), width)))
        described[name] = value if width == 1 else {"feature": value, "length": width, "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def _arrow(values: NDArray[Any], feature: Mapping[str, Any]) -> pa.Array:
    kind, width = _ARROW_TYPES[feature["dtype"]], feature["shape"][0]
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind)
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.field("element", kind), width))


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    whole = column.combine_chunks()
    flat = whole.flatten() if pa.types.is_list(whole.type) or pa.types.is_fixed_size_list(whole.type) else whole
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, width)


def _next_file(root: Path) -> int:
    """Return one more than the highest number of any file: no name is used twice."""
    names = [re.search(r"chunk-(\d+)/file-(\d+)\.", path.as_posix()) for path in root.rglob("file-*")]
    return 1 + max((int(name[1]) * CHUNK_FILES + int(name[2]) for name in names if name), default=-1)


def _video_info(height: int, width: int, fps: int) -> dict[str, Any]:
    about: dict[str, Any] = {"video.height": height, "video.width": width, "video.fps": fps, "video.channels": 3, "has_audio": False}
    about |= {"video.codec": CODEC["vcodec"], "video.pix_fmt": CODEC["pix_fmt"]}
    about |= {f"video.{name}": CODEC[name] for name in ("g", "crf", "preset", "extra_options")}
    return about | {"video.fast_decode": 0, "video.video_backend": "pyav", "is_depth_map": False}
