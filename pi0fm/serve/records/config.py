"""Options of `pi0fm replay`.

Owns: `ReplayConfig` and its ranges. Does not know: how a log is inferred again; torch is not imported, so that a command line may read it.
"""

from dataclasses import dataclass
from pathlib import Path

from pi0fm.options import option, refuse_below, required
from pi0fm.policy.load_options import refuse_device


@dataclass(frozen=True)
class ReplayConfig:
    """Options of `pi0fm replay`; the log's values stand for those that are not given. Raises ConfigError for a value out of range."""

    log: Path = required("folder that pi0fm serve --log_requests wrote")
    bundle: Path | None = option(None, "bundle that answers; the log's own when not given")
    other: Path | None = option(None, "a second bundle, compared with the first on the same requests")
    most: int | None = option(None, "batches to infer, the oldest first; all when not given")
    device: str | None = option(None, "cpu, cuda or cuda:N; the log's when not given")
    threads: int | None = option(None, "CPU threads of one inference; the log's when not given")

    def __post_init__(self) -> None:
        refuse_below(self, most=1, threads=1)
        refuse_device(self.device)
