"""The options of a conversion.

Owns: `ConvertConfig`. Does not know: any format. torch is not imported, so that a command line is read quickly.
"""

from dataclasses import dataclass
from pathlib import Path

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.prompt import DIALECTS
from pi0fm.options import option, refuse_below, required
from pi0fm_client.errors import ConfigError

TARGETS = ("bundle", "lerobot", "openpi")
DTYPES = ("stored", "float32", "bfloat16")


@dataclass(frozen=True)
class ConvertConfig:
    """Source and output of a conversion, and the facts that a foreign checkpoint lacks.

    Tensor shapes give every width, both depths, vocabulary, patch and picture size. They do not give the numbers of heads of a PyTorch
    checkpoint (num_heads, vision_heads), nor any fact about the robot.
    """

    source: Path = required("directory of a bundle, of LeRobot's PI0 or PI05, or of openpi's weights (PyTorch, or JAX with params/)")
    output_dir: Path = required("directory to write; it must not exist")
    to: str = option("bundle", "bundle, or from a bundle: lerobot, openpi (PyTorch)")
    dtype: str = option("stored", "type of the weights: stored (keeps float32 and bfloat16), float32 or bfloat16")
    embodiment: Embodiment = option(Embodiment, "")
    norm_stats: Path | None = option(None, "statistics where the source has none: norm_stats.json, or a data set's meta/stats.json")
    normalization: str | None = option(None, "z_score or quantile; empty takes the source's, else z_score for pi0, quantile for pi0.5")
    norm_floor: float | None = option(None, "least scale of a dimension; empty sets no floor, as in the source")
    tokenizer: str | None = option(None, "directory of the tokenizer, PaliGemma's for released weights; or byt5")
    tokenizer_name: str | None = option(None, "--to lerobot: where LeRobot finds the tokenizer; empty: Hugging Face's name of PaliGemma's")
    prompt_dialect: str | None = option(
        None, "prompt format of the training: openpi, lerobot, openpi_stateless; --to: of the prompts to come; empty takes the source's"
    )
    robot: str | None = option(None, "--to lerobot or openpi, for a bundle of several robots: the one to export")
    num_heads: int = option(8, "query heads of the decoder; LeRobot and openpi have only 8")
    vision_heads: int = option(16, "heads of the vision tower; LeRobot and openpi have only 16")
    action_horizon: int | None = option(None, "actions predicted at once; empty takes the source's, else 50")
    execution_horizon: int | None = option(None, "actions executed before planning again; empty takes the source's, else 8")
    max_prompt_tokens: int | None = option(None, "longest prompt; empty takes the source's, else 48 for pi0, 200 for pi0.5")
    num_flow_steps: int | None = option(None, "steps of the sampling; empty takes the source's, else 10")
    fps: float = option(0.0, "control steps per second, kept in the bundle; 0 when unknown")
    any_size: bool = option(False, "--to lerobot or openpi: also write sizes that their classes cannot load")

    def __post_init__(self) -> None:
        for name, known in (
            ("to", TARGETS),
            ("dtype", DTYPES),
            ("normalization", (None, "z_score", "quantile")),
            ("prompt_dialect", (None, *DIALECTS)),
        ):
            if getattr(self, name) not in known:
                listed = ", ".join(str(word) for word in known if word)
                raise ConfigError(f"{name} must be one of {listed}, found {getattr(self, name)!r}; type --{name} {known[-1]}")
        for name in ("num_heads", "vision_heads", "action_horizon", "execution_horizon", "max_prompt_tokens", "num_flow_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}; leave it out to take the source's")
        refuse_below(self, fps=0)
        if self.norm_floor is not None and not self.norm_floor > 0:
            raise ConfigError(f"norm_floor must be above 0, found {self.norm_floor}; leave it out to take the source's")
