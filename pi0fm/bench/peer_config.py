"""What a comparison of speed with LeRobot's PI0 is asked to be.

Owns: the names of the cases, the options and their ranges, whose result file it is. Does not know: networks, clocks; it imports nothing
heavy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pi0fm.options import nearest, option
from pi0fm_client.errors import ConfigError, OutputError

PEER_CASES = ("tiny", "width_512", "width_512_one_camera_missing")
PI0_PROPORTIONS = "pi0_proportions"
DRAW_CASES = (*PEER_CASES, PI0_PROPORTIONS)
DEVICES = ("cpu", "cuda")
MODES = ("like_for_like", "as_shipped")
COMPILE = ("off", "kernels", "graph")  # policy.sampler.COMPILE, which imports torch


@dataclass(frozen=True)
class InferenceConfig:
    """Options of `pi0fm bench inference`. Raises ConfigError for a value out of range."""

    cases: tuple[str, ...] = option(PEER_CASES, f"which networks and inputs, of {', '.join(PEER_CASES)}")
    rounds: int = option(20, "pairs of calls, ours and LeRobot's, behind each ratio")
    threads: int = option(1, "torch's CPU threads, of both sides")
    device: str = option("cpu", "cpu or cuda, of both sides")
    compile: str = option("off", "what ours compiles, of off, kernels, graph (CUDA alone); as shipped it is off")
    seed: int = option(0, "of weights, inputs and noise")
    output_dir: Path | None = option(None, "folder of inference.json; nothing is written when not given")

    def __post_init__(self) -> None:
        check_words("cases", self.cases, PEER_CASES)
        check_words("compile", (self.compile,), COMPILE)
        if self.compile == "graph" and self.device != "cuda":
            raise ConfigError(f"compile graph records CUDA graphs, found device {self.device}; type --device cuda, or --compile kernels")
        check_words("device", (self.device,), DEVICES)
        check_least(self, {"rounds": 1, "threads": 1, "seed": 0})


@dataclass(frozen=True)
class TrainingBenchConfig:
    """Options of `pi0fm bench training`. Raises ConfigError for a value out of range."""

    cases: tuple[str, ...] = option(PEER_CASES[:2], f"which networks and batches, of {', '.join(PEER_CASES)}")
    flow_draws_cases: tuple[str, ...] = option((PI0_PROPORTIONS,), f"where 8 flow draws are held against 1, of {', '.join(DRAW_CASES)}")
    rounds: int = option(10, "pairs of steps, ours and LeRobot's, behind each ratio")
    threads: int = option(1, "torch's CPU threads, of both sides")
    device: str = option("cpu", "cpu or cuda, of both sides")
    seed: int = option(0, "of weights, batch and noise")
    output_dir: Path | None = option(None, "folder of training.json; nothing is written when not given")

    def __post_init__(self) -> None:
        check_words("cases", self.cases, PEER_CASES)
        check_words("flow_draws_cases", self.flow_draws_cases, DRAW_CASES)
        check_words("device", (self.device,), DEVICES)
        check_least(self, {"rounds": 1, "threads": 1, "seed": 0})


def check_words(name: str, words: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for none, a word twice, or one that is not known."""
    if not words or len(set(words)) != len(words):
        raise ConfigError(f"{name} must name one or more, each once, found {', '.join(words) or 'none'}; type --{name} {known[0]}")
    for word in words:
        if word not in known:
            raise ConfigError(f"unknown word in {name}, {word!r}: {nearest(word, known)}")


def check_least(config: object, least: dict[str, int]) -> None:
    """Raise ConfigError for a field below its least value."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value < smallest:
            raise ConfigError(f"{name} must be {smallest} or more, found {value}; type --{name} {smallest} or leave it out")


def result_file(output_dir: Path | None, name: str) -> Path | None:
    """Where the result goes. Raises OutputError for a folder that is a file, or that holds a result."""
    if output_dir is None:
        return None
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"output_dir must be a folder, found a file at {output_dir}; type --output_dir ANOTHER")
    written = output_dir / name
    if written.exists():
        raise OutputError(f"a result is never overwritten, and {written} is there; type --output_dir ANOTHER")
    return written
