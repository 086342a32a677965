"""Options of data: which data set, how its pictures are kept, changed and loaded, and which data sets are mixed.

Owns: the dataclasses, their ranges, the refusal of a missing data set. Does not know: how a data set is read; neither torch nor
pyarrow is imported, so that a command line is parsed quickly.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pi0fm import files
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.order.orders import deal
from pi0fm.options import option
from pi0fm_client.errors import ConfigError, DatasetError

LIKE_A_PATH = 0.75  # likeness of OWNER/NAME to an existing path at which it was meant as that path
Extent = Literal["none", "ends", "all"]  # of the pictures that are looked at
Decoder = Literal["auto", "pyav", "torchcodec"]


@dataclass(frozen=True)
class DatasetConfig:
    """Data set and how its pictures are kept; `repo_id` and `root` as in LeRobot."""

    repo_id: str = option("", "name of the data set, such as lerobot/pusht; found under $HF_LEROBOT_HOME, else downloaded")
    root: Path | None = option(None, "directory of the data set, when it is elsewhere")
    episodes: tuple[int, ...] = option((), "only these episodes, such as 0-49,60; empty takes all")
    skip_bad: Literal["all"] | bool = option(
        False,
        "leave out the episodes that pi0fm doctor names; all: those that doctor --pictures all names; run and bundle keep the list",
    )
    any_video_order: bool = option(False, "accept videos in another order than their episodes")
    tolerance_s: float | None = option(
        None, "seconds allowed between a row and its picture; empty takes the longer of the rows' and the video's period"
    )
    video_decoder: Decoder = option("auto", "pyav, torchcodec, or auto: torchcodec when it loads")
    cache_dir: Path | None = option(None, "where decoded frames are kept; default ~/.cache/pi0fm/frames")
    cache_limit_gib: float = option(64.0, "GiB of decoded frames above which a data set is streamed from its videos instead")
    cache_format: Literal["uint8", "jpeg"] = option("uint8", "decoded frames uncompressed or as JPEG: a tenth of the space, slower to read")
    stream_buffer_gib: float = option(4.0, "GiB of memory for the shuffle buffer of a streamed data set")

    def __post_init__(self) -> None:
        if self.video_decoder not in ("auto", "pyav", "torchcodec"):
            raise ConfigError(f"dataset.video_decoder must be auto, pyav or torchcodec, found {self.video_decoder!r}")
        if self.tolerance_s is not None and not self.tolerance_s >= 0:
            raise ConfigError(f"dataset.tolerance_s must be >= 0, found {self.tolerance_s}; leave it out for the default")
        if self.cache_limit_gib <= 0:
            raise ConfigError(f"dataset.cache_limit_gib must be > 0, found {self.cache_limit_gib}")
        if self.cache_format not in ("uint8", "jpeg"):
            raise ConfigError(f"dataset.cache_format must be uint8 or jpeg, found {self.cache_format!r}")
        if self.stream_buffer_gib <= 0:
            raise ConfigError(f"dataset.stream_buffer_gib must be > 0, found {self.stream_buffer_gib}")


def refuse_missing(config: DatasetConfig) -> None:
    """Raise ConfigError where no data set is named, DatasetError for a directory that holds none, or a name that is a path.

    Nothing is opened, and the network is not asked.
    """
    if config.root is None and not config.repo_id:
        raise ConfigError("which data set? give --dataset.repo_id NAME, or --dataset.root DIRECTORY")
    if config.root is not None and not (config.root / "meta" / "info.json").is_file():
        if not config.root.exists():
            raise DatasetError(f"dataset.root must be the folder of a LeRobot data set, but {files.missing(config.root)}")
        run = f"it is a run, whose policy is {config.root / 'bundle'}" if (config.root / "run.json").is_file() else "correct the path"
        raise DatasetError(
            f"dataset.root must be a LeRobot data set, but {config.root} has no meta/info.json; {run}, or record one with pi0fm demos"
        )
    if config.root is None and not (hub_home() / config.repo_id / "meta" / "info.json").is_file():
        _refuse_path(config.repo_id)


def hub_home() -> Path:
    """Return the folder in which LeRobot keeps data sets by their names: $HF_LEROBOT_HOME, else below $HF_HOME."""
    return Path(os.environ.get("HF_LEROBOT_HOME", Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "lerobot")).expanduser()


def _refuse_path(name: str) -> None:
    """Raise DatasetError for a name that was meant as a path: of another form than OWNER/NAME, or near a path that exists."""
    path = Path(name).expanduser()
    near = files.nearest_path(path, LIKE_A_PATH)
    if (path / "meta" / "info.json").is_file():
        raise DatasetError(f"dataset.repo_id is a name, OWNER/NAME, found the path of a data set, {name}; type --dataset.root {name}")
    if not files.is_hub_name(name):
        raise DatasetError(f"dataset.repo_id is a name, OWNER/NAME, found {name!r}; for a folder type --dataset.root {near or 'FOLDER'}")
    if near is not None and not path.exists():
        raise DatasetError(
            f"no data set {name} is in {hub_home()}, nor a folder of that path, but {near} exists; type --dataset.root {near}, or ask "
            "the hub for that name from another folder"
        )


@dataclass(frozen=True)
class Selection:
    """Selection of episodes. episodes: empty for all; exclude: left out; tasks: sentences, empty for all; min_frames: per episode."""

    episodes: tuple[int, ...] = ()
    exclude: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    min_frames: int = 1


@dataclass(frozen=True)
class LoaderConfig:
    """Preparation of batches; it changes speed and memory, never a number in a batch."""

    threads: int = option(1, "threads that prepare batches, in addition to the training thread")
    ahead: int = option(2, "finished batches that are kept ready")

    def __post_init__(self) -> None:
        for name in ("threads", "ahead"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loader.{name} must be >= 1, found {getattr(self, name)}; leave it out for the default")


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of random changes of a picture; the neutral values (1, 0, 0, 0, 0) change nothing."""

    crop: float = option(0.95, "side of the random crop, as a share of the picture's; 1 for none")
    rotation: float = option(5.0, "largest rotation, in degrees in either direction")
    brightness: float = option(0.3, "largest relative change of brightness")
    contrast: float = option(0.4, "largest relative change of contrast")
    saturation: float = option(0.5, "largest relative change of saturation")
    wrist_cameras: tuple[str, ...] = option((), "cameras that are only recoloured; empty takes those with 'wrist' in their name")

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ConfigError(f"augmentation.crop must lie in (0, 1], found {self.crop}; type --augmentation.crop 0.95")
        if not 0 <= self.rotation <= 180:
            raise ConfigError(f"augmentation.rotation must lie in 0..180 degrees, found {self.rotation}; type --augmentation.rotation 5")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augmentation.{name} must lie in 0..1, found {getattr(self, name)}; type --augmentation.{name} 0.3")


