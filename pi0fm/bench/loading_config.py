"""The options of `pi0fm bench loading`, and the loader that it measures.

Owns: `LoadingConfig`, a collator at pi0's widths. Does not know: what either is held against.
"""

from dataclasses import dataclass
from pathlib import Path

from pi0fm.data.chain import make_chain
from pi0fm.data.columns.lerobot_source import LeRobotSource
from pi0fm.data.loading.loader import Collator, LoaderConfig, micro_batches
from pi0fm.data.pictures.source import Pictures
from pi0fm.data.prompt import BYTES, PromptTokenizer, load_tokenizer
from pi0fm.options import option
from pi0fm_client.errors import ConfigError

NETWORK_WIDTH, PROMPT_TOKENS = 32, 64  # pi0's widths of state and action


@dataclass(frozen=True)
class LoadingConfig:
    """Options of `pi0fm bench loading`."""

    root: Path | None = option(None, "folder of a LeRobot data set with videos; one is drawn and written when not given")
    frames: int = option(16000, "frames of the data set that is written")
    size: int = option(128, "side of the pictures, of the data set that is written and of those that are loaded")
    action_horizon: int = option(50, "actions of a sample")
    batch_size: int = option(32, "samples of a batch, on both sides")
    rounds: int = option(3, "times that both sides of a comparison run")
    processes: int = option(0, "worker processes of our loader; 0 prepares in a thread")
    lerobot_batches: int = option(2, "batches of LeRobot's loader in a round; at least one a worker is taken")
    lerobot_workers: int = option(0, "processes of LeRobot's DataLoader; 0, its cheapest, loads in the calling process")
    memory_batches: int = option(2000, "batches over which memory is watched; 100000 take some five minutes")

    def __post_init__(self) -> None:
        least = {"frames": 1400, "size": 16, "action_horizon": 1, "batch_size": 1, "rounds": 1, "lerobot_batches": 1, "memory_batches": 10}
        for name, low in (least | {"lerobot_workers": 0, "processes": 0}).items():
            if getattr(self, name) < low:
                raise ConfigError(f"--{name} must be {low} or more, found {getattr(self, name)}; leave it out for the default")
        if self.size % 2:
            raise ConfigError(f"--size must be even, since video is, found {self.size}; try {self.size + 1}")

    @property
    def loader(self) -> LoaderConfig:
        """Of our side."""
        return LoaderConfig(processes=self.processes)


def make_collator(source: LeRobotSource, pictures: Pictures, config: LoadingConfig) -> Collator:
    """Our batches at pi0's widths: normalised, padded, tokenised, with noise and flow times."""
    chain = make_chain(
        source.embodiment,
        source.norm_stats(config.action_horizon),
        PromptTokenizer(load_tokenizer(BYTES, 384), PROMPT_TOKENS),
        normalization="z_score",
        floor=1e-3,
        image_size=config.size,
        padded_state_dim=max(NETWORK_WIDTH, source.embodiment.dims()[0]),
        padded_action_dim=max(NETWORK_WIDTH, source.embodiment.dims()[1]),
    )
    return Collator(source, pictures, chain, config.action_horizon, max(NETWORK_WIDTH, source.embodiment.dims()[1]), seed=0)


def take(collator: Collator, first: int, stop: int, batch_size: int, loader: LoaderConfig) -> None:
    """Make the batches of some steps, as training's loader does, to the last."""
    for batch in micro_batches(collator, first, stop, batch_size, 0, 1, batch_size, loader):
        assert len(batch.actions) == batch_size
