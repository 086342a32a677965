"""Initial weights as a function of (seed, parameter name): the same on any device, for any sharding and order of construction.

Owns: the distributions, the numbers of one parameter or of a stretch of it, filling a network. Does not know: which parameter has which
distribution: each module defines it in `initial_values`.

    parameter, row by row   | block 0 | block 1 | ... | rest |          2^16 numbers per block
    block k                 Philox(key = hash(seed, name), counter = (0, 0, k, 0)) -> uniform numbers, or normal ones by ziggurat

A stretch costs its numbers and at most two blocks more, so a worker that holds some rows of a matrix draws only these. Columns of a matrix
are no stretch: they need all of its rows.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BLOCK = 1 << 16


class Initial(ABC):
    """The distribution of one parameter's numbers, all independent."""

    @abstractmethod
    def fill(self, generator: np.random.Generator, out: NDArray[np.float32]) -> None:
        """Fill `out` with numbers from the generator's start on."""


@final
@dataclass(frozen=True)
class NormalInit(Initial):
    """N(0, deviation^2)."""

    deviation: float

    def fill(self, generator: np.random.Generator, out: NDArray[np.float32]) -> None:
        """Draw by ziggurat, in float32."""
        generator.standard_normal(dtype=np.float32, out=out)
        out *= np.float32(self.deviation)


@final
@dataclass(frozen=True)
class UniformInit(Initial):
    """U(-bound, bound)."""

    bound: float

    def fill(self, generator: np.random.Generator, out: NDArray[np.float32]) -> None:
        """Draw from 2^24 equally spaced values."""
        generator.random(dtype=np.float32, out=out)
        out *= np.float32(2 * self.bound)
        out -= np.float32(self.bound)


@final
@dataclass(frozen=True)
class ConstantInit(Initial):
    """Constant value."""

    value: float

    def fill(self, generator: np.random.Generator, out: NDArray[np.float32]) -> None:
        """Set the value, without the generator."""
        out[:] = self.value


@runtime_checkable
class _HasInitialValues(Protocol):
    def initial_values(self) -> Mapping[str, Initial]:
        """Distributions of some parameters of a module, by their names in it."""


def linear(module: nn.Linear) -> dict[str, Initial]:
    """Distributions of torch's linear layer: both U(-1 / sqrt(fan in), 1 / sqrt(fan in))."""
    bound = UniformInit(module.in_features**-0.5)
    return {"weight": bound, "bias": bound}


def unit_variance(module: nn.Linear) -> dict[str, Initial]:
    """Distributions that keep the inputs' variance: weights N(0, 1 / fan in), biases 0."""
    return {"weight": NormalInit(module.in_features**-0.5), "bias": ConstantInit(0.0)}


def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model`."""
    found = distributions(model)
    for name, parameter in model.named_parameters():
        fill(parameter, found[name], seed, name)


def initialise_new(model: nn.Module) -> None:
    """Call `initialise` with a seed from torch's generator; do nothing for a network on meta, whose owner fills it."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        initialise(model, int(torch.randint(2**62, (), device="cpu")))


def distributions(model: nn.Module) -> dict[str, Initial]:
    """Distribution of every parameter, by name.

    An inner module's `initial_values` win over those of an outer one, and both over torch's defaults.
    """
    found: dict[str, Initial] = {}
    modules = dict(model.named_modules())  # outer modules first
    for values_of in (_of_torch, _of_module):
        for prefix, module in modules.items():
            found |= {f"{prefix}.{name}" if prefix else name: initial for name, initial in values_of(module).items()}
    return found


@torch.no_grad()
def fill(parameter: Tensor, initial: Initial, seed: int, name: str, start: int = 0) -> None:
    """Fill `parameter` with its numbers, made in float32 on the CPU, then cast and copied.

    start: for rows of a parameter, the position of their first number in it.
    """
    direct = parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous()
    flat = parameter.detach().reshape(-1) if direct else torch.empty(parameter.numel(), device="cpu")
    _write(initial, seed, name, start, flat.numpy())
    if not direct:
        parameter.copy_(flat.reshape(parameter.shape))


def stretch(initial: Initial, seed: int, name: str, start: int, stop: int) -> NDArray[np.float32]:
    """Draw numbers start .. stop - 1 of the parameter `name`, row by row."""
    out = np.empty(stop - start, np.float32)
    _write(initial, seed, name, start, out)
    return out


def _write(initial: Initial, seed: int, name: str, start: int, out: NDArray[np.float32]) -> None:
    key = np.frombuffer(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest(), np.uint64)

    def write(block: int) -> None:
        first = max(start, block * BLOCK)
        here = out[first - start : max(0, (block + 1) * BLOCK - start)]
        generator = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, block, 0], np.uint64)))
        if skipped := first - block * BLOCK:
            whole = np.empty(skipped + len(here), np.float32)
            initial.fill(generator, whole)
            here[:] = whole[skipped:]
        else:
            initial.fill(generator, here)

    blocks = range(start // BLOCK, -(-(start + len(out)) // BLOCK))
    if len(blocks) == 1:
        write(blocks[0])
        return
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="pi0fm-initial") as threads:  # numpy's generators leave the GIL
        for _ in threads.map(write, blocks):
            pass


def _of_torch(module: nn.Module) -> Mapping[str, Initial]:
    if isinstance(module, nn.LayerNorm):
        return {"weight": ConstantInit(1.0), "bias": ConstantInit(0.0)}
    return linear(module) if isinstance(module, nn.Linear) else {}


def _of_module(module: nn.Module) -> Mapping[str, Initial]:
    return module.initial_values() if isinstance(module, _HasInitialValues) else {}
