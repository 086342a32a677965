"""A whole chunk as one CUDA graph: recorded once for each shape of its inputs, then replayed without Python between its kernels.

Owns: the buffers that a graph reads, which graphs are kept. Does not know: the computation.

    first call of a shape    inputs -> buffers -> warm-up calls on a side stream -> record -> replay
    later calls              inputs -> page-locked buffer -> one copy -> replay -> one copy -> page-locked buffer -> the answer
                             one place of memory for all graphs: they never run at the same time

A shape is that of every input, and the words that choose what is recorded. policy/sampling/buckets.py makes shapes few.
On the host every tensor is copied once, by the calling thread alone: torch would wake its other threads for a picture, and the slowest of
them, on a machine with other work, is what the robot then waits for.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import final

import numpy as np
import torch
from torch import Tensor

from pi0fm.models.observation import ModelObservation

KEPT = 64
_WARM_UP = 3
_ALIGNED = 256

Answer = tuple[Tensor, ...]
Call = Callable[..., Answer]
"""(observation, *words, *tensors) -> float32 tensors."""
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a call on fixed buffers to one that repeats it."""


@final
class Inputs:
    """Tensors of fixed shapes, each a view of one page-locked buffer on the host and of one on the device."""

    def __init__(self, given: Sequence[Tensor], device: torch.device) -> None:
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in given]
        self._host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._places = [view.numpy() for view in _views(self._host, given, sizes)]
        self.tensors = _views(self._device, given, sizes)

    def send(self, given: Sequence[Tensor]) -> None:
        """Copy tensors, best of the host, to the device without waiting for it; the last call's copy must have ended."""
        for place, tensor in zip(self._places, given, strict=True):
            np.copyto(place, tensor.cpu().numpy())
        self._device.copy_(self._host, non_blocking=True)


def _views(buffer: Tensor, like: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    parts = zip(torch.split(buffer, list(sizes)), like, strict=True)
    return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in parts]


@dataclass
class _Kept:
    """A recorded shape. shapes: of the answer's tensors, which follow each other in `answer`, page-locked; made by the first replay."""

    inputs: Inputs
    replay: Callable[[], Tensor]
    shapes: list[torch.Size]
    answer: Tensor | None = None


@final
class Graphs:
    """`call` by replay. At most KEPT shapes are kept, the least recently used leaves. record: other than by CUDA, for tests."""

    def __init__(self, call: Call, device: torch.device, record: Record | None = None) -> None:
        self._call, self._device, self._record = call, device, record or Recorder(device)
        self._kept: OrderedDict[tuple[Hashable, ...], _Kept] = OrderedDict()

    def __call__(self, observation: ModelObservation, words: tuple[Hashable, ...], *tensors: Tensor) -> Answer:
        """The call's answer, on the host, tensors of its own. What is given is best on the host too: it is copied there first."""
        given = [*(getattr(observation, item.name) for item in fields(observation)), *tensors]
        shape = (*(tensor.shape for tensor in given), *words)
        if shape not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[shape] = self._recorded(given, words)
        self._kept.move_to_end(shape)
        kept = self._kept[shape]
        kept.inputs.send(given)
        answer, on_card = kept.replay(), self._device.type == "cuda"
        if kept.answer is None:
            kept.answer = torch.empty(answer.shape, pin_memory=on_card)
        kept.answer.copy_(answer, non_blocking=True)
        if on_card:
            torch.cuda.current_stream(self._device).synchronize()
        parts = torch.split(kept.answer.clone(), [shape.numel() for shape in kept.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, kept.shapes, strict=True))

    def _recorded(self, given: Sequence[Tensor], words: tuple[Hashable, ...]) -> _Kept:
        inputs, number, shapes = Inputs(given, self._device), len(fields(ModelObservation)), list[torch.Size]()
        inputs.send(given)

        def call() -> Tensor:
            answer = self._call(ModelObservation(*inputs.tensors[:number]), *words, *inputs.tensors[number:])
            shapes[:] = [tensor.shape for tensor in answer]
            return torch.cat([tensor.flatten() for tensor in answer])

        return _Kept(inputs, self._record(call), shapes)


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
