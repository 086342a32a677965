"""Low-rank adapters: y = W x + (alpha / rank) B A x, with W frozen and B = 0 at the start (Hu et al. 2021, arXiv 2106.09685).

Owns: which modules a target names, their wrapping by peft and its check, and the conversion back to plain weights.
Does not know: what else of the network trains.

    decoder.layers.3.backbone.qkv.weight        before, and in every bundle
    decoder.layers.3.backbone.qkv.base_layer.weight, .lora_A.default.weight [rank, in], .lora_B.default.weight [out, rank]      inside a run
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from pi0fm.models.config import ADAPTABLE, LoraConfig
from pi0fm.models.initial import ConstantInit, Initial, UniformInit
from pi0fm.models.parts import Part, part_of
from pi0fm.models.pi0 import Pi0
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


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

    All parameters except the adapters' are frozen. Raises ConfigError for a target that names no layer, RuntimeError when peft
    wrapped other layers than the targets: it ignores a name that it does not find.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    names = target_modules(model, config.targets)
    inject_adapter_in_model(
        PeftConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, bias="none", target_modules=list(names)), model
    )
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if wrapped != set(names):
        raise RuntimeError(f"peft must wrap exactly the targets, found the differences {sorted(wrapped.symmetric_difference(names))}")
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
