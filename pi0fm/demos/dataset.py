"""LeRobot data set that can be opened at any time during its recording.

Owns: the published folder, its replacement, the lock, the check for damage. Does not know: the files' format, where episodes come from.

Rows, videos and metadata must change together. Episodes are added to a copy of the data set in segments of ten, and the finished
copy replaces the data set in one step:

    ROOT/                        the data set, always whole                 <──┐ exchanged (renameat2) once its files are synced
    .ROOT.HOST-RANDOM/           hard links to ROOT's files + new segment   ───┘
    .ROOT.recording/lock         held while a process records; the system drops it when that process dies
    .ROOT.recording/previous/    the former data set, until it is removed
A segment adds files, and replaces the small ones in meta/: no linked file ever changes.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pi0fm import files
from pi0fm.demos.config import DemosConfig
from pi0fm.demos.encoding import EncodedDemonstration
from pi0fm.demos.lerobot_writer import Contents, Layout, read_contents, write_segment
from pi0fm.sim import catalog
from pi0fm_client.errors import DatasetError, OutputError

SEGMENT_EPISODES = 10
SETTINGS_FILE = "meta/pi0fm_recording.json"
HASHED = ("data", "videos", "meta/episodes")  # folders of files that never change


class Recording:
    """Data set under construction; `with Recording(root, config) as recording: recording.add(episode)`."""

    def __init__(self, root: Path, config: DemosConfig) -> None:
        files.refuse_name(root)
        self.root = root.resolve()  # an exchange would replace a link, not its target
        self._config = config
        self._work = self.root.parent / f".{self.root.name}.recording"
        self._settings = recording_settings(config)
        self._layout = layout_of(config)
        self._published = Contents()
        self._hashes: dict[str, str] = {}
        self._pending: list[EncodedDemonstration] = []
        self._lock = -1
        self._seeds: dict[str, list[int]] = {task: [] for task in config.task_names}

    def __enter__(self) -> Self:
        """Lock the root and read its contents.

        Raises DatasetError for a damaged recording; OutputError for a root that cannot be written, holds other files or settings, or is
        recorded by another process.
        """
        refuse_foreign(self.root, self._settings)
        if is_mount_point(self.root):
            raise OutputError(f"{self.root} is a mount point, which nothing can replace; type --dataset.root {self.root / 'set'}")
        files.make_folder(self.root.parent)
        with files.write_faults(self.root):
            lock = files.lock_file(self._work / "lock")
            if lock is None:
                raise OutputError(f"{self.root} is being recorded by another process; wait for it, or choose another --dataset.root")
            self._lock = lock
            try:
                self._restore_previous()
                refuse_foreign(self.root, self._settings)
                if (self.root / SETTINGS_FILE).exists():
                    self._read_published()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.publish()
        finally:
            self._release()

    @property
    def episodes(self) -> int:
        """Episodes in the data set and in the unpublished segment."""
        return sum(len(seeds) for seeds in self._seeds.values())

    @property
    def frames(self) -> int:
        """Frames in the data set and in the unpublished segment."""
        return self._published.frames + sum(len(episode.action) for episode in self._pending)

    def seeds(self, task: str) -> tuple[int, ...]:
        """Kept seeds of `task`, in order."""
        return tuple(self._seeds[task])

    def add(self, episode: EncodedDemonstration) -> None:
        """Add one episode; every tenth call publishes."""
        self._pending.append(episode)
        self._seeds[episode.task].append(episode.seed)
        if len(self._pending) >= SEGMENT_EPISODES:
            self.publish()

    def publish(self) -> None:
        """Make every added episode part of the data set at `root`. Raises OutputError on a full disk.

        After Ctrl-C in the middle, `__exit__` publishes again from the start, unless the exchange was already done.
        """
        if not self._pending:
            return
        self._restore_previous()
        if published_episodes(self.root) == self.episodes:
            self._published, self._pending = read_contents(self.root, self._layout), []
            return
        previous = self._work / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        with files.write_faults(self.root):
            with files.new_directory(self.root, older=previous) as folder:
                link_tree(self.root, folder)
                published = write_segment(folder, self._layout, self._published, self._pending)
                self._hashes |= hash_files(folder, known=self._hashes)
                files.write_json(folder / SETTINGS_FILE, self._settings | {"files": self._hashes})
            self._published, self._pending = published, []
            shutil.rmtree(previous, ignore_errors=True)

    def _release(self) -> None:
        self._restore_previous()
        shutil.rmtree(self._work, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def _restore_previous(self) -> None:
        """Rename `previous` back, where a process died between the two renames of a file system without exchange."""
        previous = self._work / "previous"
        if previous.exists() and not self.root.exists():
            previous.rename(self.root)

    def _read_published(self) -> None:
        self._hashes = refuse_damaged(self.root)
        try:
            self._published = read_contents(self.root, self._layout)
            task_of = {prompt: task for task, prompt in self._settings["prompts"].items()}
            for prompt, seed in self._published.seeds:
                self._seeds[task_of[prompt]].append(seed)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's and JSON's errors are of these
            raise DatasetError(damage(self.root, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")) from None
        if self.episodes != self._published.episodes:
            found = f"meta/info.json counts {self._published.episodes} episodes, its rows are of {self.episodes}"
            raise DatasetError(damage(self.root, found))
        for task, seeds in self._seeds.items():
            if len(seeds) > self._config.episodes:
                found = f"{self.root} already holds {len(seeds)} episodes of {task}, more than episodes={self._config.episodes}"
                raise OutputError(f"{found}; ask for more, or choose another --dataset.root")


def recording_settings(config: DemosConfig) -> dict[str, Any]:
    """Return the settings that must be equal for a recording to continue."""
    return {
        "prompts": {task: catalog.prompt_of(task) for task in config.task_names},
        "cameras": [str(camera) for camera in config.camera_specs],
        "noise": float(config.noise_level),
        "first_seed": config.first_seed,
        "max_steps": config.step_limit,
        "fps": config.control_rate,
    }


def refuse_foreign(root: Path, settings: dict[str, Any]) -> None:
    """Raise OutputError unless `root` is missing, empty, or a recording with these settings."""
    try:
        if not root.exists() or (root.is_dir() and not files.visible(root, "*")):
            return
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


def refuse_damaged(root: Path) -> dict[str, str]:
    """Return the SHA-256 of the published files by name. Raises DatasetError for a file that is missing or has another hash."""
    known: dict[str, str] = json.loads((root / SETTINGS_FILE).read_text()).get("files", {})
    for name, digest in known.items():
        if not (root / name).is_file():
            raise DatasetError(damage(root, f"{name} is missing"))
        if sha256(root / name) != digest:
            raise DatasetError(damage(root, f"{name} is not what was recorded"))
    return known


def damage(root: Path, found: str) -> str:
    """Format the error line of a damaged recording."""
    return f"a damaged recording cannot continue: in {root} {found}; restore it from a copy, or choose another --dataset.root"


def hash_files(root: Path, known: dict[str, str]) -> dict[str, str]:
    """Hash every file of HASHED that is not `known`."""
    found = (path for folder in HASHED for path in files.visible(root / folder) if path.is_file())
    return {name: sha256(path) for path in found if (name := path.relative_to(root).as_posix()) not in known}


def sha256(path: Path) -> str:
    """Hash a file with SHA-256; hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_mount_point(path: Path) -> bool:
    """Tell whether a file system is mounted at `path`, also by a bind mount."""
    if path.is_mount():
        return True
    table = Path("/proc/self/mountinfo")
    mounted = [line.split()[4] for line in table.read_text().splitlines()] if table.is_file() else []
    return str(path) in [name.encode().decode("unicode_escape") for name in mounted]  # a space is written \040


def layout_of(config: DemosConfig) -> Layout:
    """Return the parts of the data set that are fixed before the first episode."""
    cameras = {camera.name: (camera.height, camera.width) for camera in config.camera_specs}
    return Layout(config.control_rate, config.suite.robot_type, config.suite.state_names, config.suite.action_names, cameras)


def published_episodes(root: Path) -> int:
    """Count the episodes in a data set, 0 when there is none."""
    info = root / "meta/info.json"
    return int(json.loads(info.read_text())["total_episodes"]) if info.exists() else 0


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder, which may be missing, into an empty one, by hard links where the file system has them."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
            continue
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)
