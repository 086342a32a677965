"""Which parameters train, and the number type of the frozen ones.

Owns: `Adaptation`, and the one function that turns a plain network into the one that a run trains. Does not know: optimisers, data.

    train_only      vision   backbone   action_expert   projections      a part with adapters trains only the adapters
    full            trains   trains     trains          trains
    frozen_vision   -        trains     trains          trains
    expert_only     -        -          trains          trains

Trainable weights, their gradients, moments and average are float32 in every precision: under bfloat16 only the products are computed in
bfloat16 (autocast). Frozen weights may be kept in bfloat16, since no small update is ever added to them.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from pi0fm.models.config import Pi0Config
from pi0fm.models.lora import attach, is_adapter, merged, target_modules
from pi0fm.models.parts import Part, part_of
from pi0fm.models.pi0 import Pi0
from pi0fm.train.components import TRAINED, Adaptation
from pi0fm_client.errors import ConfigError


def refuse_mismatch(model: Pi0, how: Adaptation) -> None:
    """Raise ConfigError for adapters whose target layers the network does not have, or in a frozen part."""
    for target in how.lora.targets if how.lora.rank else ():
        how.refuse_frozen(target, {part_of(name) for name in target_modules(model, [target])})


@lru_cache(maxsize=8)
def refuse_for(network: Pi0Config, how: Adaptation) -> None:
    """Apply `refuse_mismatch` to a network that is not built yet, laid out on meta without memory."""
    if how.lora.rank:
        with torch.device("meta"):
            refuse_mismatch(Pi0(network), how)


def adapt(model: Pi0, how: Adaptation, computes: torch.dtype) -> Pi0:
    """Adapt a plain network in place and return it: attach adapters, set which parameters train, the frozen type, and checkpointing.

    computes: the type of the products, from `policy.precision.compute_dtype`. Raises ConfigError for an option that cannot be honoured.
    """
    if how.frozen_bfloat16 and computes != torch.bfloat16:
        raise ConfigError(
            "frozen_bfloat16 needs a run that computes in bfloat16, found float32; type --precision bfloat16, or leave frozen_bfloat16 out"
        )
    refuse_mismatch(model, how)
    adapted: frozenset[Part] = attach(model, how.lora) if how.lora.rank else frozenset()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(is_adapter(name) if part in adapted else part in TRAINED[how.train_only])
    if how.frozen_bfloat16:
        _halve_frozen(model)
    model.checkpoint_activations(how.activation_checkpointing)
    if how.compile:
        model.compile_layers()
    return model


def plain_weights(weights: Mapping[str, Tensor], how: Adaptation) -> Iterator[tuple[str, Tensor]]:
    """Yield an adapted network's weights as those of a plain network, the form that a bundle holds."""
    return merged(weights, how.lora.scaling) if how.lora.rank else iter(weights.items())


def _halve_frozen(model: Pi0) -> None:
    """Cast frozen matrices and embeddings to bfloat16; norms, and the matrices that make a norm's scale and gate, stay float32."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.requires_grad:
            continue
        if "modulation" not in name and "position_embedding" not in name:
            module.to(torch.bfloat16)
