"""Demonstration by a scripted expert with noise on the executed actions.

Owns: `Demonstration`, the noise, the clean-action rule. Does not know: the simulator, the storage of episodes, Ray.
Shape letters: T steps, A action dim, S state dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi0fm.sim.environment import Environment


@dataclass(frozen=True)
class Demonstration[Film]:
    """Successful demonstration; row t holds the observation before step t and the expert's action for it.

    images: by camera name, uint8 [T, height, width, 3] as recorded, a `Video` once encoded. state: float32 [T, S].
    action: float32 [T, A], without noise.
    """

    task: str
    prompt: str
    seed: int
    images: Mapping[str, Film]
    state: NDArray[np.float32]
    action: NDArray[np.float32]


def record_demonstration(environment: Environment, seed: int, noise: float) -> Demonstration[NDArray[np.uint8]] | None:
    """Run the expert from the start of `seed`; return None when it does not succeed within `max_steps`.

        observe ── expert ── clean action ──┬── stored
                                            └── + noise * N(0, 1), clipped to [-1, 1] ── executed
    The noise drives the arm off the expert's path, and the stored actions lead back. It is a function of (seed, step) alone.
    """
    environment.reset(seed)
    observations, actions = [], []
    for step in range(environment.max_steps):
        observations.append(environment.observe())
        clean = environment.expert_action()
        actions.append(clean)
        result = environment.step(np.clip(clean + noise * noise_at(seed, step, environment.action_dim), -1.0, 1.0).astype(np.float32))
        if result.success:
            images = {camera.name: np.stack([seen.images[camera.name] for seen in observations]) for camera in environment.cameras}
            state = np.stack([seen.state for seen in observations])
            return Demonstration(environment.task, environment.prompt, seed, images, state, np.stack(actions))
        if result.done:
            break
    return None


def noise_at(seed: int, step: int, size: int) -> NDArray[np.float32]:
    """Draw standard normal float32 [size], the same for the same (seed, step) on every machine and in any order (Philox with a key)."""
    return np.random.Generator(np.random.Philox(key=[seed, step])).standard_normal(size, dtype=np.float32)
