"""A LeRobot data set (format v3.0) as arrays: state, action, task and episode of every frame, and where its pictures lie.

Owns: the format's layout. Does not know: normalisation, the network, the order of training.
The columns are read with pyarrow, in a tenth of a second; lerobot itself, whose import alone costs many CPU-seconds, is called only to
download what is not on the disk. tests/data compares every column and picture with LeRobotDataset's own.
Shape letters: N frames, S state dim, A action dim.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0fm.data.columns.embodiment import Embodiment, resolve
from pi0fm.data.columns.norm_stats import NormStats, compute_norm_stats
from pi0fm.data.pictures.video import Decoder
from pi0fm.options import option
from pi0fm_client.errors import ConfigError, DatasetError

FORMAT = "v3."
RECORDING = "meta/pi0fm_recording.json"  # what `pi0fm demos` leaves beside LeRobot's own files


@dataclass(frozen=True)
class DatasetConfig:
    """Which data set, and how its pictures are kept; `repo_id` and `root` as LeRobot's users type them."""

    repo_id: str = option("", "name of the data set, such as lerobot/pusht; found under $HF_LEROBOT_HOME, else downloaded")
    root: Path | None = option(None, "directory of the data set, when it lies elsewhere")
    episodes: tuple[int, ...] = option((), "train on these episodes only; empty takes all")
    video_decoder: Decoder = option("auto", "pyav, torchcodec, or auto: torchcodec when it loads")
    cache_dir: Path | None = option(None, "where decoded frames are kept; default ~/.cache/pi0fm/frames")
    cache_limit_gib: float = option(64.0, "a data set whose decoded frames would take more is streamed from its videos instead")
    cache_format: Literal["uint8", "jpeg"] = option("uint8", "decoded frames as they are, or as JPEG: a tenth of the space, slower to read")
    stream_buffer_gib: float = option(4.0, "memory of the shuffle buffer of a data set that is streamed")

    def __post_init__(self) -> None:
        if self.video_decoder not in ("auto", "pyav", "torchcodec"):
            raise ConfigError(f"dataset.video_decoder must be auto, pyav or torchcodec, found {self.video_decoder!r}")
        if self.cache_limit_gib <= 0:
            raise ConfigError(f"dataset.cache_limit_gib must be > 0, found {self.cache_limit_gib}")
        if self.cache_format not in ("uint8", "jpeg"):
            raise ConfigError(f"dataset.cache_format must be uint8 or jpeg, found {self.cache_format!r}")
        if self.stream_buffer_gib <= 0:
            raise ConfigError(f"dataset.stream_buffer_gib must be > 0, found {self.stream_buffer_gib}")


@dataclass(frozen=True)
class Clip:
    """One episode's pictures from one camera: frames `first .. first + count - 1` of the data set, from `offset` in `file`."""

    file: Path
    offset: int
    first: int
    count: int


@dataclass(frozen=True)
class LeRobotSource:
    """The whole data set but its pictures.

    state [N, S], action [N, A] float32; episode, task and end [N] int64, `end` being the index behind each frame's episode;
    frames: the indices to train on; clips: by camera name, one for each episode with video; stored_pictures: cameras kept in parquet.
    demonstration_seeds: by task, lowest and highest; camera_sources: by camera; both only from a recording that says so.
    """

    root: Path
    repo_id: str
    fps: float
    embodiment: Embodiment
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    episode: NDArray[np.int64]
    task: NDArray[np.int64]
    end: NDArray[np.int64]
    frames: NDArray[np.int64]
    tasks: tuple[str, ...]
    clips: dict[str, tuple[Clip, ...]]
    stored_pictures: tuple[str, ...]
    demonstration_seeds: dict[str, list[int]]
    camera_sources: dict[str, str]
    fingerprint: str

    def norm_stats(self, action_horizon: int) -> NormStats:
        """Statistics over the frames that are trained on."""
        chosen = self.frames
        if len(chosen) == len(self.state):
            return compute_norm_stats(self.state, self.action, self.end, self.embodiment.delta_actions, action_horizon)
        place = np.cumsum(np.isin(np.arange(len(self.state)), chosen)) - 1  # whole episodes are kept, so places stay consecutive in each
        ends = place[self.end[chosen] - 1] + 1
        return compute_norm_stats(self.state[chosen], self.action[chosen], ends, self.embodiment.delta_actions, action_horizon)

    def stored(self, camera: str) -> Iterator[tuple[int, bytes]]:
        """(frame index, encoded picture) of a camera whose pictures lie in the parquet files."""
        column = self.embodiment.cameras[camera]
        for path in data_files(self.root):
            with _reading(path):
                for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["index", column]):
                    yield from ((int(row["index"]), row[column]["bytes"]) for row in batch.to_pylist())


