"""Dual-stream decoder: a vision-language stream and an action stream under one softmax.

Owns: the layer, its attention mask. Does not know: what a token stands for, flow time, images.
A stream that is absent is None, so that one `forward` encodes the prefix, decodes a suffix against the cache, and does both in training:

    prefix  suffix  cache          what it is
    given   None    None      ->   encode the prefix, return the cache
    None    given   given     ->   one evaluation of the velocity
    given   given   None      ->   training: the same two computations in one pass

The values kept between the evaluations of a sampler are in prefix_cache.py.

Attention (rows are queries, columns are keys). The prefix never sees the suffix, so its cache is valid for every flow time:

                 prefix   state   actions
      prefix       x        .        .
      state        x        x        .
      actions      x        x        x

Shape letters: B batch, P prefix tokens, Q suffix tokens, T tokens of one stream, D width, N heads, K head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pi0fm.models.attention import additive, attend
from pi0fm.models.config import DecoderConfig, StreamConfig
from pi0fm.models.layers import (
    AdaptiveRMSNorm,
    GatedMLP,
    Linear,
    Modulation,
    RMSNorm,
    Rotation,
    added_product,
    at_least_float32,
    by_kernels,
    product_dtype,
    recomputed,
    recomputes,
    rotate,
    rotate_,
    rotation,
    run_layer,
    writes,
)
from pi0fm.models.prefix_cache import ActionContext, KeyValue, KeyValueBuffer, Modulations, PrefixCache, seen_after, with_space

LayerCondition = Tensor | tuple[Modulation, Modulation] | None
"""For adaptive norms: the flow time's condition [B, D], or [B, T, D], or a layer's two modulations made of it; None for plain norms."""


class StreamInput(NamedTuple):
    """Input of one stream to a layer.

    tokens: [B, T, D]; rotation: of the tokens' positions; mask: additive, of all keys that the stream sees, [B, 1, 1 or T, J], None when
    every key is real.
    """

    tokens: Tensor
    rotation: Rotation
    mask: Tensor | None


class Stream(nn.Module):
    """Parameters of one stream in one layer: norms, projections, MLP.

    keys_only: the last backbone layer. Only its k and v are read, so it has no other parameters.
    """

    def __init__(self, config: DecoderConfig, stream: StreamConfig, condition_width: int | None, keys_only: bool = False) -> None:
        super().__init__()
        self.recompute, self.num_heads = False, 0 if keys_only else config.num_heads
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim

        def norm() -> nn.Module:
            if condition_width is None:
                return RMSNorm(stream.width, for_products=True)
            return AdaptiveRMSNorm(stream.width, condition_width, for_products=True)

        self.attention_norm = norm()
        self.qkv = Linear(stream.width, (self.num_heads + 2 * config.num_kv_heads) * config.head_dim, bias=False)
        if not keys_only:
            self.out = Linear(config.num_heads * config.head_dim, stream.width, bias=False)
            self.mlp_norm = norm()
            self.mlp = GatedMLP(stream.width, stream.mlp_width, config.gelu)

    def forward(self, given: StreamInput, before: KeyValue | KeyValueBuffer | None, condition: LayerCondition) -> tuple[Tensor, KeyValue]:
        """Compute the tokens after this layer, unchanged where only keys are made, and all keys and values that they saw.

        before: keys and values of the tokens before these. condition: of adaptive norms.
        """
        of_attention, of_mlp = condition if isinstance(condition, tuple) else (condition, condition)
        normed, gate = self.attention_norm(given.tokens, of_attention)
        operands = (self.qkv(normed), given.rotation, before, given.mask)
        attended, seen = recomputed(self._attention, *operands) if self.recompute and recomputes(self) else self._attention(*operands)
        if attended is None:
            return given.tokens, seen
        once = by_kernels(self, given.tokens)
        x = residual(given.tokens, attended, gate, once)
        normed, gate = self.mlp_norm(x, of_mlp)
        return residual(x, self.mlp(normed), gate, once), seen

    def _attention(
        self, qkv: Tensor, rotary: Rotation, before: KeyValue | KeyValueBuffer | None, mask: Tensor | None
    ) -> tuple[Tensor | None, KeyValue]:
        """Attention's addition to the residual stream, None where only keys are made, and the keys and values that were seen."""
        (batch, tokens, _), num_heads, kv = qkv.shape, self.num_heads, self.num_kv_heads
        heads = qkv.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        if writes(qkv):  # rotated in place, so that a layer's keys and values are one view
            rotate_(heads.narrow(1, 0, num_heads + kv), rotary)
            query, own = heads.split_with_sizes((num_heads, 2 * kv), 1)
            seen = seen_after(before, own.view(batch, 2, kv, tokens, self.head_dim))
        else:
            turning, value = heads.split((num_heads + kv, kv), dim=1)
            query, key = rotate(turning, rotary).split((num_heads, kv), dim=1)
            seen = KeyValue(key, value) if before is None else before.joined(KeyValue(key, value))
        if not self.num_heads:
            return None, seen
        return self.out(attend(query, seen.key, seen.value, mask).transpose(1, 2).flatten(2)), seen