@dataclass(frozen=True)
class MixtureEntry:
    """One data set of a mixture; `embodiment.cameras` maps the network's cameras to its columns."""

    dataset: DatasetConfig = option(DatasetConfig, "")
    embodiment: Embodiment = option(Embodiment, "")
    weight: float = option(1.0, "weight of its samples, relative to the other entries'")
    exclude_episodes: tuple[int, ...] = option((), "episodes that are left out")
    tasks: tuple[str, ...] = option((), "train on episodes of these instructions only; empty takes all")
    min_frames: int = option(1, "leave out episodes that are shorter")
    task_weights: dict[str, float] = option(dict, "instruction -> weight of its samples, relative to others of this data set; default 1")
    weight_column: str | None = option(None, "column of the data set with the weight of each frame")
    camera_sources: dict[str, str] = option(dict, "camera -> SOURCE:WIDTHxHEIGHT in a simulator, kept in the bundle for this robot")

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"a mixture's weight must be > 0, found {self.weight}; leave the data set out instead of giving it 0")
        if self.min_frames < 1:
            raise ConfigError(f"min_frames must be >= 1, found {self.min_frames}; leave it out for all episodes")

    def selection(self) -> Selection:
        """Selection of the data set's episodes."""
        return Selection(self.dataset.episodes, self.exclude_episodes, self.tasks, self.min_frames)


def refuse_entries(mixture: Mapping[str, MixtureEntry]) -> None:
    """Raise ConfigError for names that cannot be typed, an entry without a data set, or weights too far apart; nothing is opened."""
    for name, entry in mixture.items():
        if not re.fullmatch(r"\w+", name, re.ASCII):
            raise ConfigError(f"a mixture's names are letters, digits and _, found {name!r}; it is typed in options and after --robot")
        if not entry.dataset.repo_id and entry.dataset.root is None:
            raise ConfigError(
                f"mixture.{name} must name a data set, found none; type --mixture.{name}.dataset.repo_id NAME, or .root DIRECTORY"
            )
    if mixture:
        deal([entry.weight for entry in mixture.values()], np.zeros(1, dtype=np.int64))