def open_source(config: DatasetConfig, embodiment: Embodiment) -> LeRobotSource:
    """Read a data set. Raises ConfigError for what the configuration got wrong, DatasetError for what the data set got wrong."""
    root = locate(config)
    info = _json(root / "meta" / "info.json")
    version = str(info.get("codebase_version", "unknown"))
    if not version.startswith(FORMAT):
        raise DatasetError(
            f"{root} is a LeRobot data set {version}, v3.0 is needed; convert it: "
            f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={config.repo_id or root.name}"
        )
    lacking = [key for key in ("features", "fps", "total_frames") if key not in info]
    if lacking:
        raise DatasetError(f"{root / 'meta' / 'info.json'} lacks {', '.join(lacking)}; record or download the data set again")
    features: dict[str, Any] = info["features"]
    pictures = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
    columns = {name: tuple(feature["shape"]) for name, feature in features.items() if name not in pictures}
    embodiment = resolve(embodiment, columns, pictures, f"the data set {root}")
    wanted = ["index", "episode_index", "task_index", embodiment.state, embodiment.action, *(["seed"] if "seed" in features else [])]
    table = _read_columns(root, list(dict.fromkeys(wanted)), int(info["total_frames"]))  # states may be actions, a few steps ahead
    episode = _integers(table, "episode_index")
    episodes = _episodes(root)
    end = np.asarray(episodes["dataset_to_index"].to_numpy(), dtype=np.int64)
    if len(end) <= episode.max(initial=0):
        raise DatasetError(f"{root} describes {len(end)} episodes, but its rows name episode {episode.max()}; record or download it again")
    tasks = _tasks(root)
    task = _integers(table, "task_index")
    videos = [name for name in pictures if features[name]["dtype"] == "video"]
    recording = _json(root / RECORDING) if (root / RECORDING).is_file() else {}
    names = {prompt: name for name, prompt in recording.get("prompts", {}).items()}
    cameras = embodiment.cameras.items()
    fps = float(info["fps"])
    return LeRobotSource(
        root=root,
        repo_id=config.repo_id,
        fps=fps,
        embodiment=embodiment,
        state=_matrix(table, embodiment.state),
        action=_matrix(table, embodiment.action),
        episode=episode,
        task=task,
        end=end[episode],
        frames=_chosen(config.episodes, episode, len(end)),
        tasks=tasks,
        clips={name: _clips(root, info, episodes, column, fps) for name, column in cameras if column in videos},
        stored_pictures=tuple(name for name, column in cameras if column not in videos),
        demonstration_seeds=_seed_ranges(_integers(table, "seed"), task, [names.get(text, text) for text in tasks])
        if "seed" in features
        else {},
        camera_sources=_camera_sources(recording, embodiment),
        fingerprint=_fingerprint(root),
    )


def locate(config: DatasetConfig) -> Path:
    """The data set's directory: `root`, else `$HF_LEROBOT_HOME/repo_id`, else a download by lerobot."""
    if config.root is not None:
        if not (config.root / "meta" / "info.json").is_file():
            raise DatasetError(
                f"dataset.root must be a LeRobot data set, but {config.root} has no meta/info.json; record one with pi0fm demos"
            )
        return config.root
    if not config.repo_id:
        raise ConfigError("which data set? give --dataset.repo_id NAME, or --dataset.root DIRECTORY")
    home = Path(os.environ.get("HF_LEROBOT_HOME", Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "lerobot")).expanduser()
    if (home / config.repo_id / "meta" / "info.json").is_file():
        return home / config.repo_id
    return _download(config.repo_id)


def data_files(root: Path) -> list[Path]:
    """The parquet files with the rows, in order."""
    return sorted((root / "data").glob("*/*.parquet"))


