"""Copies of a state's tensors on the host, made through two pieces of page-locked memory.

Owns: the host's buffers, reused by the next copy; the order of the copies. Does not know: what the tensors are, when they are written.

    card to host    | piece 0 to A | piece 1 to B | piece 2 to A | piece 3 to B |
    in the host                    | A to buffers | B to buffers | A to buffers | B to buffers |

Locking a page takes the driver longer than copying it, and a locked page is taken from every other program: a whole state, 52 GB for pi0,
is never locked.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from pi0fm.train.parallel.sharding import is_cut, local

PIECE = 2**28  # bytes of each of the two pieces


@final
class HostCopies:
    """Buffers on the host, one for each tensor that was copied."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._pieces: tuple[Tensor, Tensor] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors as the device's queued work leaves them; of a sharded tensor this worker's rows. Valid until the next call."""
        for name, tensor in tensors.items():
            if name not in self._buffers:  # a sharded tensor is copied once more, since it cannot be made empty on another device
                given = tensor.detach()
                self._buffers[name] = given.to("cpu", copy=True) if is_cut(given) else torch.empty(given.shape, dtype=given.dtype)
        pairs = [(local(tensor).detach(), local(self._buffers[name])) for name, tensor in tensors.items()]
        on_card = [pair for pair in pairs if pair[0].is_cuda]
        here = [pair for pair in pairs if not pair[0].is_cuda]
        if here:
            torch._foreach_copy_([target for _, target in here], [source for source, _ in here])
        if on_card:
            if self._pieces is None:
                self._pieces = _locked(), _locked()
            copy_in_pieces(on_card, self._pieces)
        return {name: self._buffers[name] for name in tensors}

    def clear(self) -> None:
        """Release the memory."""
        self._buffers.clear()
        self._pieces = None


def _locked() -> Tensor:
    return torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)


def copy_in_pieces(pairs: Sequence[tuple[Tensor, Tensor]], pieces: tuple[Tensor, Tensor]) -> None:
    """Copy each first tensor to the second, contiguous and on the host, through `pieces`: one is filled while the other is emptied."""
    waiting: list[tuple[Tensor, Tensor]] = []
    filled: torch.cuda.Event | None = None
    for number, stretches in enumerate(_stretches(pairs, len(pieces[0]))):
        piece, start, taken = pieces[number % 2], 0, []
        for source, target in stretches:
            part = piece[start : start + len(source)]
            part.copy_(source, non_blocking=True)
            taken.append((part, target))
            start += len(source)
        done = _event(stretches[0][0])
        _empty(waiting, filled)
        waiting, filled = taken, done
    _empty(waiting, filled)


def _stretches(pairs: Sequence[tuple[Tensor, Tensor]], size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Stretches of bytes of both tensors, in lists of at most `size` bytes."""
    found: list[tuple[Tensor, Tensor]] = []
    room = size
    for source, target in (tuple(tensor.reshape(-1).view(torch.uint8) for tensor in pair) for pair in pairs):
        start = 0
        while start < len(source):
            stop = min(len(source), start + room)
            found.append((source[start:stop], target[start:stop]))
            room -= stop - start
            start = stop
            if room == 0:
                yield found
                found, room = [], size
    if found:
        yield found


def _event(source: Tensor) -> "torch.cuda.Event | None":
    """Mark the card's queue; a CPU has copied already."""
    if not source.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(source.device))
    return event


def _empty(taken: Sequence[tuple[Tensor, Tensor]], filled: "torch.cuda.Event | None") -> None:
    if filled is not None:
        filled.synchronize()
    for part, target in taken:
        target.copy_(part)