class JointDecoderLayer(nn.Module):
    """One layer of both streams: the unit of sharding, of activation checkpointing and of compilation."""

    def __init__(self, config: DecoderConfig, condition_width: int | None, last: bool) -> None:
        super().__init__()
        self.backbone = Stream(config, config.backbone, None, keys_only=last)
        self.action_expert = Stream(config, config.action_expert, condition_width)

    def forward(
        self,
        prefix: StreamInput | None = None,
        suffix: StreamInput | None = None,
        cached: KeyValue | KeyValueBuffer | None = None,
        condition: LayerCondition = None,
    ) -> tuple[Tensor | None, Tensor | None, KeyValue]:
        """Compute the tokens of both streams after this layer, and the keys and values that the last stream saw.

        cached: replaces an absent prefix. condition: of the suffix's adaptive norms. Raises ValueError without either prefix.
        """
        after_prefix = after_suffix = None
        if prefix is not None:
            after_prefix, cached = self.backbone(prefix, None, None)
        if cached is None:
            raise ValueError("a layer needs either a prefix or its cache")
        if suffix is not None:
            after_suffix, cached = self.action_expert(suffix, cached, condition)
        assert isinstance(cached, KeyValue)
        return after_prefix, after_suffix, cached

    def modulations(self, condition: Float[Tensor, "*n D"]) -> tuple[Modulation, Modulation]:
        """Modulations of the action stream's two adaptive norms at one flow time."""
        before_attention, before_mlp = self.action_expert.attention_norm, self.action_expert.mlp_norm
        assert isinstance(before_attention, AdaptiveRMSNorm) and isinstance(before_mlp, AdaptiveRMSNorm)
        return before_attention.modulate(condition), before_mlp.modulate(condition)