def _download(repo_id: str) -> Path:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    try:
        return Path(LeRobotDataset(repo_id).root)
    except Exception as error:  # the hub's client raises a dozen unrelated classes for one meaning
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"data set {repo_id!r} is neither on this disk nor to be downloaded ({reason:.120}); give --dataset.root"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DatasetError(f"{path} is not readable ({' '.join(str(error).split()):.120}); record or download the data set again") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What pyarrow raises for a file that is cut, damaged or lacks a column, as one line."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is cut or damaged ({reason:.120}); record or download the data set again") from None


def _read_table(path: Path, names: list[str] | None = None) -> pa.Table:
    """The named columns of a parquet file, in this order; all of them without names."""
    with _reading(path):
        table = pq.ParquetFile(path).read(columns=names)
        return table if names is None else table.select(names)


def _read_columns(root: Path, names: list[str], num_frames: int) -> pa.Table:
    files = data_files(root)
    table = pa.concat_tables(_read_table(path, names) for path in files) if files else None
    if table is None or len(table) != num_frames:
        found = 0 if table is None else len(table)
        raise DatasetError(
            f"{root} promises {num_frames} frames in meta/info.json, but its parquet files hold {found}; record or download it again"
        )
    table = table.sort_by("index")
    if not np.array_equal(_integers(table, "index"), np.arange(num_frames)):
        raise DatasetError(f"the column 'index' of {root} must count 0..{num_frames - 1}; record or download it again")
    return table


def _integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    column = table[name].combine_chunks()
    values = column.flatten() if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) else column
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.int64)


def _matrix(table: pa.Table, name: str) -> NDArray[np.float32]:
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, dtype=np.float32).reshape(len(table), -1)


def _episodes(root: Path) -> Any:
    """meta/episodes as a pandas frame sorted by episode."""
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DatasetError(f"{root} has no meta/episodes; record or download it again")
    with _reading(files[0]):
        wanted = [name for name in pq.ParquetFile(files[0]).schema_arrow.names if not name.startswith("stats/")]
    table = pa.concat_tables((_read_table(path, wanted) for path in files), promote_options="default")
    return table.sort_by("episode_index").to_pandas()


def _tasks(root: Path) -> tuple[str, ...]:
    frame = _read_table(root / "meta" / "tasks.parquet").to_pandas().reset_index()
    text = next(name for name in frame.columns if name != "task_index")
    return tuple(str(task) for task in frame.sort_values("task_index")[text])


def _chosen(wanted: tuple[int, ...], episode: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    unknown = sorted(set(wanted) - set(range(count)))
    if unknown:
        raise ConfigError(f"dataset.episodes must lie in 0..{count - 1}, found {unknown[:8]}")
    return np.flatnonzero(np.isin(episode, wanted)) if wanted else np.arange(len(episode))


def _clips(root: Path, info: dict[str, Any], episodes: Any, column: str, fps: float) -> tuple[Clip, ...]:
    places = zip(
        episodes[f"videos/{column}/chunk_index"],
        episodes[f"videos/{column}/file_index"],
        episodes[f"videos/{column}/from_timestamp"],
        episodes["dataset_from_index"],
        episodes["length"],
        strict=True,
    )
    paths = (
        (root / info["video_path"].format(video_key=column, chunk_index=int(chunk), file_index=int(file)), start, first, length)
        for chunk, file, start, first, length in places
    )
    return tuple(Clip(path, round(float(start) * fps), int(first), int(length)) for path, start, first, length in paths)


def _camera_sources(recording: dict[str, Any], embodiment: Embodiment) -> dict[str, str]:
    """By camera of the embodiment, where the simulator that recorded it finds it."""
    sources = dict(text.split("=", 1) for text in recording.get("cameras", []))
    by_column = {f"observation.images.{name}": source for name, source in sources.items()}
    return {name: by_column[column] for name, column in embodiment.cameras.items() if column in by_column}


def _seed_ranges(seeds: NDArray[np.int64], task: NDArray[np.int64], tasks: list[str]) -> dict[str, list[int]]:
    return {
        text: [int(seeds[task == index].min()), int(seeds[task == index].max())]
        for index, text in enumerate(tasks)
        if (task == index).any()
    }


def _fingerprint(root: Path) -> str:
    """Changes when a file of the data set does: names, sizes and times of all, and the bytes of meta/info.json."""
    digest = hashlib.sha256((root / "meta" / "info.json").read_bytes())
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".parquet", ".mp4")):
        status = path.stat()
        digest.update(f"{path.relative_to(root)}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
