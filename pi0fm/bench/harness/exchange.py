"""Time of the workers' exchange in a step, without computation: a network of the same units whose passes read each weight once.

Owns: `WeightSumNetwork`, the seconds of its passes. Does not know: rates, plans.

    DDP         buckets filled, summed over the workers, read
    sharded     a unit's rows copied in, gathered, copied out into weights; its gradient copied in, scattered, added
    alone       the same passes without exchange, whose time is subtracted

So copies, hooks, and the time in which one worker waits for another at each unit count as in a step of the real network.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor, distributed, nn

from pi0fm.models.pi0 import Pi0
from pi0fm.train.components import FULL, GRADIENTS, NONE, ParallelConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.sharding import REST, shard, unit_of


@final
class WeightSum(nn.Module):
    """Module with weights of given shapes that returns their sum."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scalar x + the sum of all weights."""
        for weight in self.weights:
            x = x + weight.sum()
        return x


@final
class WeightSumNetwork(nn.Module):
    """Units of `network` with `times` as many rows in each weight, called in the network's order."""

    def __init__(self, network: nn.Module, times: float) -> None:
        super().__init__()
        shapes: dict[str, list[torch.Size]] = defaultdict(list)
        for name, parameter in network.named_parameters():
            rows, *others = parameter.shape or (1,)
            shapes[unit_of(name)].append(torch.Size((max(1, round(times * rows)), *others)))
        self.rest, self.prompt_embedding = WeightSum(shapes.pop(REST)), WeightSum(shapes.pop("prompt_embedding"))
        self.vision, self.decoder = nn.Module(), nn.Module()
        self.vision.layers, self.decoder.layers = (
            nn.ModuleList(WeightSum(each) for name, each in shapes.items() if name.startswith(tower)) for tower in ("vision", "decoder")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the scalar x + the sum of all weights."""
        for unit in (*cast(nn.ModuleList, self.vision.layers), self.prompt_embedding, *cast(nn.ModuleList, self.decoder.layers), self.rest):
            x = unit(x)
        return x

    def bytes(self) -> int:
        """Bytes of its weights."""
        return sum(weight.nbytes for weight in self.parameters())


def exchange_seconds(network: nn.Module, parallel: Parallel, times: float, steps: int) -> dict[str, float]:
    """Seconds that the exchange adds to a pass over `times` as many weights as `network`'s, by sharding; and their `bytes`."""
    alone = WeightSumNetwork(network, times)
    calls: dict[str, nn.Module] = {"alone": alone}
    for word in (NONE, GRADIENTS, FULL):
        still, how = WeightSumNetwork(network, times), ParallelConfig(word)
        if how.cuts:
            units: Any = still
            shard(cast(Pi0, units), parallel.mesh(how), how, torch.float32)
            calls[word] = still
        else:
            calls[word] = nn.parallel.DistributedDataParallel(still, broadcast_buffers=False, gradient_as_bucket_view=True)
    found = {word: _seconds(partial(_pass, call), steps) for word, call in calls.items()}
    without = found.pop("alone")
    return {word: max(0.0, seconds - without) for word, seconds in found.items()} | {"bytes": float(alone.bytes())}


def _pass(network: nn.Module) -> None:
    network(torch.zeros((), requires_grad=True)).backward()
    network.zero_grad(set_to_none=True)


def _seconds(call: Callable[[], None], steps: int) -> float:
    call()
    distributed.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        call()
    return (time.perf_counter() - began) / steps
