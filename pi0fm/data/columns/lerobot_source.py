"""LeRobot data set (format v3.0) as arrays: state, action, task, episode and time of every row, and the places of its pictures.

Owns: `LeRobotSource`, opening one. Does not know: how files are read and compared (metadata, rows), normalisation, the
network, the order of training.
The columns are read with pyarrow, in 0.1 s; lerobot, whose import alone costs many CPU-seconds, is called only to download a data set
that is not on disk. tests/data compares every column and picture with LeRobotDataset's.

    meta/*  -> chosen episodes -> their rows -> compared with meta/* -> faults of episodes, which are refused or left out -> arrays

Rows of episodes that are not used are not in the arrays: a row's place is its number among those that are.
Shape letters: N rows, S state dim, A action dim.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0fm import progress
from pi0fm.data.columns.embodiment import Embodiment, resolve
from pi0fm.data.columns.faults import Fault, faulty_episodes, refuse
from pi0fm.data.columns.metadata import Episodes, Info, read_episodes, read_info, read_json, read_tasks
from pi0fm.data.columns.norm_stats import NormStats, compute_norm_stats
from pi0fm.data.columns.rows import Rows, read_rows, refuse_unknown_sentences, row_faults, selected_episodes
from pi0fm.data.columns.tables import read_faults, read_table, scalars
from pi0fm.data.config import DatasetConfig, Selection, hub_home, refuse_missing
from pi0fm.files import visible
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError, DatasetError
from pi0fm_client.types import Observation

RECORDING = "meta/pi0fm_recording.json"  # written by `pi0fm demos` in addition to LeRobot's files


@dataclass(frozen=True)
class Clip:
    """Pictures of one episode and camera, for the rows `first .. first + count - 1`: those of `file` from `begin` to `end` seconds."""

    file: Path
    begin: float
    end: float
    first: int
    count: int
    episode: int


@dataclass(frozen=True)
class LeRobotSource:
    """Data set without its pictures.

    state [N, S], action [N, A] float32; episode (its number in the data set), task (place in `tasks`), rows (`index` in the data set) and
    end (the place after the row's episode) [N] int64; time [N] float64, seconds since the episode's start.
    frames: the places to train on; clips: by camera name, one per episode; stored_pictures: cameras kept in parquet; files: with the rows.
    demonstration_seeds: by task, lowest and highest; camera_sources: by camera; both only from a recording that has them.
    sizes: by camera, every (height, width) that meta/info.json declares for its pictures.
    left_out: faults of chosen episodes that were left out.
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
    rows: NDArray[np.int64]
    time: NDArray[np.float64]
    sizes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    left_out: tuple[Fault, ...] = ()

    @property
    def starts(self) -> NDArray[np.int64]:
        """Place of each episode's first row."""
        return np.flatnonzero(np.diff(self.episode, prepend=self.episode[:1] - 1))

    def observation(self, place: int, pictures: NDArray[np.uint8]) -> Observation:
        """Make the observation of the row at `place`, with its pictures [C, height, width, 3] in the order of cameras."""
        images = dict(zip(self.embodiment.cameras, pictures, strict=True))
        return Observation(images, self.state[place], self.tasks[self.task[place]])

    def norm_stats(self, action_horizon: int) -> NormStats:
        """Compute statistics over the rows that are trained on, and the chunks that begin there."""
        return compute_norm_stats(self.state, self.action, self.end, self.embodiment.delta_dims, action_horizon, self.frames)

    def stored(self, camera: str, file: int | None = None, groups: list[int] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (place, value of the picture's column) of a camera whose pictures are in the parquet files, file by file.

        file, groups: only the file of this number, only these row groups.
        """
        column = self.embodiment.cameras[camera]
        for path in self.files if file is None else self.files[file : file + 1]:
            with read_faults(path), pq.ParquetFile(path, page_checksum_verification=True) as opened:
                if column not in opened.schema_arrow.names:
                    raise DatasetError(f"{path} lacks the column {column!r}; record or download the data set again")
                for batch in opened.iter_batches(batch_size=256, row_groups=groups, columns=["index", column]):
                    index = np.asarray(batch["index"].to_numpy(zero_copy_only=False)).astype(np.int64).reshape(-1)
                    places = np.searchsorted(self.rows, index)
                    used = self.rows[np.minimum(places, len(self.rows) - 1)] == index
                    held = batch.column(batch.schema.names.index(column))
                    kept = held.take(np.flatnonzero(used)) if not used.all() else held
                    yield from zip(places[used].tolist(), kept.to_pylist(), strict=True)

    def column(self, name: str) -> NDArray[np.float64]:
        """Read a column of one number per row. Raises DatasetError where it does not exist, or a row has no finite number."""
        values = np.full(len(self.rows), np.nan)
        for path in self.files:
            with read_faults(path):
                present = pq.ParquetFile(path).schema_arrow.names
            if name not in present:
                raise DatasetError(f"{self.root} has no column {name!r} to weigh samples by: {nearest(name, present)}")
            table = read_table(path, ["index", name])
            index, found = scalars(table["index"]), scalars(table[name])
            places = np.searchsorted(self.rows, index.values)
            used = self.rows[np.minimum(places, len(self.rows) - 1)] == index.values
            values[places[used]] = np.where(found.bad, np.nan, found.values)[used]
        wrong = np.flatnonzero(~np.isfinite(values[self.frames]))
        if len(wrong):
            row = int(self.frames[wrong[0]])
            raise DatasetError(
                f"the column {name!r} of {self.root} must be one finite number per row, found none in row {self.rows[row]} of episode "
                f"{self.episode[row]}; correct the column, or weigh by another"
            )
        return values

    def without(self, episodes: Sequence[int], faults: Sequence[Fault] = ()) -> "LeRobotSource":
        """Leave out these episodes, and record their `faults`."""
        kept = ~np.isin(self.episode, list(episodes))
        place = np.cumsum(kept) - 1
        framed = np.zeros(len(kept), dtype=bool)
        framed[self.frames] = True
        clips = {
            camera: tuple(replace(clip, first=int(place[clip.first])) for clip in each if kept[clip.first])
            for camera, each in self.clips.items()
        }
        arrays = {name: getattr(self, name)[kept] for name in ("state", "action", "episode", "task", "rows", "time")}
        return replace(
            self,
            **arrays,
            end=place[self.end[kept] - 1] + 1,
            frames=place[framed & kept],
            clips=clips,
            left_out=(*self.left_out, *faults),
        )


def open_source(config: DatasetConfig, embodiment: Embodiment, selection: Selection | None = None) -> LeRobotSource:
    """Read a data set. selection: of its episodes; those of `config.episodes` for None.

    Raises ConfigError for a fault of the configuration, DatasetError for one of the data set: with `config.skip_bad` only for a fault that
    no choice of episodes avoids.
    """
    source, faults = examine(config, embodiment, selection)
    if not config.skip_bad:
        refuse(faults, config.root or config.repo_id)
    return leave_out(source, faults)


def leave_out(source: LeRobotSource, faults: Sequence[Fault]) -> LeRobotSource:
    """Leave out the episodes that have faults, and report it. Raises DatasetError when none is left or a fault has no episode."""
    refuse([fault for fault in faults if fault.episode is None], source.root)
    bad = faulty_episodes(faults)
    if not bad:
        return source
    kept = source.without(bad, faults)
    if not len(kept.frames):
        raise DatasetError(f"{source.root} has no episode without a fault; the first: {faults[0]}")
    progress.say(
        f"{source.root}: left out {len(bad)} of {len(bad) + len(np.unique(kept.episode))} episodes: {', '.join(map(str, bad)):.200}"
    )
    return kept


def examine(config: DatasetConfig, embodiment: Embodiment, selection: Selection | None = None) -> tuple[LeRobotSource, list[Fault]]:
    """Read the columns of the chosen episodes, and find their faults; faulty episodes are still in the source.

    Raises as `open_source` does where nothing can be read.
    """
    selection = selection or Selection(config.episodes)
    root = locate(config)
    info = read_info(root, config.repo_id)
    colour = [name for name in info.pictures if name not in info.depth]
    embodiment = resolve(embodiment, info.shapes, colour, f"the data set {root}", sorted(info.depth), info.names)
    cameras = embodiment.cameras.items()
    videos = [column for _, column in cameras if info.pictures[column] == "video"]
    episodes = read_episodes(root, info, videos, sentences=bool(selection.tasks))
    tasks = read_tasks(root)
    refuse_unknown_sentences(selection.tasks, tasks, root)
    chosen = selected_episodes(episodes, selection)
    if selection.tasks:
        chosen &= _readable_episodes(episodes, set(selection.tasks))
    if not chosen.any():
        raise _no_episode_error(root, selection, len(episodes.number))
    rows, faults = read_rows(root, episodes, chosen, embodiment, info)
    if selection.tasks:
        wanted = [number for number, text in tasks.items() if text in selection.tasks]
        named = np.unique(rows.episode[np.isin(rows.task, wanted)])
        chosen &= np.isin(episodes.number, [*named, *faulty_episodes(faults)])
        rows = rows.take(np.isin(rows.episode, episodes.number[chosen]))
        if not chosen.any():
            raise _no_episode_error(root, selection, len(episodes.number))
    read = chosen & ~np.isin(episodes.number, faulty_episodes(faults))
    picked = set(episodes.number[read].tolist())
    faults += [fault for fault in episodes.faults if fault.episode in picked]
    broken = faulty_episodes(faults)  # incomplete metadata cannot be compared
    comparable = read & ~np.isin(episodes.number, broken)
    compared = rows.take(~np.isin(rows.episode, broken)) if broken else rows
    faults += row_faults(compared, episodes, comparable, info, tasks, embodiment, any_video_order=config.any_video_order)
    if not len(rows.episode):
        if faults:
            raise faults[0].error()
        raise DatasetError(f"{root} has no row of the chosen episodes in its data files; choose others, or copy meta/ and data/ again")
    source = _source(config, root, embodiment, info, rows, episodes, comparable, tasks, selection, videos)
    return source, sorted(faults, key=lambda fault: fault.episode is not None)


def _source(
    config: DatasetConfig,
    root: Path,
    embodiment: Embodiment,
    info: Info,
    rows: Rows,
    episodes: Episodes,
    comparable: NDArray[np.bool_],
    tasks: dict[int, str | None],
    selection: Selection,
    videos: list[str],
) -> LeRobotSource:
    """Make the source of the rows; several numbers with one sentence become one task."""
    begins = np.flatnonzero(np.diff(rows.episode, prepend=rows.episode[:1] - 1))
    ends = np.append(begins[1:], len(rows.episode))
    end = np.repeat(ends, ends - begins)
    keys = np.array(sorted(tasks), dtype=np.int64)
    sentences = list(dict.fromkeys(tasks[key] or "" for key in keys.tolist()))
    numbered = {text: place for place, text in enumerate(sentences)}
    place = np.array([numbered[tasks[key] or ""] for key in keys.tolist()], dtype=np.int64)
    counted = np.array_equal(keys, np.arange(len(keys)))
    found = np.clip(rows.task if counted else np.searchsorted(keys, rows.task), 0, max(len(keys) - 1, 0))
    task = place[found] if len(keys) else np.zeros(len(rows.task), dtype=np.int64)
    span = {int(rows.episode[begin]): (int(begin), int(stop)) for begin, stop in zip(begins, ends, strict=True)}
    recording = read_json(root / RECORDING) if (root / RECORDING).is_file() else {}
    prompts = recording.get("prompts")
    named = prompts.items() if isinstance(prompts, dict) else ()
    names = {prompt: name for name, prompt in named if isinstance(prompt, str)}
    cameras = embodiment.cameras.items()
    frames: NDArray[np.int64] = np.arange(len(rows.index))
    if selection.tasks:
        frames = np.flatnonzero(np.isin(task, [numbered[text] for text in selection.tasks]))
    return LeRobotSource(
        root=root,
        repo_id=config.repo_id,
        fps=info.fps,
        embodiment=embodiment,
        state=rows.state.values,
        action=rows.action.values,
        episode=rows.episode,
        task=task,
        end=end,
        frames=frames,
        tasks=tuple(sentences),
        clips={name: _clips(episodes, comparable, column, span, rows.time, info.fps) for name, column in cameras if column in videos},
        stored_pictures=tuple(name for name, column in cameras if column not in videos),
        demonstration_seeds={} if rows.seed is None else _seed_ranges(rows.seed, task, [names.get(text, text) for text in sentences]),
        camera_sources=_camera_sources(recording, embodiment),
        fingerprint=_fingerprint(root),
        rows=rows.index,
        time=rows.time,
        sizes={name: info.sizes[column] for name, column in cameras},
        files=rows.files,
    )


def _readable_episodes(episodes: Episodes, sentences: set[str]) -> NDArray[np.bool_]:
    """[E] False where an episode's file of rows is missing and none of its sentences is wanted: it is left out unread."""
    exists = {path: path is None or path.is_file() for path in set(episodes.files)}
    noted = zip(episodes.files, episodes.tasks, strict=True)
    return np.array([exists[path] or tasks is None or bool(tasks & sentences) for path, tasks in noted], dtype=bool)


def _no_episode_error(root: Path, selection: Selection, count: int) -> DatasetError | ConfigError:
    if count == 0:
        return DatasetError(f"{root} holds no episodes; record or download the data set again")
    if selection == Selection(selection.episodes):
        return DatasetError(f"{root} holds no rows of the chosen episodes; choose other dataset.episodes")
    return ConfigError(f"the filters of {root} leave no episode; loosen episodes, exclude_episodes, tasks or min_frames")


def locate(config: DatasetConfig) -> Path:
    """Find the data set's directory: `root`, else `$HF_LEROBOT_HOME/repo_id`, else a download by lerobot."""
    refuse_missing(config)
    if config.root is not None:
        return config.root
    kept = hub_home() / config.repo_id
    if (kept / "meta" / "info.json").is_file():
        return kept
    progress.say(f"data set {config.repo_id} is not in {hub_home()}: asking Hugging Face's hub for it")
    return _download(config.repo_id)


def _download(repo_id: str) -> Path:
    logger = logging.getLogger("lerobot.utils.import_utils")  # logs tracebacks of a torchcodec that does not load
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        try:
            return Path(LeRobotDataset(repo_id).root)
        except Exception as error:  # the hub's client raises a dozen unrelated classes for the same fault
            reason = " ".join(str(error).split())
            raise DatasetError(
                f"data set {repo_id!r} is not on this disk, and cannot be downloaded ({reason:.120}); give --dataset.root"
            ) from error
    finally:
        logger.setLevel(level)


def _clips(
    episodes: Episodes, comparable: NDArray[np.bool_], column: str, span: dict[int, tuple[int, int]], time: NDArray[np.float64], fps: float
) -> tuple[Clip, ...]:
    """Clips of one column, one per comparable episode, in the order of the rows."""
    videos = episodes.videos[column]
    found = []
    for place in np.flatnonzero(comparable).tolist():
        number, file = int(episodes.number[place]), videos.files[place]
        if number not in span or file is None:
            continue
        first, stop = span[number]
        begin, end = float(videos.begin[place]), float(videos.end[place])
        found.append(Clip(file, begin, begin + float(time[stop - 1]) + 1 / fps if np.isnan(end) else end, first, stop - first, number))
    return tuple(sorted(found, key=lambda clip: clip.first))


def _camera_sources(recording: dict[str, Any], embodiment: Embodiment) -> dict[str, str]:
    """Source in the recording simulator of each camera of the embodiment."""
    noted = recording.get("cameras")
    sources = dict(text.split("=", 1) for text in noted if isinstance(text, str) and "=" in text) if isinstance(noted, list) else {}
    by_column = {f"observation.images.{name}": source for name, source in sources.items()}
    return {name: by_column[column] for name, column in embodiment.cameras.items() if column in by_column}


def _seed_ranges(seeds: NDArray[np.int64], task: NDArray[np.int64], tasks: list[str]) -> dict[str, list[int]]:
    return {
        text: [int(seeds[task == index].min()), int(seeds[task == index].max())]
        for index, text in enumerate(tasks)
        if (task == index).any()
    }


def data_files(root: Path) -> list[Path]:
    """List the tables and videos of a data set."""
    return [path for path in sorted([*visible(root, "**/*.parquet"), *visible(root, "**/*.mp4")]) if path.is_file()]


def _fingerprint(root: Path) -> str:
    """Hash names, sizes and times of all files, and the bytes of meta/info.json: it changes with any file of the data set."""
    digest = hashlib.sha256((root / "meta" / "info.json").read_bytes())
    for path in data_files(root):
        status = path.stat()
        digest.update(f"{path.relative_to(root)}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
