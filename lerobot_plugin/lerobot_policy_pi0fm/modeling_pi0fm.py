"""The bundle's policy behind LeRobot's two calls, in robot units on both sides.

Owns: the passage between LeRobot's batches and observations, the queue of actions, the remainder that real-time chunking leads to.
Does not know: robots, environments.

    batch, float [B, 3, h, w] in [0, 1] --> Observation, uint8 [h, w, 3] --> LocalPolicy.infer_batch, its own chain --> [B, H, A]
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from numpy.typing import NDArray
from torch import Tensor

from lerobot_policy_pi0fm.configuration_pi0fm import TRAINED_ELSEWHERE, Pi0fmConfig
from pi0fm.policy.saved.bundle import load
from pi0fm_client.errors import ConfigError, ObservationError, Pi0fmError
from pi0fm_client.types import ActionPrefix, Observation


class Pi0fmPolicy(PreTrainedPolicy):
    """A loaded bundle. Raises what `pi0fm.policy.saved.bundle.load` raises."""

    config_class: ClassVar[type] = Pi0fmConfig
    name = "pi0fm"

    def __init__(self, config: Pi0fmConfig, **_: Any) -> None:
        super().__init__(config)
        words = {name: getattr(config, name) for name in ("robot", "num_flow_steps", "solver", "precision", "compile")}
        self.policy = load(Path(config.bundle), guidance=config.guidance, device=config.device, **words)
        self.model = self.policy.model
        self._queue: deque[Tensor] = deque()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: Any = None, *, config: Any = None, **_: Any) -> "Pi0fmPolicy":
        """Open the bundle that `config` names; a path has no meaning here."""
        if config is None:
            raise ConfigError("a bundle is named by --policy.type=pi0fm --policy.bundle=PATH, not by --policy.path")
        return cls(config).eval()

    def reset(self) -> None:
        """Forget the actions of the episode before."""
        self._queue.clear()

    def supports_rtc(self) -> bool:
        """Tell whether chunks can be led to what is left of the one before."""
        try:
            self.policy.refuse_prefixes()
        except Pi0fmError:
            return False
        return True

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return the next action of each environment, [B, A]; a new chunk every `n_action_steps`."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch).transpose(0, 1)[: self.config.n_action_steps])
        return self._queue.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Any], inference_delay: int = 0, prev_chunk_left_over: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Return chunks [B, H, A] in robot units, absolute.

        prev_chunk_left_over: [n, A] of the same, from the control step of this observation on; rows of zeros at its end are LeRobot's
        padding. inference_delay: of them, how many will be executed before this chunk is.
        """
        seen = self._observations(batch)
        given = self.config.noise_seed
        seeds = torch.randint(2**62, (len(seen),)).tolist() if given is None else [given] * len(seen)
        prefixes = None if prev_chunk_left_over is None else self._prefixes(prev_chunk_left_over, inference_delay, len(seen))
        chunks = self.policy.infer_batch(seen, seeds, prefixes=prefixes)
        return torch.from_numpy(np.stack([chunk.actions for chunk in chunks]))

    def forward(self, batch: dict[str, Any]) -> Any:
        """Raise ConfigError: LeRobot does not train it."""
        raise ConfigError(TRAINED_ELSEWHERE)

    def get_optim_params(self) -> dict[str, Any]:
        """Raise ConfigError: LeRobot does not train it."""
        raise ConfigError(TRAINED_ELSEWHERE)

    def _observations(self, batch: Mapping[str, Any]) -> list[Observation]:
        known = self.policy.metadata
        columns = [column for column in known["cameras"].values() if column in batch]
        if known["state_key"] not in batch:
            raise ObservationError(f"the bundle needs {known['state_key']!r}, found {sorted(batch)}: name yours by --policy.rename_map")
        states = batch[known["state_key"]].float().cpu().numpy()
        prompts = batch.get("task") or [""] * len(states)
        pictures = {column: _pictures(batch[column], column) for column in columns}
        return [
            self.policy.observation(
                {**{column: pictures[column][row] for column in columns}, known["state_key"]: states[row], "prompt": prompts[row]}
            )
            for row in range(len(states))
        ]

    def _prefixes(self, left_over: Tensor, inference_delay: int, count: int) -> list[ActionPrefix | None] | None:
        rows = left_over.float().cpu().numpy()
        filled = np.flatnonzero(np.any(rows != 0, axis=-1))
        if count != 1 or rows.ndim != 2 or not len(filled):
            return None
        rows = rows[: filled[-1] + 1]
        return [ActionPrefix(rows, min(inference_delay, len(rows)))]


def _pictures(batch: Tensor, column: str) -> NDArray[np.uint8]:
    """Return uint8 [B, h, w, 3] of float [B, 3, h, w] in [0, 1], which came from such."""
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
        raise ObservationError(f"{column} must be float [B, 3, height, width] in [0, 1], found {batch.dtype} {list(batch.shape)}")
    return (batch.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
