"""What of the network trains, and in which numbers the rest is kept.

Owns: `Adaptation`, and the one function that makes a plain network into the one that a run trains. Does not know: optimisers, data.

    train_only      vision   backbone   action_expert   projections      a part with adapters in it trains nothing but these
    full            trains   trains     trains          trains
    frozen_vision   -        trains     trains          trains
    expert_only     -        -          trains          trains

Weights that train, their gradients, moments and average are float32 in every precision: under bfloat16 the products alone are computed
in it (autocast). What is frozen may be kept in bfloat16, since nothing small is ever added to it.
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
    """Raise ConfigError for adapters that this network has no place for, or in a part that is frozen."""
    for target in how.lora.targets if how.lora.rank else ():
        how.refuse_frozen(target, {part_of(name) for name in target_modules(model, [target])})


@lru_cache(maxsize=8)
def refuse_for(network: Pi0Config, how: Adaptation) -> None:
    """`refuse_mismatch` for a network that is not built yet: it is laid out without its memory."""
    if how.lora.rank:
        with torch.device("meta"):
            refuse_mismatch(Pi0(network), how)


def adapt(model: Pi0, how: Adaptation, computes: torch.dtype) -> Pi0:
    """Adapt a plain network in place: attach adapters, choose what needs a gradient, the type of the rest, and checkpointing.

    Returns it. computes: the type of the products, `policy.precision.compute_dtype`'s. Raises ConfigError for what cannot be honoured.
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
    """Yield the weights of an adapted network as those of a plain one, which a bundle holds."""
    return merged(weights, how.lora.scaling) if how.lora.rank else iter(weights.items())


def _halve_frozen(model: Pi0) -> None:
    """Cast frozen matrices and embeddings to bfloat16. Norms, and the products that make scale and gate of a norm, stay float32."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.requires_grad:
            continue
        if "modulation" not in name and "position_embedding" not in name:
            module.to(torch.bfloat16)
