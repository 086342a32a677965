"""A LeRobot data set that opens at every moment of its recording.

Owns: features, codec, the published folder and the one that is being written. Does not know: where episodes come from.

LeRobot writes in place: until `finalize` its parquet files have no footer, and a video is rewritten with every episode. So episodes go, a
segment of ten at a time, into a copy beside the data set, and the finished copy takes the place of the data set in one step:

    ROOT/                    the data set, always whole                 <──┐ swapped (renameat2 EXCHANGE)
    .NAME.recording/next/    hard links to ROOT's files + new segment   ───┘ finalized, fsynced, then
    .NAME.recording/lock     held while a process records; the system drops it when that process dies
LeRobot's `resume` never touches an old data or video file, so links are safe; the few files in meta/ that it rewrites are copied.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from pyarrow import parquet

from pi0fm.demos.config import DemosConfig
from pi0fm.demos.episode import Episode
from pi0fm.demos.swap import swap_directories
from pi0fm.errors import OutputError
from pi0fm.files import fsync_directory, write_json
from pi0fm.sim.metaworld import ACTION_NAMES, LONGEST_EPISODE, STATE_NAMES

SEGMENT_EPISODES = 10
SETTINGS_FILE = "meta/pi0fm_recording.json"
# A key frame every 4 frames: random access decodes at most 4 frames. Never `auto`, which picks a GPU's codec where there is no GPU.
CODEC = {"vcodec": "h264", "pix_fmt": "yuv420p", "g": 4, "crf": 18, "preset": "veryfast"}


class Recording:
    """A data set under construction; `with Recording(root, config) as recording: recording.add(episode)`."""

    def __init__(self, root: Path, config: DemosConfig) -> None:
        """Raises OutputError when `root` holds something else, other settings, or is being recorded by another process."""
        self.root = root.absolute()
        self._config = config
        self._work = self.root.parent / f".{self.root.name}.recording"
        self._settings = recording_settings(config)
        self._next: Any = None  # LeRobotDataset in writing mode
        self._pending, self._whole = 0, True
        self._lock = -1
        self._seeds: dict[str, list[int]] = {task: [] for task in config.task_names}
        self.frames = 0

    def __enter__(self) -> Self:
        refuse_foreign(self.root, self._settings)
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._work / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(f"{self.root} is being recorded by another process; wait for it, or choose another --dataset.root") from None
        try:
            previous = self._work / "previous"
            if previous.exists() and not self.root.exists():
                previous.rename(self.root)  # killed between the two renames of a file system that cannot swap
                refuse_foreign(self.root, self._settings)
            shutil.rmtree(self._work / "next", ignore_errors=True)
            if (self.root / SETTINGS_FILE).exists():
                self._read_what_is_there()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._whole:
                self.publish()
        finally:
            self._next = None
            self._leave()

    @property
    def episodes(self) -> int:
        """Episodes in the data set, those of the unpublished segment too."""
        return sum(len(seeds) for seeds in self._seeds.values())

    def seeds(self, task: str) -> tuple[int, ...]:
        """The seeds of `task` that are kept, in order."""
        return tuple(self._seeds[task])

    def add(self, episode: Episode) -> None:
        """Write one episode; every tenth publishes."""
        import datasets

        self._whole = False
        if self._next is None:
            self._next = self._open_next()
        for row, (state, action) in enumerate(zip(episode.state, episode.action, strict=True)):
            images = {f"observation.images.{name}": frames[row] for name, frames in episode.images.items()}
            seed = np.array([episode.seed], np.int64)
            self._next.add_frame({"observation.state": state, "action": action, "seed": seed, "task": episode.prompt, **images})
        datasets.disable_progress_bars()  # one bar an episode; LeRobot turns them on again whenever it loads metadata
        self._next.save_episode(parallel_encoding=False)
        self._seeds[episode.task].append(episode.seed)
        self.frames += len(episode.action)
        self._pending += 1
        self._whole = True
        if self._pending == SEGMENT_EPISODES:
            self.publish()

    def publish(self) -> None:
        """Make every added episode part of the data set at `root`; nothing happens when there is none."""
        if self._pending == 0:
            return
        self._whole = False  # a second Ctrl-C in here must not publish again
        self._next.finalize()
        self._next, self._pending = None, 0
        folder = self._work / "next"
        shutil.rmtree(folder / "images", ignore_errors=True)
        write_json(folder / SETTINGS_FILE, self._settings)
        for file in folder.rglob("*"):
            if file.is_file() and file.stat().st_nlink == 1:
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        swap_directories(folder, self.root, aside=self._work / "previous")
        fsync_directory(self.root.parent)
        self._whole = True

    def _leave(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        os.close(self._lock)

    def _open_next(self) -> Any:
        # LeRobot takes seconds to import, and a command that refuses its options should not wait for it.
        import av
        from lerobot.configs.video import RGBEncoderConfig
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        av.logging.set_libav_level(av.logging.ERROR)  # twenty lines from every encoder would bury the progress line
        folder = self._work / "next"
        # Streaming drops frames when its queue is full: the queue holds a whole episode.
        how: dict[str, Any] = {"streaming_encoding": True, "encoder_queue_maxsize": LONGEST_EPISODE + 1, "encoder_threads": 1}
        how |= {"rgb_encoder": RGBEncoderConfig(**CODEC), "video_backend": "pyav"}
        if not (self.root / SETTINGS_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            return LeRobotDataset.create(
                self._config.dataset.repo_id,
                fps=self._config.fps,
                features=features_of(self._config),
                root=folder,
                robot_type="sawyer",
                **how,
            )
        link_tree(self.root, folder)
        return LeRobotDataset.resume(self._config.dataset.repo_id, root=folder, **how)

    def _read_what_is_there(self) -> None:
        kept = read_seeds(self.root, {prompt: task for task, prompt in self._settings["prompts"].items()})
        for task, seeds in kept.items():
            if len(seeds) > self._config.episodes:
                found = f"{self.root} already holds {len(seeds)} episodes of {task}, more than episodes={self._config.episodes}"
                raise OutputError(f"{found}; ask for more, or choose another --dataset.root")
            self._seeds[task] = seeds
        self.frames = json.loads((self.root / "meta/info.json").read_text())["total_frames"]


def recording_settings(config: DemosConfig) -> dict[str, Any]:
    """What must be equal for a recording to go on; more episodes may be asked for."""
    from pi0fm.sim.metaworld_prompts import TASK_PROMPTS

    return {
        "prompts": {task: TASK_PROMPTS[task] for task in config.task_names},
        "cameras": [str(camera) for camera in config.camera_specs],
        "noise": float(config.noise),
        "first_seed": config.first_seed,
        "max_steps": config.max_steps,
        "fps": config.fps,
    }


def refuse_foreign(root: Path, settings: dict[str, Any]) -> None:
    """Raise OutputError unless `root` is missing, empty, or a recording with these settings."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    try:
        there = json.loads((root / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        raise OutputError(
            f"{root} exists and is not a recording of pi0fm demos; choose another --dataset.root, nothing was changed"
        ) from None
    for name, value in settings.items():
        if there.get(name) != value:
            shown = "tasks" if name == "prompts" else name
            found, asked = (", ".join(x) if isinstance(x, dict | list) else x for x in (there.get(name), value))
            difference = f"{root} was recorded with {shown}={found}, but {shown}={asked} is asked for"
            raise OutputError(f"{difference}; give the same settings, or choose another --dataset.root")


def features_of(config: DemosConfig) -> dict[str, Any]:
    """LeRobot's features. `seed` is a column of the frames: unlike metadata of ours, every LeRobot tool that copies or merges keeps it."""
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": list(STATE_NAMES)},
        "action": {"dtype": "float32", "shape": (len(ACTION_NAMES),), "names": list(ACTION_NAMES)},
        "seed": {"dtype": "int64", "shape": (1,), "names": None},
    }
    for camera in config.camera_specs:
        shape = (camera.height, camera.width, 3)
        features[f"observation.images.{camera.name}"] = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
    return features


def read_seeds(root: Path, task_of_prompt: dict[str, str]) -> dict[str, list[int]]:
    """The seeds in a recorded data set by task, in the order of its episodes."""
    prompts = parquet.read_table(root / "meta/tasks.parquet").to_pydict()
    words = prompts.get("task") or prompts["__index_level_0__"]
    task_names = {index: task_of_prompt[word] for index, word in zip(prompts["task_index"], words, strict=True)}
    seeds: dict[str, list[int]] = {task: [] for task in task_of_prompt.values()}
    for file in sorted((root / "data").rglob("*.parquet")):
        rows = parquet.read_table(file, columns=["seed", "task_index", "frame_index"]).to_pydict()
        for seed, task_index, frame in zip(rows["seed"], rows["task_index"], rows["frame_index"], strict=True):
            if frame == 0:
                seeds[task_names[task_index]].append(seed)
    return seeds


def link_tree(source: Path, target: Path) -> None:
    """Copy a data set without copying its data: hard links, except for what LeRobot rewrites in place."""
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        if file.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.parent.name != "meta":
            try:
                os.link(file, copy)
                continue
            except OSError:
                pass  # a file system without hard links: the copy below is slower and as good
        shutil.copy2(file, copy)
