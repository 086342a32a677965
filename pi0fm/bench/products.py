"""The matrix products of a piece of work: how many operations they are, and how long they take alone.

Owns: listing the products that a call makes, running them again on tensors that are there already, the machine's own limits.
Does not know: whose call it is.

    call ----> aten operations ----> Product: operation, shapes, strides, types ----> bare(): the same products, one after the other
                    |                                                                  nothing between them
                    '--> all else (norms, softmax, copies) is left out

A weight keeps a tensor of its own in `bare`, so that it comes from memory as often as in the call. All other operands of one shape share
one tensor, as they would if what made them had just left them in the cache.
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ATEN = torch.ops.aten
_PLAIN: Mapping[Any, Any] = {
    ATEN.mm: ATEN.mm,
    ATEN.bmm: ATEN.bmm,
    ATEN.addmm: ATEN.addmm,
    ATEN.addmm_: ATEN.addmm,
    ATEN.baddbmm: ATEN.baddbmm,
    ATEN.baddbmm_: ATEN.baddbmm,
}
PACKED = torch.ops.mkldnn._linear_pointwise
_ATTENTION = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
_LARGE = 2048  # rows and columns of the product that measures the machine
_COPIED = 256 * 2**20  # bytes of the copy that does
_TRIES = 5


@dataclass(frozen=True)
class Operand:
    """One tensor of a product. weight: an identity when it is a parameter (or a parameter in another type), else None.

    packed: in oneDNN's own order (policy/packed.py), which has no strides.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    weight: int | None
    packed: bool = False

    @property
    def bytes(self) -> int:
        """As many as it has entries, whatever its strides."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Product:
    """An operation with its arguments, tensors as Operands; `into`: it can write into a tensor that is there, of this shape."""

    operation: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    flops: int
    into: tuple[int, ...] | None

    @property
    def operands(self) -> list[Operand]:
        """Its tensors, in order."""
        return [argument for argument in self.arguments if isinstance(argument, Operand)]


@dataclass(frozen=True)
class Work:
    """What a list of products amounts to: operations by type of number, and the bytes of weights, each time that they are read."""

    flops: Mapping[torch.dtype, int]
    weight_bytes: int

    @property
    def total_flops(self) -> int:
        """Of all types."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Roofline:
    """What the machine reaches at best: operations a second by type of number, and bytes a second to and from memory."""

    flops_per_second: Mapping[torch.dtype, float]
    bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """The least time for `work`: its operations at full speed, or its weights from memory, whichever takes longer."""
        computing = sum(count / self.flops_per_second[dtype] for dtype, count in work.flops.items())
        return max(computing, work.weight_bytes / self.bytes_per_second)


def products_of(call: Callable[[], object], parameters: Iterable[nn.Parameter]) -> list[Product]:
    """Run `call` once and list its products, in order. parameters: what counts as a weight."""
    with _Recorder(parameters) as recorder:
        call()
    return recorder.products


def work_of(products: Sequence[Product]) -> Work:
    """The sums."""
    flops: Counter[torch.dtype] = Counter()
    for product in products:
        flops[product.operands[-1].dtype] += product.flops
    read = sum(operand.bytes for product in products for operand in product.operands if operand.weight is not None)
    return Work(dict(flops), read)


def bare(products: Sequence[Product]) -> Callable[[], None]:
    """A function that runs the products and nothing else; their tensors are made here."""
    pool: dict[Operand, Tensor] = {}
    targets: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def filled(operand: Operand) -> Tensor:
        if operand not in pool:
            pool[operand] = _filled(operand)
        return pool[operand]

    calls: list[Callable[[], object]] = []
    for product in products:
        arguments = tree_map_only(Operand, filled, product.arguments)
        options = dict(product.options)
        if product.into is not None:
            dtype = product.operands[-1].dtype
            if (product.into, dtype) not in targets:
                targets[product.into, dtype] = torch.empty(product.into, dtype=dtype, device=product.operands[-1].device)
            options["out"] = targets[product.into, dtype]
        calls.append(functools.partial(product.operation, *arguments, **options))

    def run() -> None:
        with torch.inference_mode():
            for call in calls:
                call()

    return run


