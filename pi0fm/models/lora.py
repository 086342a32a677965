"""Low-rank adapters: y = W x + (alpha / rank) B A x, with W frozen and B = 0 at the start (Hu et al. 2021, arXiv 2106.09685).

Owns: the adapted layer, which modules a target names, and the conversion back to plain weights. Names are peft's.
Does not know: what else of the network trains.

    decoder.layers.3.backbone.qkv.weight        before, and in every bundle
    decoder.layers.3.backbone.qkv.base_layer.weight, .lora_A.default.weight [rank, in], .lora_B.default.weight [out, rank]      inside a run
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pi0fm.models.config import ADAPTABLE, LoraConfig
from pi0fm.models.initial import ConstantInit, Initial, UniformInit
from pi0fm.models.layers import Linear, adapted, product_dtype
from pi0fm.models.parts import Part, part_of
from pi0fm.models.pi0 import Pi0
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


@final
class LoraLinear(nn.Module):
    """Frozen linear layer with an adapter: x W' + b + (alpha / rank) (x A') B'.

    The product B A is never added to W in training: its updates are smaller than the last bit of a bfloat16 W, and would be lost.
    """

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base_layer, self.scaling = linear, config.scaling
        self.lora_A = _half(linear.in_features, config.rank, linear.weight)
        self.lora_B = _half(config.rank, linear.out_features, linear.weight)
        nn.init.zeros_(_weight(self.lora_B))

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n F"]:
        """Map x, in the type of the products."""
        base, dtype = self.base_layer, product_dtype(x)
        weight = base.matrix(dtype) if isinstance(base, Linear) else base.weight.to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        return adapted(x.to(dtype), weight, bias, (self.scaling * _weight(self.lora_A)).to(dtype), _weight(self.lora_B).to(dtype))


def _half(inputs: int, outputs: int, like: Tensor) -> nn.ModuleDict:
    return nn.ModuleDict({"default": nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)})


def _weight(half: nn.ModuleDict) -> Tensor:
    return cast(nn.Linear, half["default"]).weight


def target_modules(model: Pi0, targets: Iterable[str]) -> tuple[str, ...]:
    """Exact names of all linear layers that `targets` name, in the network's order.

    A part names every linear layer in it. Raises ConfigError for a target that names none.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adaptable = [name for name in linears if part_of(name) in ADAPTABLE]
    chosen: set[str] = set()
    for target in targets:
        if target in ADAPTABLE:
            chosen.update(name for name in adaptable if part_of(name) == target)
            continue
        matched = [name for name in linears if fnmatchcase(name, target)]
        if not matched:
            known = nearest(target, [*ADAPTABLE, *sorted({_any_layer(name) for name in adaptable})])
            raise ConfigError(f"lora.targets must name linear layers of this network, found {target!r}, which names none: {known}")
        small = [name for name in matched if name not in adaptable]
        if small:
            raise ConfigError(f"lora.targets must leave out {', '.join(small)}, found in {target!r}: they are small and train whole")
        chosen.update(matched)
    return tuple(name for name in adaptable if name in chosen)


def attach(model: Pi0, config: LoraConfig) -> frozenset[Part]:
    """Wrap the targets in adapters that change nothing yet, and return the parts that now hold some.

    All parameters except the adapters' are frozen. Raises ConfigError for a target that names no layer.
    """
    names = target_modules(model, config.targets)
    model.requires_grad_(False)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, LoraLinear(linear, config))
    return frozenset(part_of(name) for name in names)


def is_adapter(name: str) -> bool:
    """Whether the parameter `name` is half of an adapter."""
    return name.endswith((_A, _B))


def plain_name(name: str) -> str:
    """Name in the plain network of an adapted network's parameter; an adapter's name is unchanged."""
    return name.replace(_BASE, ".")


def initial_adapter(name: str, parameter: Tensor) -> Initial:
    """Distribution of half an adapter: peft's for A, 0 for B, so that nothing changes at the start."""
    return UniformInit(parameter.shape[1] ** -0.5) if name.endswith(_A) else ConstantInit(0.0)


def merged(weights: Mapping[str, Tensor], scaling: float) -> Iterator[tuple[str, Tensor]]:
    """Yield plain weights under plain names: W + scaling B A in float32 for every adapted layer, the rest unchanged.

    weights: a state dict of an adapted network, or of a plain one, which is returned unchanged; each is read once.
    """
    for name in weights:
        if is_adapter(name):
            continue
        if _BASE not in name:
            yield name, weights[name]
            continue
        layer, kind = name.split(_BASE)
        value = weights[name]
        yield f"{layer}.{kind}", value if kind == "bias" else _with_adapter(value, weights[layer + _A], weights[layer + _B], scaling)


@torch.no_grad()
def _with_adapter(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)


def _any_layer(name: str) -> str:
    """Replace numbers by `*`: `decoder.layers.3.backbone.qkv` becomes `decoder.layers.*.backbone.qkv`."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))
