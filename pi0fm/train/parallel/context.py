"""One worker's rank and world size, as its launcher sets them.

Owns: `Context`, the variables of torchrun and Ray Train. Does not know: torch, process groups, what is trained.
"""

import os
import socket
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Context:
    """Rank and world size. `shown`: this process draws the progress bar (a Ray worker's terminal belongs to the driver).

    node: host name for lines about this worker; a machine may hold several workers.
    """

    rank: int = 0
    world_size: int = 1
    shown: bool = True
    node: str = field(default_factory=socket.gethostname, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this worker writes the files that only one worker may write."""
        return self.rank == 0


def context_from_environment(shown: bool = True) -> Context:
    """Read RANK and WORLD_SIZE as torchrun and Ray Train set them; one worker when they are not set."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Context(rank, world_size, shown and rank == 0)


def restarts() -> int:
    """Return how often torchrun has restarted this node's workers; 0 under any other launcher."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
