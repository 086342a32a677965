"""A LeRobot data set that opens at every moment of its recording.

Owns: the published folder and the one that is being written. Does not know: the files' format, where episodes come from.

Rows, videos and metadata of a data set must change together. So episodes go, a segment of ten at a time, into a copy beside the data
set, and the finished copy takes the place of the data set in one step:

    ROOT/                    the data set, always whole                 <──┐ swapped (renameat2 EXCHANGE)
    .NAME.recording/next/    hard links to ROOT's files + new segment   ───┘ fsynced, then
    .NAME.recording/lock     held while a process records; the system drops it when that process dies
A segment only adds files, and replaces the few small ones in meta/ by new ones: no file that is linked ever changes.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyarrow import parquet

from pi0fm.demos.config import DemosConfig
from pi0fm.demos.encoding import EncodedEpisode
from pi0fm.demos.lerobot_writer import Layout, Written, read_written, write_segment
from pi0fm.demos.swap import swap_directories
from pi0fm.files import fsync_directory, write_json
from pi0fm.sim import catalog
from pi0fm_client.errors import OutputError

SEGMENT_EPISODES = 10
SETTINGS_FILE = "meta/pi0fm_recording.json"


class Recording:
    """A data set under construction; `with Recording(root, config) as recording: recording.add(episode)`."""

    def __init__(self, root: Path, config: DemosConfig) -> None:
        """Raises OutputError when `root` holds something else, other settings, or is being recorded by another process."""
        self.root = root.absolute()
        self._config = config
        self._work = self.root.parent / f".{self.root.name}.recording"
        self._settings = recording_settings(config)
        self._layout = layout_of(config)
        self._written = Written()  # what `root` holds
        self._pending: list[EncodedEpisode] = []
        self._lock = -1
        self._seeds: dict[str, list[int]] = {task: [] for task in config.task_names}

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
            self._mend()
            refuse_foreign(self.root, self._settings)
            if (self.root / SETTINGS_FILE).exists():
                self._read_what_is_there()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.publish()
        finally:
            self._leave()

    @property
    def episodes(self) -> int:
        """Episodes in the data set, those of the unpublished segment too."""
        return sum(len(seeds) for seeds in self._seeds.values())

    @property
    def frames(self) -> int:
        """Frames in the data set, those of the unpublished segment too."""
        return self._written.frames + sum(len(episode.action) for episode in self._pending)

    def seeds(self, task: str) -> tuple[int, ...]:
        """The seeds of `task` that are kept, in order."""
        return tuple(self._seeds[task])

    def add(self, episode: EncodedEpisode) -> None:
        """Take one episode; every tenth publishes."""
        self._pending.append(episode)
        self._seeds[episode.task].append(episode.seed)
        if len(self._pending) >= SEGMENT_EPISODES:
            self.publish()

    def publish(self) -> None:
        """Make every added episode part of the data set at `root`; nothing happens when there is none.

        One that Ctrl-C cuts short is done again, from the start, by `__exit__`: nothing is kept of the first attempt, unless the swap was
        its last act.
        """
        if not self._pending:
            return
        self._mend()
        if published_episodes(self.root) == self.episodes:
            self._written, self._pending = read_written(self.root, self._layout), []
            return
        folder = self._work / "next"
        shutil.rmtree(folder, ignore_errors=True)
        link_tree(self.root, folder)
        written, files = write_segment(folder, self._layout, self._written, self._pending)
        write_json(folder / SETTINGS_FILE, self._settings)
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        swap_directories(folder, self.root, aside=self._work / "previous")
        self._written, self._pending = written, []
        fsync_directory(self.root.parent)

    def _mend(self) -> None:
        """After an end between the two renames of a file system that cannot swap, the data set lies aside."""
        previous = self._work / "previous"
        if previous.exists() and not self.root.exists():
            previous.rename(self.root)

    def _leave(self) -> None:
        self._mend()
        shutil.rmtree(self._work, ignore_errors=True)
        os.close(self._lock)

    def _read_what_is_there(self) -> None:
        kept = read_seeds(self.root, {prompt: task for task, prompt in self._settings["prompts"].items()})
        for task, seeds in kept.items():
            if len(seeds) > self._config.episodes:
                found = f"{self.root} already holds {len(seeds)} episodes of {task}, more than episodes={self._config.episodes}"
                raise OutputError(f"{found}; ask for more, or choose another --dataset.root")
            self._seeds[task] = seeds
        self._written = read_written(self.root, self._layout)


def recording_settings(config: DemosConfig) -> dict[str, Any]:
    """What must be equal for a recording to go on; more episodes may be asked for."""
    return {
        "prompts": {task: catalog.prompt_of(task) for task in config.task_names},
        "cameras": [str(camera) for camera in config.camera_specs],
        "noise": float(config.noise),
        "first_seed": config.first_seed,
        "max_steps": config.step_limit,
        "fps": config.control_rate,
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


def layout_of(config: DemosConfig) -> Layout:
    """The data set's shape, as far as it is settled before the first episode."""
    cameras = {camera.name: (camera.height, camera.width) for camera in config.camera_specs}
    return Layout(config.control_rate, config.suite.robot_type, config.suite.state_names, config.suite.action_names, cameras)


def published_episodes(root: Path) -> int:
    """The number of episodes in a data set, 0 when there is none."""
    info = root / "meta/info.json"
    return int(json.loads(info.read_text())["total_episodes"]) if info.exists() else 0


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
    """Copy a folder, which may be missing, without copying what its files hold: hard links."""
    target.mkdir(parents=True)
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        if file.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)  # a file system without hard links: slower and as good