class JointDecoder(nn.Module):
    """All layers and the final norm of the action stream."""

    def __init__(self, config: DecoderConfig, condition_width: int | None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.activation_checkpointing = False
        self.layers = nn.ModuleList(
            JointDecoderLayer(config, condition_width, last=index == config.depth - 1) for index in range(config.depth)
        )
        width = config.action_expert.width
        self.final_norm: nn.Module = RMSNorm(width) if condition_width is None else AdaptiveRMSNorm(width, condition_width)

    def encode(self, prefix: Float[Tensor, "B P D"], mask: Bool[Tensor, "B P"], whole: bool = False) -> PrefixCache:
        """Run the prefix alone. whole: the mask is known to be True everywhere, and none is added."""
        whole = whole or _is_whole(mask)
        _, layers = self._run(prefix, mask, None, 0, None, None, whole)
        return PrefixCache(layers, mask, mask.sum(dim=1), whole)

    def decode(
        self, suffix: Float[Tensor, "B Q D"], cache: PrefixCache, num_state_tokens: int, condition: Tensor | None
    ) -> Float[Tensor, "B Q D"]:
        """Run a suffix against a cached prefix; its first `num_state_tokens` do not see the rest."""
        out, _ = self._run(None, cache.mask, suffix, num_state_tokens, cache.layers, condition, cache.whole)
        assert out is not None
        return out

    def context(self, cache: PrefixCache, state: Float[Tensor, "B Z D"] | None, num_actions: int, chunks: int = 1) -> ActionContext:
        """Precompute the inputs of `decode_actions`. The state's tokens see the prefix and themselves, so no flow time changes them.

        chunks: number for each observation. They share its keys and values without a copy, and none sees another:

                          prefix, state   chunk 0   chunk 1
            chunk 0             x            x         .
            chunk 1             x            .         x
        """
        mask, space = cache.mask, chunks * num_actions
        if state is None:
            (buffers,) = with_space(cache.layers, space)
        else:
            places, buffers = with_space(cache.layers, state.shape[1], space)
            _, layers = self._run(None, mask, state, state.shape[1], places, None, cache.whole)
            if torch.is_grad_enabled():  # the state's keys and values have not been written, since a gradient may need the old ones
                (buffers,) = with_space(layers, space)
            mask = torch.cat((mask, mask.new_ones(len(mask), state.shape[1])), dim=1)
        steps = torch.arange(num_actions, device=mask.device).repeat(chunks)
        rotary = rotation(mask.sum(dim=1)[:, None] + steps, self.head_dim)
        if chunks == 1 and cache.whole:
            return ActionContext(buffers, rotary, None)
        chunk = torch.arange(chunks, device=mask.device).repeat_interleave(num_actions)
        own = mask.new_ones(1, num_actions) if chunks == 1 else chunk[:, None] == chunk
        seen = torch.cat((mask[:, None].expand(-1, len(own), -1), own.expand(len(mask), -1, -1)), dim=2)[:, None]
        return ActionContext(buffers, rotary, additive(seen, buffers[0].own.dtype), chunks)

    def modulations(self, condition: Float[Tensor, "*n D"]) -> Modulations:
        """Modulations of the action stream's adaptive norms at one flow time; a third of what a step of pi0.5 reads from memory."""
        layers = tuple(layer.modulations(condition) for layer in self.layers if isinstance(layer, JointDecoderLayer))
        assert isinstance(self.final_norm, AdaptiveRMSNorm)
        return Modulations(layers, self.final_norm.modulate(condition))

    def decode_actions(
        self, actions: Float[Tensor, "BN H D"], context: ActionContext, condition: Tensor | Modulations | None
    ) -> Float[Tensor, "BN H D"]:
        """Decode action tokens through all layers: the actions' rows of `decode` of state and actions.

        actions: `context.chunks` rows for each observation, in its order; with several, `condition` is of one flow time for all.
        """
        tokens = self._stream(joined_chunks(actions, context.chunks))
        modulations = condition if isinstance(condition, Modulations) else None
        for index, (layer, buffer) in enumerate(zip(self.layers, context.layers, strict=True)):
            of_layer = modulations.layers[index] if modulations else condition
            suffix = StreamInput(tokens, context.rotary, context.bias)
            _, tokens, _ = layer(suffix=suffix, cached=buffer, condition=of_layer)
        return self.final_norm(tokens, modulations.final if modulations else condition)[0].view(actions.shape)

    def forward(
        self,
        prefix: Float[Tensor, "B P D"],
        mask: Bool[Tensor, "B P"],
        suffix: Float[Tensor, "BK Q E"],
        num_state_tokens: int,
        condition: Tensor | None,
    ) -> Float[Tensor, "BK Q E"]:
        """Run both streams in one pass, layer by layer, for training. The suffix may hold K rows for each prefix row, in its order."""
        out, _ = self._run(prefix, mask, suffix, num_state_tokens, None, condition)
        assert out is not None
        return out

    def _run(
        self,
        prefix: Tensor | None,
        mask: Tensor,
        suffix: Tensor | None,
        num_state_tokens: int,
        before: Sequence[KeyValue | KeyValueBuffer] | None,
        condition: Tensor | None,
        whole: bool = False,
    ) -> tuple[Tensor | None, tuple[KeyValue, ...]]:
        """Run all layers: the suffix after the final norm, and the keys and values that were seen in each layer.

        before: keys and values of an absent prefix. whole: the prefix's mask is known to be True everywhere.
        """
        if prefix is not None:
            prefix_rotation = rotation(mask.long().cumsum(dim=1) - 1, self.head_dim)  # padding and missing cameras take no position
            prefix_mask = None if whole else additive(mask[:, None, None], product_dtype(prefix))
        if suffix is not None:
            suffix, draws = self._stream(suffix), suffix.shape[0] // mask.shape[0]
            steps = torch.arange(suffix.shape[1], device=suffix.device)
            suffix_rotation = rotation(mask.sum(dim=1).repeat_interleave(draws)[:, None] + steps, self.head_dim)
            suffix_mask = None
            if not whole or 0 < num_state_tokens < suffix.shape[1]:
                seen = suffix_attention_mask(mask.repeat_interleave(draws, dim=0), suffix.shape[1], num_state_tokens)
                suffix_mask = additive(seen, product_dtype(suffix))
        layers: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            inputs = (
                None if prefix is None else StreamInput(prefix, prefix_rotation, prefix_mask),
                None if suffix is None else StreamInput(suffix, suffix_rotation, suffix_mask),
                before[index] if before else None,
                condition,
            )
            prefix, suffix, seen = run_layer(layer, self.activation_checkpointing, *inputs)
            layers.append(seen)
        if suffix is not None:
            suffix, _ = self.final_norm(suffix, condition)
        return suffix, tuple(layers)

    def _stream(self, tokens: Tensor) -> Tensor:
        """Residual stream from the action tokens on: float32 where a norm's kernel would have to cast it in each layer."""
        return at_least_float32(tokens) if by_kernels(self, tokens) else tokens


def _is_whole(mask: Tensor) -> bool:
    """Whether no mask need be added; False unless on a CPU and outside a compiler, where reading the mask is free."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def suffix_attention_mask(prefix_mask: Bool[Tensor, "B P"], num_tokens: int, num_state_tokens: int) -> Bool[Tensor, "B 1 Q P+Q"]:
    """Mask of the two lower rows of the drawing above: True where the column may be seen."""
    own = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=prefix_mask.device)
    own[:num_state_tokens, num_state_tokens:] = False
    batch = prefix_mask.shape[0]
    return torch.cat((prefix_mask[:, None].expand(batch, num_tokens, -1), own.expand(batch, -1, -1)), dim=2)[:, None]


def joined_chunks(actions: Float[Tensor, "BN H D"], chunks: int) -> Float[Tensor, "B NH D"]:
    """Concatenate the chunks of each observation."""
    return actions if chunks == 1 else actions.unflatten(0, (-1, chunks)).flatten(1, 2)


def residual(x: Tensor, y: Tensor, gate: Tensor | None, once: bool = False) -> Tensor:
    """Add y to x, times the gate under an adaptive norm; once: in one operation, with one rounding."""
    if gate is None:
        return x + y
    return added_product(x, y, gate, x.dtype) if once else x + gate * y
