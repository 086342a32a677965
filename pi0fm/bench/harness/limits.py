"""Peak rates of a device, clocks for its work, and the matrix products of a call.

Owns: rates, clocks and peak memory of a device; the products of a call, traced as it runs, by torch's formulas. Does not know: what runs.

    rates       copying a large tensor: bytes read and written per second; a large product: operations per second
    least time  the longer of operations / product rate, bytes / copy rate
"""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from pi0fm.bench.harness.measure import seconds_of

COPY, SIDE = {"cuda": 2**31, "cpu": 2**28}, {"cuda": 8192, "cpu": 2048}  # bytes of the copy, rows and columns of the product
TRIED_COPY, TRIED_SIDE = 2**24, 256
ATEN = torch.ops.aten
PLAIN = {packet: packet for packet in (ATEN.mm, ATEN.bmm, ATEN.addmm, ATEN.baddbmm)}
PLAIN |= {ATEN.addmm_: ATEN.addmm, ATEN.baddbmm_: ATEN.baddbmm}
PACKED = torch.ops.mkldnn._linear_pointwise
FUSED = tuple(f"aten::_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn"))


@dataclass(frozen=True)
class Rates:
    """Operations of matrix products per second, by dtype; bytes read and written per second."""

    flops_per_second: Mapping[torch.dtype, float]
    bytes_per_second: float

    def seconds(self, flops: Mapping[torch.dtype, float], moved: float) -> float:
        """Least time: that of all operations or that of all bytes to and from memory, whichever is longer."""
        computing = sum(count / self.flops_per_second[dtype] for dtype, count in flops.items())
        return max(computing, moved / self.bytes_per_second)


def measure_rates(device: torch.device, dtypes: Iterable[torch.dtype] = (torch.bfloat16,), whole: bool = True) -> Rates:
    """Measure copies, and products of random numbers (equal numbers take less power and run faster). whole: full size, else a small try.

    A GPU's rate is the median, which it sustains; a processor's is the best of several, since other programs can only slow it down.
    """
    on_card = device.type == "cuda"
    copied, side = (COPY[device.type], SIDE[device.type]) if whole else (TRIED_COPY, TRIED_SIDE)

    def usual(call: Callable[[], object]) -> float:
        return (statistics.median if on_card else min)(device_seconds(call, device, rounds=20 if on_card else 5, warm_up=1))

    source = torch.ones(copied, dtype=torch.uint8, device=device)
    copying = usual(functools.partial(torch.empty_like(source).copy_, source))
    del source
    speeds: dict[torch.dtype, float] = {}
    for dtype in dtypes:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        speeds[dtype] = 2 * side**3 / usual(functools.partial(torch.mm, left, right, out=torch.empty_like(left)))
    return Rates(speeds, 2 * copied / copying)


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Wrap `call` to wait for the device, so that a clock around it covers all work."""

    def whole() -> None:
        call()
        synchronize(device)

    return whole


def host_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Host seconds of each of several calls, including the device's work."""
    return [seconds_of(synchronized(call, device)) for _ in range(rounds)]


def device_seconds(call: Callable[[], object], device: torch.device, rounds: int, warm_up: int = 3) -> list[float]:
    """Device seconds of each of several calls, between events; on a CPU host seconds."""
    host_seconds(call, device, warm_up)
    if device.type != "cuda":
        return host_seconds(call, device, rounds)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for before, after in events:
        before.record()
        call()
        after.record()
    synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def percentile(seconds: Sequence[float], share: float) -> float:
    """Smallest of the seconds that a `share` of them does not exceed."""
    return sorted(seconds)[min(len(seconds) - 1, math.ceil(share * len(seconds)) - 1)]


def peak_bytes(device: torch.device) -> int:
    """Peak bytes allocated by torch on the device since the last `forget_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def forget_peak(device: torch.device) -> None:
    """Release cached memory and reset the peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def flop_counter() -> FlopCounterMode:
    """Make torch's counter of operations, which leaves out the products that adapters accumulate in place."""

    def accumulated(into: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={ATEN.addmm_: accumulated})


@final
class Products(TorchDispatchMode):
    """Trace of the matrix products in its block: their operations by torch's formulas, the bytes of weights that they read.

    `run` repeats only the products: no norm, softmax or copy. Weights are the call's, so they are read from memory as often as in the call;
    all other operands of one shape share one tensor, as if they had just been written to the cache.
    """

    def __init__(self, weights: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()
        self.weight_bytes = 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._kept: list[Tensor] = []  # casts of weights, kept alive: a new tensor at the same address would be taken for a weight
        self._shared: dict[Any, Tensor] = {}
        self._calls: list[Callable[[], object]] = []

    def run(self) -> None:
        """Repeat all products, one after the other."""
        with torch.inference_mode():
            for call in self._calls:
                call()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Handle every operation below autograd and autocast; composite ones, which inference mode leaves whole, are decomposed first."""
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
            self._add(PACKED, (x, matrix, bias, "none", [], ""), {}, None, 2 * x.numel() * matrix.shape[0])  # without the fused activation
        elif name.startswith(FUSED):
            self._add_attention(args, backward="backward" in name)
        elif packet in flop_registry:
            self._add(func, args, kwargs, None, flop_registry[packet](*args, **kwargs, out_val=result))
        return result

    def _add(self, operation: Any, args: Any, options: Mapping[str, Any], out: Tensor | None, flops: int | None = None) -> None:
        """Record a product. out: its result if it can write into a given tensor, else None; flops: by torch's formula if None."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        self.flops[tensors[0].dtype] += flop_registry[operation](*args, **options, out_val=out) if flops is None else flops
        self.weight_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors if self._is_weight(tensor))
        if out is not None:
            options = {**options, "out": self._shared.setdefault(("out", out.shape, out.dtype), torch.empty_like(out))}
        self._calls.append(functools.partial(operation, *tree_map_only(Tensor, self._operand, tuple(args)), **options))

    def _add_attention(self, args: Sequence[Any], backward: bool) -> None:
        """Record the products of fused attention: scores and their use; backward, the scores again and gradients of the four factors."""
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
    """Run `call` once and trace its products. weights: the parameters whose bytes count as read."""
    with Products(weights) as products:
        call()
    return products
