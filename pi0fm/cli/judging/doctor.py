"""`pi0fm doctor DATASET | CONFIG.yaml ... | BUNDLE | ws://SERVER`: find faults before anything is trained, served or run on a robot.

Owns: the options. Does not know: what is checked and printed (cli/judging/diagnosis).

    DATASET [CONFIG ...]   its faults; with a configuration also a batch as that run's network would see it
    CONFIG                 the same for the data set, or each of the mixture, that it names
    BUNDLE, ws://SERVER    that policy, against --dataset.root, --suite, --server
"""

from dataclasses import dataclass
from pathlib import Path

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import DatasetConfig, Extent, MixtureEntry
from pi0fm.options import option, refuse_below, required
from pi0fm.sim import catalog
from pi0fm_client.errors import ConfigError

HELP = "check a data set, a configuration, a bundle or a server: every fault with what to type, and a batch as the network sees it"
POSITIONAL = "data"
OTHERS = "config"


@dataclass(frozen=True)
class DoctorOptions:
    """Options of `pi0fm doctor`: a data set and the run to train on it, or a policy."""

    data: str = required(
        "folder of the data set, or its name as in --dataset.repo_id; the first configuration file of a run that names its data set; a "
        "bundle; or the ws:// address of a server"
    )
    config: tuple[str, ...] = option((), "configuration files of the run, as for pi0fm train: prompts are checked against its network")
    pictures: Extent = option("ends", "ends reads the first and last picture of every file, all reads every picture, none only columns")
    dataset: DatasetConfig = option(DatasetConfig, "")
    embodiment: Embodiment = option(Embodiment, "")
    mixture: dict[str, MixtureEntry] = option(dict, "options of a mixture's entries, as in pi0fm train")
    suite: str | None = option(None, f"simulator in which the policy will be evaluated, NAME or {catalog.TASK_FORM}")
    server: str | None = option(None, "ws:// address of a server that should serve this policy")
    max_steps: int | None = option(None, "step limit that pi0fm eval will be given; the task's when not given")
    robot: str | None = option(None, "robot of a mixture's bundle to check; the first when not given")
    load: bool = option(True, "run inference with a bundle, to check its answers, speed and memory")
    output_dir: Path = option(
        Path("outputs/doctor"), "folder for contact.png, pictures of the data set, and for sheet.png, pictures as the policy sees them"
    )

    def __post_init__(self) -> None:
        refuse_below(self, max_steps=1)
        if self.server is not None and not self.server.startswith(("ws://", "wss://")):
            raise ConfigError(f"server must be a ws:// address, found {self.server!r}; type --server ws://HOST:8000")
        if self.pictures not in ("none", "ends", "all"):
            raise ConfigError(f"pictures must be none, ends or all, found {self.pictures!r}")


Options = DoctorOptions


ALIASES: dict[str, str] = {}
OFTEN = frozenset(
    ("data", "config", "pictures", "suite", "server", "robot", "load", "output_dir", "dataset.root", "dataset.episodes", "dataset.skip_bad")
)


def run(given: DoctorOptions) -> None:
    """Judge, print tables and a last line of JSON. Raises DatasetError or BundleError, and so exit code 1, where there is an error."""
    from pi0fm.cli.judging.diagnosis import diagnose  # torch: seconds, which --help need not wait for

    diagnose(given)