def measure_roofline(device: torch.device, dtypes: Iterable[torch.dtype]) -> Roofline:
    """The best of a few large products of each type, and of a few large copies, of which both reading and writing count."""
    speeds: dict[torch.dtype, float] = {}
    for dtype in dtypes:
        left, right = (torch.randn(_LARGE, _LARGE, device=device).to(dtype) for _ in range(2))
        target = torch.empty_like(left)
        speeds[dtype] = 2 * _LARGE**3 / _best(functools.partial(torch.mm, left, right, out=target), device)
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    copy = torch.zeros_like(source)
    return Roofline(speeds, 2 * _COPIED / _best(functools.partial(copy.copy_, source), device))


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`call`, and the wait for the device behind it: a clock around it sees the whole."""

    def whole() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole


@final
class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd and autocast; composite ones are taken apart first, as inference mode leaves them whole."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._weights = {parameter.untyped_storage().data_ptr(): number for number, parameter in enumerate(parameters)}
        self._packed: dict[int, Tensor] = {}  # by id, and kept for the same reason
        self._casts: list[Tensor] = []  # kept: another tensor at a cast's old address would pass for a weight

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        name = func.name().removeprefix("aten::").split(".")[0]
        known = packet in _PLAIN or packet is PACKED or name.startswith(("convolution", *_ATTENTION))
        if not known:
            with self:
                taken_apart = func.decompose(*args, **kwargs)
            if taken_apart is not NotImplemented:
                return taken_apart
        result = func(*args, **kwargs)
        if packet is ATEN._to_copy and (weight := self._weights.get(args[0].untyped_storage().data_ptr())) is not None:
            self._weights[result.untyped_storage().data_ptr()] = weight
            self._casts.append(result)
        if packet in _PLAIN:
            self._plain(_PLAIN[packet], args, kwargs, result)
        elif packet is PACKED:
            self._packed_product(args)
        elif name.startswith("convolution"):
            self._convolution(func, args, kwargs, result)
        elif name.startswith(_ATTENTION):
            self._attention(name, args)
        return result

    def _plain(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        left, right = args[-2:]
        options = {key: value for key, value in kwargs.items() if key != "out"}
        flops = 2 * math.prod(left.shape) * right.shape[-1]
        self.products.append(Product(packet, self._operands(args), options, flops, tuple(result.shape)))

    def _packed_product(self, args: tuple[Any, ...]) -> None:
        """Without what is done to its output, which is no product."""
        x, matrix, bias = args[:3]
        self._packed[id(matrix)] = matrix
        weight = Operand(tuple(matrix.shape), (), matrix.dtype, matrix.device, id(matrix), packed=True)
        described = (*self._operands((x,)), weight, *self._operands((bias,)), "none", [], "")
        flops = 2 * math.prod(x.shape) * matrix.shape[0]
        self.products.append(Product(PACKED, described, {}, flops, None))

    def _convolution(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Forward: (input, weight, ...). Backward: (gradient, input, weight, ...), a product for each of the two gradients wanted."""
        backward = "backward" in func.name()
        weight = args[2 if backward else 1]
        output = args[0].shape if backward else result.shape
        times = sum(args[-1][:2]) if backward else 1
        flops = 2 * times * math.prod(output) * math.prod(weight.shape[1:])
        self.products.append(Product(func, self._operands(args), kwargs, flops, None))

    def _attention(self, name: str, args: tuple[Any, ...]) -> None:
        """As the products that it fuses: scores and their use; backwards the scores again, and a gradient for each of the four factors."""
        query, key = args[1:3] if "backward" in name else args[:2]
        rows, columns = (math.prod(query.shape[:2]), *query.shape[2:]), (math.prod(query.shape[:2]), query.shape[3], key.shape[2])
        back = (rows[0], columns[2], rows[2])
        scores = (rows[0], rows[1], columns[2])
        turned = (rows[0], columns[2], rows[1])
        pairs = [(rows, columns), (scores, back)]
        if "backward" in name:
            pairs = [(rows, columns), (rows, columns), (turned, rows), (scores, back), (turned, rows)]
        for left, right in pairs:
            operands = tuple(_contiguous(shape, query) for shape in (left, right))
            self.products.append(Product(ATEN.bmm, operands, {}, 2 * math.prod(left) * right[-1], (*left[:2], right[-1])))

    def _operands(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        def described(tensor: Tensor) -> Operand:
            weight = self._weights.get(tensor.untyped_storage().data_ptr())
            return Operand(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, weight)

        return tuple(tree_map_only(Tensor, described, arguments))


def _contiguous(shape: tuple[int, ...], like: Tensor) -> Operand:
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Operand(shape, stride, like.dtype, like.device, None)


def _filled(operand: Operand) -> Tensor:
    """Random numbers under the operand's own strides, which may be 0 or leave gaps."""
    if operand.packed:
        return torch.ops.mkldnn._reorder_linear_weight(torch.randn(operand.shape).to(operand.dtype))
    length = 1 + sum((size - 1) * stride for size, stride in zip(operand.shape, operand.stride, strict=True))
    return torch.randn(length, device=operand.device).to(operand.dtype).as_strided(operand.shape, operand.stride)


def _best(call: Callable[[], object], device: torch.device) -> float:
    whole, seconds = synchronized(call, device), []
    for _ in range(_TRIES):
        began = time.perf_counter()
        whole()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
