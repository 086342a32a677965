"""A whole chunk as one CUDA graph: recorded once for each shape of its inputs, then replayed without Python between its kernels.

Owns: the buffers that a graph reads, which graphs are kept. Does not know: the computation.

    first call of a shape    inputs -> buffers -> warm-up calls on a side stream -> record -> replay
    later calls              inputs -> page-locked host memory -> buffers, without waiting -> replay -> the output, to the host
                             one place of memory for all graphs: they never run at the same time

A shape is that of every input, and the words that choose what is recorded. policy/sampling/buckets.py makes shapes few.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields
from typing import final

import torch
from torch import Tensor

from pi0fm.models.observation import ModelObservation

KEPT = 64
_WARM_UP = 3

Answer = tuple[Tensor, ...]
Call = Callable[..., Answer]
"""(observation, *words, *tensors) -> tensors."""
Record = Callable[[Callable[[], Answer]], Callable[[], Answer]]
"""From a call on fixed buffers to one that repeats it."""


@final
class Graphs:
    """`call` by replay. At most KEPT shapes are kept, the least recently used leaves. record: other than by CUDA, for tests."""

    def __init__(self, call: Call, device: torch.device, record: Record | None = None) -> None:
        self._call, self._device, self._record = call, device, record or Recorder(device)
        self._kept: OrderedDict[tuple[Hashable, ...], tuple[list[Tensor], list[Tensor], Callable[[], Answer]]] = OrderedDict()

    def __call__(self, observation: ModelObservation, words: tuple[Hashable, ...], *tensors: Tensor) -> Answer:
        """The call's answer, on the host, tensors of its own."""
        names = [item.name for item in fields(observation)]
        given = [*(getattr(observation, name) for name in names), *tensors]
        shape = (*(tensor.shape for tensor in given), *words)
        if shape not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            buffers = [tensor.to(self._device, copy=True) for tensor in given]
            locked = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda") for tensor in given]
            seen = ModelObservation(*buffers[: len(names)])
            self._kept[shape] = buffers, locked, self._record(lambda: self._call(seen, *words, *buffers[len(names) :]))
        self._kept.move_to_end(shape)
        buffers, locked, replay = self._kept[shape]
        for buffer, held, tensor in zip(buffers, locked, given, strict=True):
            # the copy of the last call out of `held` has ended: its answer was waited for
            buffer.copy_(held.copy_(tensor) if tensor.device.type == "cpu" else tensor, non_blocking=True)
        return tuple(answer.to("cpu", copy=True) for answer in replay())


@final
class Recorder:
    """CUDA's way: some calls on a side stream settle allocations and libraries, then one is recorded. All graphs share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__[T](self, call: Callable[[], T]) -> Callable[[], T]:
        """Return a function that repeats `call` on the present content of its buffers, and returns the buffers of the answer."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                answer = call()

        def replay() -> T:
            graph.replay()
            return answer

        return replay
