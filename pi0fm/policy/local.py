"""A policy in this process: chain + network + flow -> ActionChunk.

Owns: one batched inference. Does not know: files, sockets, simulators.

    observations -> chain -> encode_prefix once -> num_flow_steps velocities against the cache -> inverse chain -> chunks
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pi0fm.data.sampler import draw
from pi0fm.data.transforms import Chain, Sample
from pi0fm.errors import ObservationError
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0
from pi0fm.types import ActionChunk, Observation


@final
class LocalPolicy:
    """A loaded policy. Not thread-safe: a server calls it from one thread."""

    def __init__(
        self, model: Pi0, flow: FlowMatching, chain: Chain, metadata: Mapping[str, Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.flow, self.chain, self.metadata = model.to(device).eval().requires_grad_(False), flow, chain, metadata
        self.device, self.dtype = device, dtype
        if dtype != torch.float32:
            halve_matrices(self.model, dtype)
        horizon, width = model.config.action_horizon, model.config.action_dim
        self._shape = (horizon, width)
        self._real = torch.arange(width, device=device).expand(horizon, width) < chain.embodiment.dims()[1]

    def observation(self, flat: Mapping[str, Any]) -> Observation:
        """The observation in a flat map of keys; see `Embodiment.observation` for the keys and the errors."""
        return self.chain.embodiment.observation(flat)

    def infer(self, observation: Observation | Mapping[str, Any], noise_seed: int | None = None) -> ActionChunk:
        """One chunk, from an `Observation` or a flat map of keys."""
        given = observation if isinstance(observation, Observation) else self.observation(observation)
        return self.infer_batch([given], None if noise_seed is None else [noise_seed])[0]

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        """One chunk for each observation: actions float32 [H, robot_action_dim] in robot units, `infer_ms` of the whole batch.

        noise_seeds: the starting noise of each chunk is a function of its seed alone. Raises ObservationError for a wrong observation.
        """
        if not observations:
            return []
        began = time.perf_counter()
        seeds = [secrets.randbits(63) for _ in observations] if noise_seeds is None else list(noise_seeds)
        if len(seeds) != len(observations):
            raise ObservationError(f"one noise seed for each observation: expected {len(observations)}, found {len(seeds)}")
        inputs = self.chain.observe(observations).to(self.device)
        noise = torch.from_numpy(np.stack([draw(seed, 0, 0, 0, self._shape)[0] for seed in seeds])).to(self.device)
        mask = self._real.expand(len(observations), -1, -1)
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            cache = self.model.encode_prefix(inputs)
            sampled = self.flow.sample(lambda x, t: self.model.velocity(cache, inputs.state, x, t), noise, mask=mask)
        actions = self._to_robot(inputs.state.cpu().numpy(), sampled.float().cpu().numpy())
        timings = {"infer_ms": 1e3 * (time.perf_counter() - began)}
        return [ActionChunk(chunk, timings) for chunk in actions]

    def _to_robot(self, state: NDArray[np.float32], actions: NDArray[np.float32]) -> NDArray[np.float32]:
        robot = self.chain.inverse(Sample(state, actions)).actions
        assert robot is not None
        return robot.astype(np.float32, copy=False)


def halve_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the towers' matrices in the type that they are multiplied in, so that no call casts them again.

    Norms, embeddings and the action head stay float32.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(("vision.", "decoder.layers.")) and "modulation" not in name:
            module.to(dtype)
