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
from dataclasses import dataclass, field
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor, nn

from pi0fm.models.layers import CHECKPOINTING
from pi0fm.models.lora import LoraConfig, attach, is_adapter, merged, target_modules
from pi0fm.models.parts import PARTS, Part, part_of
from pi0fm.models.pi0 import Pi0, Pi0Config
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError

TRAINED: dict[str, frozenset[Part]] = {
    "full": frozenset(PARTS),
    "frozen_vision": frozenset(get_args(Part)) - {"vision"},
    "expert_only": frozenset({"action_expert", "projections"}),
}


@dataclass(frozen=True)
class Adaptation:
    """What trains and how it is kept in memory. Raises ConfigError for a word that is not known, or a combination that cannot be."""

    train_only: str = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    frozen_bfloat16: bool = False
    activation_checkpointing: str = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.train_only not in TRAINED:
            raise ConfigError(f"train_only must be a known word, found {self.train_only!r}: {nearest(self.train_only, list(TRAINED))}")
        if self.frozen_bfloat16 and self.train_only == "full" and not self.lora.rank:
            raise ConfigError(
                "frozen_bfloat16 halves what is frozen, but train_only full without lora freezes nothing; leave it out, or type "
                "--lora.rank 16"
            )
        if self.activation_checkpointing not in CHECKPOINTING:
            found = self.activation_checkpointing
            raise ConfigError(f"activation_checkpointing must be a known word, found {found!r}: {nearest(str(found), CHECKPOINTING)}")
        for target in self.lora.targets if self.lora.rank else ():
            self._refuse_frozen(target, {part for part in PARTS if part == target})

    def _refuse_frozen(self, target: str, parts: set[Part]) -> None:
        contradicted = sorted(parts - TRAINED[self.train_only])
        if contradicted:
            raise ConfigError(
                f"lora.targets must lie in what trains, found {target!r} in {', '.join(contradicted)}, which train_only {self.train_only} "
                "freezes; type --train_only full, or other targets"
            )

    def refuse_mismatch(self, model: Pi0) -> None:
        """Raise ConfigError for adapters that this network has no place for, or in a part that is frozen."""
        for target in self.lora.targets if self.lora.rank else ():
            self._refuse_frozen(target, {part_of(name) for name in target_modules(model, [target])})


@lru_cache(maxsize=8)
def refuse_for(network: Pi0Config, how: Adaptation) -> None:
    """`Adaptation.refuse_mismatch` for a network that is not built yet: it is laid out without its memory."""
    if how.lora.rank:
        with torch.device("meta"):
            how.refuse_mismatch(Pi0(network))


def adapt(model: Pi0, how: Adaptation, computes: torch.dtype) -> Pi0:
    """Make a plain network, in place, into what the run trains: adapters, what needs a gradient, numbers of the rest, checkpointing.

    Returns it. computes: the type of the products, `policy.precision.compute_dtype`'s. Raises ConfigError for what cannot be honoured.
    """
    if how.frozen_bfloat16 and computes != torch.bfloat16:
        raise ConfigError(
            "frozen_bfloat16 needs a run that computes in bfloat16, found float32; type --precision bfloat16, or leave frozen_bfloat16 out"
        )
    how.refuse_mismatch(model)
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
    """The weights of a network that `adapt` made, as those of a plain one, one by one: what a bundle holds."""
    return merged(weights, how.lora.scaling) if how.lora.rank else iter(weights.items())


def _halve_frozen(model: Pi0) -> None:
    """Frozen matrices and words in bfloat16. Norms, and the products that make scale and gate of a norm, stay float32."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.requires_grad:
            continue
        if "modulation" not in name and "position_embedding" not in name:
            module.to(torch.bfloat16)
