"""Measure two pieces of work in turns, and the limits of the machine under them.

Owns: paired runs and their ratio, the matrix products of a call, the machine's roofline, the checks of options. Does not know: what runs.

    round      0        1        2        3             the side that begins changes every round, so that neither always finds
    runs    first,   second,  first,   second,          a warm cache; a neighbour on the machine slows both of a round alike,
            second   first    second   first            and their ratio stays
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError

RESAMPLES, CONFIDENCE = 4000, 0.95
LARGE, COPIED, TRIES = 2048, 256 * 2**20, 5  # the product (rows and columns) and the copy (bytes) that measure the machine
ATEN = torch.ops.aten
PLAIN = {packet: packet for packet in (ATEN.mm, ATEN.bmm, ATEN.addmm, ATEN.baddbmm)}
PLAIN |= {ATEN.addmm_: ATEN.addmm, ATEN.baddbmm_: ATEN.baddbmm}
PACKED = torch.ops.mkldnn._linear_pointwise
FUSED = tuple(f"aten::_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn"))


@dataclass(frozen=True)
class Report:
    """What a question found. figures: the last line; shown: what of them is in the tables; background: in the result's file alone."""

    figures: Mapping[str, Any]
    shown: Mapping[str, Any] | None = None
    background: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Ratio:
    """Time of the first by time of the second: the median over rounds with its bootstrap interval; seconds: the median of one run."""

    median: float
    interval: tuple[float, float]
    first_seconds: float
    second_seconds: float

    def per_piece(self, first: float, second: float) -> "Ratio":
        """The ratio of unequal work, `first` pieces on one side and `second` on the other; seconds become those of a piece."""
        times, (low, high) = second / first, self.interval
        return Ratio(times * self.median, (times * low, times * high), self.first_seconds / first, self.second_seconds / second)

    def json(self) -> dict[str, Any]:
        """Median and interval."""
        return {"ratio": self.median, "interval": self.interval}


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """What one run takes."""
    began = clock()
    work()
    return clock() - began


def paired_ratio(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    *,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    after: Callable[[], object] = lambda: None,
) -> Ratio:
    """Run both `rounds` times in turns in this process, after `warm_up` rounds that do not count.

    after: called after each run, outside the clock; it removes what the run leaves. Raises ConfigError for less than one round.
    """
    if rounds < 1:
        raise ConfigError(f"a comparison needs 1 round or more, found {rounds}; try 30")
    pairs = []
    for number in range(-warm_up, rounds):
        found = [0.0, 0.0]
        for side, work in sorted(enumerate((first, second)), reverse=bool(number % 2)):
            found[side] = seconds_of(work, clock)
            after()
        pairs.append((found[0], found[1]))
    return ratio_of(pairs[warm_up:])


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """The ratio of paired seconds; its 95 % interval by the percentiles of resampled medians, from a fixed seed."""
    seconds = np.array(pairs, dtype=np.float64)
    ratios = seconds[:, 0] / seconds[:, 1]
    chosen = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(ratios)), (float(low), float(high)), *(float(each) for each in np.median(seconds, axis=0)))


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`call`, then a wait for the device, so that a clock around it sees the whole."""

    def whole() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole


@final
class Products(TorchDispatchMode):
    """The matrix products of what runs inside: their operations by torch's own formulas, the bytes of weights that they read.

    `run` repeats them and nothing else: no norm, softmax or copy. A weight keeps its own tensor there, so that it comes from memory as
    often as in the call; all other operands of one shape share one tensor, as if what made them had just left them in the cache.
    """

    def __init__(self, weights: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()
        self.weight_bytes = 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._kept: list[Tensor] = []  # another tensor at the old address of a weight in another type would pass for a weight
        self._shared: dict[Any, Tensor] = {}
        self._calls: list[Callable[[], object]] = []

    def run(self) -> None:
        """Repeat the products, one after the other."""
        with torch.inference_mode():
            for call in self._calls:
                call()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """See every operation below autograd and autocast; composite ones are taken apart first, as inference mode leaves them whole."""
        kwargs, packet, name = kwargs or {}, func.overloadpacket, func.name()
        if not (packet in PLAIN or packet is PACKED or packet in flop_registry or name.startswith(FUSED)):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet is ATEN._to_copy and self._is_weight(args[0]):
            self._weights.add(result.untyped_storage().data_ptr())
            self._kept.append(result)
        elif packet in PLAIN:
            self._add(PLAIN[packet], args, {key: value for key, value in kwargs.items() if key != "out"}, result)
        elif packet is PACKED:
            x, matrix, bias = args[:3]
            self._weights.add(id(matrix))
            self._add(PACKED, (x, matrix, bias, "none", [], ""), {}, None, 2 * x.numel() * matrix.shape[0])  # what follows is no product
        elif name.startswith(FUSED):
            self._add_attention(args, backward="backward" in name)
        elif packet in flop_registry:
            self._add(func, args, kwargs, None, flop_registry[packet](*args, **kwargs, out_val=result))
        return result

    def _add(self, operation: Any, args: Any, options: Mapping[str, Any], out: Tensor | None, flops: int | None = None) -> None:
        """Note a call. out: the result of a product that can write into a given tensor, else None; flops: by torch's formula if None."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        self.flops[tensors[0].dtype] += flop_registry[operation](*args, **options, out_val=out) if flops is None else flops
        self.weight_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors if self._is_weight(tensor))
        if out is not None:
            options = {**options, "out": self._shared.setdefault(("out", out.shape, out.dtype), torch.empty_like(out))}
        self._calls.append(functools.partial(operation, *tree_map_only(Tensor, self._operand, tuple(args)), **options))

    def _add_attention(self, args: Sequence[Any], backward: bool) -> None:
        """The products that it fuses: scores and their use; backward, the scores again and a gradient for each of the four factors."""
        query, key = args[1:3] if backward else args[:2]
        rows, keys, width = query.shape[2], key.shape[2], query.shape[3]
        score, use, turned = ((rows, width), (width, keys)), ((rows, keys), (keys, width)), ((keys, rows), (rows, width))
        for pair in (score, score, turned, use, turned) if backward else (score, use):
            left, right = (torch.ones(math.prod(query.shape[:2]), *shape, dtype=query.dtype, device=query.device) for shape in pair)
            self._add(ATEN.bmm, (left, right), {}, left.new_empty(len(left), left.shape[1], right.shape[2]))

    def _is_weight(self, tensor: Tensor) -> bool:
        return (id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()) in self._weights

    def _operand(self, tensor: Tensor) -> Tensor:
        if self._is_weight(tensor):
            return tensor
        return self._shared.setdefault((tensor.shape, tensor.stride(), tensor.dtype), tensor.detach())


