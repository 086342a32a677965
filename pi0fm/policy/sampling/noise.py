"""The random numbers of a policy call: each chunk's are a function of its own noise seed.

Owns: the use of each random number, so that a served, batched or local call gives the same chunk. Does not know: the network.

    counter of data.sampler.draw     0                1                             2
    numbers of one seed              starting noise   increments of the steps,      signs of the probes,
                                     [H, A]           a stochastic solver only      Hutchinson's estimate only

Shape letters: B batch, H action horizon, A action dim, K steps, n probes.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm.data.order.counter import draw

START, INCREMENTS, PROBES = 0, 1, 2
Shape = tuple[int, int]


def candidate_seeds(seed: int, num_chunks: int) -> list[int]:
    """A seed for each of several chunks of one observation: the observation's own, then numbers made of it."""
    each = (hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in range(1, num_chunks))
    return [seed, *(int.from_bytes(digest, "little") >> 1 for digest in each)]


def starting_noise(seeds: Sequence[int], shape: Shape) -> Float[Tensor, "B H A"]:
    """N(0, I) for each seed; shape is [H, A]."""
    return torch.from_numpy(np.stack([draw(seed, 0, 0, START, shape)[0] for seed in seeds]))


def increments(seeds: Sequence[int], num_steps: int, shape: Shape) -> Float[Tensor, "K B H A"] | None:
    """N(0, I) for each step and seed; None for no step."""
    return _stacked(seeds, num_steps, shape, INCREMENTS) if num_steps else None


def probes(seeds: Sequence[int], num_probes: int, shape: Shape) -> Float[Tensor, "n B H A"] | None:
    """Rademacher probes, +1 or -1, for each seed; None for no probe, which means the exact divergence."""
    if not num_probes:
        return None
    normal = _stacked(seeds, num_probes, shape, PROBES)
    return torch.where(normal >= 0, 1.0, -1.0)


def _stacked(seeds: Sequence[int], count: int, shape: Shape, number: int) -> Tensor:
    horizon, width = shape
    each = [draw(seed, 0, 0, number, (count * horizon, width))[0].reshape(count, horizon, width) for seed in seeds]
    return torch.from_numpy(np.stack(each, axis=1))
