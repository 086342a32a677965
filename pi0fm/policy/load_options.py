"""How a bundle is opened: the options that load, serve, eval and the measurements share.

Owns: `LoadOptions`. Does not know: the bundle; torch is not imported, so that a command line may read it.
"""

import re
from dataclasses import dataclass

from pi0fm.flow.config import SOLVERS, STOCHASTIC_SOLVERS
from pi0fm.options import option, refuse_below, refuse_words
from pi0fm_client.errors import ConfigError

TOKEN_VARIABLE = "PI0FM_TOKEN"  # noqa: S105 - the name, not the key: of a server, and of a command that asks one
PRECISIONS = ("auto", "float32", "bfloat16")
COMPILE = ("off", "kernels", "graph")
GUIDED, WITHOUT_JACOBIAN, HARD_PREFIX = "guided", "guided_no_jacobian", "hard_prefix"
GUIDANCE = (GUIDED, WITHOUT_JACOBIAN, HARD_PREFIX)  # how a chunk continues the previous one: policy/sampling/realtime.py


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Values that replace the bundle's, and where and how it computes. Raises ConfigError for a number out of range."""

    robot: str | None = option(None, "of a mixture's bundle, the robot to serve; its first when not given")
    num_flow_steps: int | None = option(None, "solver steps from noise to actions; the bundle's own when not given")
    solver: str | None = option(None, "euler, midpoint, heun, rk4, dopri5, euler_maruyama, ancestral; the bundle's own when not given")
    noise_level: float | None = option(
        None, "euler_maruyama's noise as a multiple of g, 1 the reverse diffusion; the bundle's own when not given"
    )
    device: str | None = option(None, "cpu, cuda or cuda:N; the best one that works when not given")
    precision: str = option("auto", "auto, float32 or bfloat16, of the towers' matrices")
    threads: int | None = option(None, "CPU threads of one inference, a setting of the whole process; torch's choice when not given")
    compile: str = option("off", "off; kernels: torch.compile, a minute before it is ready; graph: the same and CUDA graphs, on a GPU")

    def __post_init__(self) -> None:
        refuse_below(self, num_flow_steps=1, threads=1, noise_level=0)
        refuse_words(self, solver=(None, *SOLVERS, *STOCHASTIC_SOLVERS), precision=PRECISIONS, compile=COMPILE)
        refuse_device(self.device)


def refuse_device(name: str | None) -> None:
    """Raise ConfigError for a text of another form than a device's."""
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, found {name!r}; leave it out for the best one that works")
