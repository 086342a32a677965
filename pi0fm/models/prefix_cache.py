"""Values that a sampler keeps between its evaluations of the velocity, since none of them changes them.

Owns: keys and values of the prefix, with space for the actions' after them; modulations of adaptive norms by flow time. Does not know:
how they are computed.

    prefix keys and values | state's keys and values | space for the actions', written by every evaluation

Shape letters: B batch, P prefix tokens, J keys that the actions see, D width, K head dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pi0fm.models.layers import Modulation, Rotation


class KeyValue(NamedTuple):
    """Rotated keys and values of the prefix in one layer, each [B, kv heads, P, K]."""

    key: Tensor
    value: Tensor

    def joined(self, own: "KeyValue") -> "KeyValue":
        """Append the suffix's keys and values; the suffix may hold several rows, in order, for each row of these."""
        times = own.key.shape[0] // self.key.shape[0]
        seen = self if times == 1 else KeyValue(self.key.repeat_interleave(times, dim=0), self.value.repeat_interleave(times, dim=0))
        return KeyValue(torch.cat((seen.key, own.key), dim=2), torch.cat((seen.value, own.value), dim=2))

    def with_space(self, more: int) -> "KeyValueBuffer":
        """Append space for `more` tokens."""
        key, value = (torch.cat((seen, seen.new_zeros(*seen.shape[:2], more, seen.shape[3])), dim=2) for seen in self)
        return KeyValueBuffer(key, value, more)


@dataclass(frozen=True)
class KeyValueBuffer:
    """Keys and values [B, kv heads, J, K] of all that the actions see; the last `own` are the actions', overwritten in place."""

    key: Tensor
    value: Tensor
    own: int

    def joined(self, own: KeyValue) -> KeyValue:
        """Set the actions' keys and values, and return all J; a copy under autograd, since a gradient needs the old ones."""
        if torch.is_grad_enabled():
            return KeyValue(self.key[:, :, : -self.own], self.value[:, :, : -self.own]).joined(own)
        self.key[:, :, -self.own :] = own.key
        self.value[:, :, -self.own :] = own.value
        return KeyValue(self.key, self.value)


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of the prefix for a suffix: one KeyValue per layer, and which prefix tokens are real.

    mask: [B, P]; length: [B], the position of the first suffix token. whole: known on the host: the mask is True everywhere.
    """

    layers: tuple[KeyValue, ...]
    mask: Bool[Tensor, "B P"]
    length: Int64[Tensor, " B"]
    whole: bool = False


class Modulations(NamedTuple):
    """Modulations of the action stream's adaptive norms at one flow time; layers: the norm before attention and the one before the MLP."""

    layers: tuple[tuple[Modulation, Modulation], ...]
    final: Modulation


@dataclass(frozen=True)
class ActionContext:
    """Inputs of action tokens from prefix and state, for every flow time of one batch of observations.

    layers: one KeyValueBuffer per layer. rotary: the rotary angles of the action tokens. bias: additive [B, 1, 1 or T, J], None when every
    token is real. chunks: number of chunks for each observation, in order; none of them sees another.
    """

    layers: tuple[KeyValueBuffer, ...]
    rotary: Rotation
    bias: Tensor | None
    chunks: int = 1
