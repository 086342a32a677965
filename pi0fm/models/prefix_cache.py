"""Values that a sampler keeps between its evaluations of the velocity, since none of them changes them.

Owns: keys and values of the prefix, with space for the actions' after them; modulations of adaptive norms by flow time. Does not know:
how they are computed.

    prefix keys and values | state's keys and values | space for the actions', written by every evaluation

Shape letters: B batch, P prefix tokens, J keys that the actions see, D width, K head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pi0fm.models.layers import Modulation, Rotation


class KeyValue(NamedTuple):
    """Rotated keys and values in one layer, each [B, kv heads, J, K]; both: [B, 2, kv heads, J, K], if they are views of one tensor."""

    key: Tensor
    value: Tensor
    both: Tensor | None = None

    def joined(self, own: "KeyValue") -> "KeyValue":
        """Append the suffix's keys and values; the suffix may hold several rows, in order, for each row of these."""
        times = own.key.shape[0] // self.key.shape[0]
        seen = self if times == 1 else KeyValue(self.key.repeat_interleave(times, dim=0), self.value.repeat_interleave(times, dim=0))
        return KeyValue(torch.cat((seen.key, own.key), dim=2), torch.cat((seen.value, own.value), dim=2))


@dataclass(frozen=True)
class KeyValueBuffer:
    """Keys and values of all that some tokens see; own: view [B, 2, kv heads, T, K] of the tokens' own, the last of them.

    The tokens overwrite their own in place.
    """

    seen: KeyValue
    own: Tensor

    def joined(self, own: KeyValue) -> KeyValue:
        """Set the tokens' keys and values, and return all J; a copy under autograd, since a gradient needs the old ones."""
        if torch.is_grad_enabled():
            before = self.seen.key.shape[2] - self.own.shape[3]
            return KeyValue(self.seen.key[:, :, :before], self.seen.value[:, :, :before]).joined(own)
        return self.written(torch.stack((own.key, own.value), dim=1))

    def written(self, own: Tensor) -> KeyValue:
        """As `joined` without gradient: own as in this class."""
        self.own.copy_(own)
        return self.seen


def seen_after(before: KeyValue | KeyValueBuffer | None, own: Tensor) -> KeyValue:
    """Join the tokens' keys and values [B, 2, kv heads, T, K] to those of the tokens before them, without gradient."""
    if isinstance(before, KeyValueBuffer):
        return before.written(own)
    made = KeyValue(own.select(1, 0), own.select(1, 1), own)
    return made if before is None else before.joined(made)


def with_space(layers: Sequence[KeyValue], *lengths: int) -> tuple[tuple[KeyValueBuffer, ...], ...]:
    """Copy the layers, with space after them for successive runs of tokens; for each run, the layers' buffers that end with it."""
    batch, heads, tokens, head_dim = layers[0].key.shape
    space = layers[0].key.new_empty(len(layers), 2, batch, heads, tokens + sum(lengths), head_dim)
    for layer, place in zip(layers, space[..., :tokens, :].transpose(1, 2), strict=True):
        place.copy_(torch.stack((layer.key, layer.value), dim=1) if layer.both is None else layer.both)
    runs, first = [], tokens
    for length in lengths:
        last = first + length
        seen, own = space[..., :last, :], space[..., first:last, :].transpose(1, 2)
        runs.append(tuple(KeyValueBuffer(KeyValue(key, value), place) for (key, value), place in zip(seen, own, strict=True)))
        first = last
    return tuple(runs)


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