def products_of(call: Callable[[], object], weights: Iterable[nn.Parameter] = ()) -> Products:
    """Run `call` once and list its products. weights: the parameters whose bytes count as read."""
    with Products(weights) as products:
        call()
    return products


@dataclass(frozen=True)
class Roofline:
    """The best that the machine reaches: operations a second by type of number, and bytes a second to and from memory."""

    flops_per_second: Mapping[torch.dtype, float]
    bytes_per_second: float

    def seconds(self, products: Products) -> float:
        """The least time: all operations at full speed, or all weights from memory, whichever takes longer."""
        computing = sum(count / self.flops_per_second[dtype] for dtype, count in products.flops.items())
        return max(computing, products.weight_bytes / self.bytes_per_second)


def measure_roofline(device: torch.device, dtypes: Iterable[torch.dtype]) -> Roofline:
    """The best of a few large products of each type, and of a few large copies, of which both reading and writing count."""

    def best(call: Callable[[], object]) -> float:
        return min(seconds_of(synchronized(call, device)) for _ in range(TRIES))

    speeds: dict[torch.dtype, float] = {}
    for dtype in dtypes:
        left, right = (torch.randn(LARGE, LARGE, device=device).to(dtype) for _ in range(2))
        speeds[dtype] = 2 * LARGE**3 / best(functools.partial(torch.mm, left, right, out=torch.empty_like(left)))
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    return Roofline(speeds, 2 * COPIED / best(functools.partial(torch.zeros_like(source).copy_, source)))


def check_least(config: object, **least: int) -> None:
    """Raise ConfigError for an option of `config` that is below its least value."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ConfigError(f"{name} must be {smallest} or more, found {value}; type --{name} {smallest} or leave it out")


def check_words(name: str, words: Sequence[str], known: Iterable[str]) -> None:
    """Raise ConfigError for no word, a word twice, or one that is not known."""
    known = tuple(known)
    if not words or len(set(words)) != len(words):
        raise ConfigError(f"{name} must name one or more, each once, found {', '.join(words) or 'none'}; type --{name} {known[0]}")
    for word in words:
        if word not in known:
            raise ConfigError(f"unknown word in {name}, {word!r}: {nearest(word, known)}")
