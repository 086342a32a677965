r"""Estimate of the device memory of a training step, before anything is trained.

Owns: the bytes of a run, part by part, and the sharding that fits. Does not know: the device's allocator, and its reserve.

    weights      4 a number; 2 for a frozen matrix under frozen_bfloat16
    moments      8 for each number that trains        average   4 for each, with ema_decay
    gradients    4 for each                           casts     bfloat16: the copies of float32 matrices, 2 a number, where a
                                                                gradient passes; with several micro batches kept for the step
    activations  tensors kept for the backward pass of one micro batch

The backward pass frees activations as it makes gradients. The highest of three moments counts; their sum where a step has several micro
batches, since gradients then persist through the next one's forward pass, and under DDP, whose buckets are always allocated:

    forward ends                    decoder's backward ends            tower's backward ends
    activations of both + casts     tower's activations + gradients    all gradients             plus the layer being computed

A sharded state (parallel/sharding.py) is divided by the workers that hold it: weights, moments, average and gradients alike. Besides it a
worker has

    gathered    weights in the type of the products: under `gradients` all of them, under `full` the rest and the three largest units:
                in use, being gathered, just copied; autocast copies only the rest
    reduced     the largest unit's whole gradient, as computed and in float32, and the next largest being reduced; under
                accumulate_whole all gradients, 4 bytes a number
    validation  outside a step: all averaged weights in float32

Kept for the backward pass, bytes for each token of one decoder layer (D width, M MLP width, N heads, k key heads, K head width, J keys
that it sees; c bytes of a product's result, r of the residual stream, s of a score):

    norms 2 D r, their results 2 D c | heads (2N + 3k) K c | scores N J s | attended N K c | MLP 3 M c
    adaptive norms: 2 D (4 + r) more in float32, and the 2 D c that their gates multiply; where each row has its flow time,
    2 D (4 + c) of modulations
    each row of the suffix also keeps the joined keys and values: 2 k J K c
    the last backbone layer: D (r + c) + 3 k K c

and of one layer of the vision tower: norms 2 D 4, their results 2 D c, heads 3 D c, scores, attended D c, MLP 2 M c. Scores are counted
as if attention were not fused; on a device that fuses it they are a reserve.

    activation_checkpointing   kept
      none                     the above for every layer, and once more for the largest while it is computed
      selective                of every layer norms, products' results (N + 4k) K c, 2 M c (tower M c); the largest layer while computed
      full                     the residual stream at every layer, and the largest layer twice: recomputed, and being computed

A frozen part that no gradient passes through keeps nothing: the tower under frozen_vision, all of the prefix under expert_only.
A test requires the estimate to be 1 to 1.4 times the allocations that torch counts. Shape letters: as above.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from pi0fm.models.config import Pi0Config
from pi0fm.models.parts import Part, part_of
from pi0fm.models.pi0 import Pi0
from pi0fm.train.components import AUTO, DDP, FULL, GRADIENTS, NONE, Adaptation, ParallelConfig
from pi0fm.train.parallel.sharding import REST, unit_of
from pi0fm.train.start.adaptation import adapt

GIB, MIB = 2**30, 2**20
SPARE = 0.1  # share of a device's memory left to its allocator


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker. `pass_`: peak of one forward and backward pass: activations, casts and gradients held at once.

    gathered, reduced: of a sharded state. validation: held by a validation besides the state.
    """

    weights: int
    moments: int
    average: int
    gradients: int
    activations: int
    casts: int
    pass_: int
    gathered: int = 0
    reduced: int = 0
    validation: int = 0

    @property
    def total(self) -> int:
        """Peak of a step, or of a validation."""
        return self.weights + self.moments + self.average + max(self.pass_, self.validation)

    def __str__(self) -> str:
        """Format the total and its parts in one line."""
        names = ("weights", "moments", "average", "gradients", "activations", "casts", "gathered", "reduced")
        unit, name = (GIB, "GiB") if self.total >= GIB else (MIB, "MiB")
        each = ", ".join(f"{part} {getattr(self, part) / unit:.1f}" for part in names if getattr(self, part) or part in names[:6])
        return f"memory of a worker: about {self.total / unit:.1f} {name} ({each}; not all at once)"


def estimate(
    config: Pi0Config,
    how: Adaptation,
    *,
    cameras: int,
    micro_batch: int,
    flow_draws: int = 1,
    by_row: bool = False,
    averaged: bool = True,
    accumulates: bool = False,
    validated: bool = False,
    computes: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    parallel: ParallelConfig = DDP,
    world_size: int = 1,
) -> MemoryEstimate:
    """Estimate the memory of one of `world_size` workers of a run, building the network on meta.

    accumulates: a step has several micro batches, so that gradients persist from the first to the last. computes: the type of the
    products. by_row: each row has its flow time (rtc.max_delay). device: cuda or cpu. parallel: `auto` counts as none.
    Raises ConfigError where `how` cannot be honoured by this network.
    """
    count = count_network(replace(config, action_horizon=1, max_prompt_tokens=1), how, computes)
    size = NumberBytes.on_device(computes == torch.bfloat16, device)
    tower, decoder, working = (
        micro_batch * each for each in _activations(config, how, count.gradient_parts, cameras, flow_draws, size, by_row)
    )
    kept = tower + decoder + working
    if not parallel.cuts:
        moments_of_the_pass = (tower + decoder + count.casts, tower + count.decoder_gradients, count.trained)
        together = accumulates or world_size > 1
        highest = tower + decoder + count.casts + count.trained if together else max(moments_of_the_pass)
        state = (count.weights, 2 * count.trained, count.trained * averaged, count.trained)
        return MemoryEstimate(*state, kept, count.casts, highest + working)
    each = parallel.workers_of_a_state(world_size)
    weights, trained = -(-count.weights // each), -(-count.trained // each)
    units = sorted((unit.gathered for name, unit in count.units.items() if name), reverse=True)
    reduced = sorted((unit.trained for unit in count.units.values()), reverse=True)
    gathered = count.units[REST].gathered + sum(units if parallel.shard == GRADIENTS else units[:3])
    leaving = (computes.itemsize + 4) * reduced[0] + 4 * reduced[1]
    if accumulates and parallel.accumulate_whole:
        leaving += count.trained
    casts = count.units[REST].casts
    highest = kept + casts + gathered + leaving + trained
    validation = 4 * sum(unit.numbers for unit in count.units.values()) * validated
    return MemoryEstimate(weights, 2 * trained, trained * averaged, trained, kept, casts, highest, gathered, leaving, validation)


def resolve_sharding(
    parallel: ParallelConfig, needed: Callable[[ParallelConfig], int], world_size: int, room: int
) -> tuple[ParallelConfig, str | None]:
    """Resolve `auto` to the first sharding whose memory fits the device's `room` bytes, else to the last; and the reason in one line.

    needed: bytes of a worker. Without `auto`, or with one worker, there is no decision and no line. Raises ConfigError where the workers
    do not fit the replicas.
    """
    parallel.refuse_for(world_size)
    if world_size == 1 or parallel.shard != AUTO:
        return DDP if parallel.shard == AUTO else parallel, None
    bytes_of: dict[str, int] = {}
    for shard in (NONE, GRADIENTS, FULL):
        chosen = DDP if shard == NONE else replace(parallel, shard=shard)
        bytes_of[shard] = needed(chosen)
        if bytes_of[shard] <= (1 - SPARE) * room:
            break
    each = ", ".join(f"{shard} needs {size / GIB:.1f}" for shard, size in bytes_of.items())
    return chosen, f"parallel.shard {shard}: {each} of the {room / GIB:.1f} GiB that a worker has"


@dataclass(frozen=True)
class NumberBytes:
    """Bytes of one number: of a product's result, of an attention score."""

    product: int
    score: int

    @classmethod
    def on_device(cls, halved: bool, device: str) -> "NumberBytes":
        """Return the bytes per number: a GPU's softmax returns float32 under bfloat16 too, and the product with the values needs a copy."""
        if not halved:
            return cls(4, 4)
        return cls(2, 6 if device == "cuda" else 2)


@dataclass
class ShardUnit:
    """Unit of sharding: its numbers, those that train; bytes of its gathered weights, and of autocast's copies."""

    numbers: int = 0
    trained: int = 0
    gathered: int = 0
    casts: int = 0


@dataclass(frozen=True)
class NetworkCount:
    """Bytes of a network: weights, gradients (all, and all without the tower's), autocast's copies; parts that gradients pass through."""

    weights: int
    trained: int
    decoder_gradients: int
    casts: int
    gradient_parts: frozenset[Part]
    units: Mapping[str, ShardUnit]


@lru_cache(maxsize=16)
def count_network(config: Pi0Config, how: Adaptation, computes: torch.dtype) -> NetworkCount:
    """Count the numbers of a network on meta. computes: the type of the products."""
    with torch.device("meta"):
        model = Pi0(config)
        adapt(model, how, computes)
    flowing = gradient_flows(model)
    weights = trained = of_decoder = casts = 0
    units: dict[str, ShardUnit] = defaultdict(ShardUnit)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        gradient = 4 * parameter.numel() * parameter.requires_grad
        weights += parameter.numel() * parameter.element_size()
        trained += gradient
        of_decoder += gradient * (part != "vision")
        multiplied = parameter.ndim == 2 and "embedding" not in name and parameter.dtype == torch.float32
        kept = parameter.requires_grad or (part in flowing and how.activation_checkpointing != "full")
        cast = 2 * parameter.numel() * (computes == torch.bfloat16 and multiplied and kept)
        casts += cast
        unit = units[unit_of(name)]
        unit.numbers += parameter.numel()
        unit.trained += gradient // 4
        unit.gathered += parameter.numel() * (parameter.element_size() if unit_of(name) == REST else computes.itemsize)
        unit.casts += cast
    return NetworkCount(weights, trained, of_decoder, casts, flowing, units)


def gradient_flows(model: Pi0) -> frozenset[Part]:
    """Return the parts whose outputs need a gradient: those that train, and all after them."""
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    behind: dict[Part, tuple[Part, ...]] = {"vision": ("vision", "backbone", "action_expert"), "backbone": ("backbone", "action_expert")}
    # projections are on both sides of the action expert
    flowing = {part for origin in trained for part in behind.get(origin, ("action_expert", "projections"))}
    return frozenset(flowing | {"projections"})


def _activations(
    config: Pi0Config, how: Adaptation, flowing: frozenset[Part], cameras: int, draws: int, size: NumberBytes, by_row: bool
) -> tuple[int, int, int]:
    """Return the bytes of one sample: kept by the tower, kept by the decoder, and of the largest layer while it is computed."""
    streams, vision = config.decoder, config.vision
    pictures = cameras * vision.tokens_per_image
    prefix = pictures + config.max_prompt_tokens
    suffix = config.action_horizon + (config.state_input == "token")
    tower = pictures * _vision_token(config, size)
    backbone = prefix * _decoder_token(config, "backbone", prefix, size)
    token = _decoder_token(config, "action_expert", prefix + suffix, size, by_row=by_row)
    expert = draws * (suffix * token + _joined(config, prefix + suffix, size))
    sees_tower, sees_prefix = "vision" in flowing, "backbone" in flowing
    images = 12 * cameras * vision.image_size**2
    if how.activation_checkpointing == "full":
        entering = draws * suffix * streams.action_expert.width * size.product + prefix * streams.backbone.width * 4 * sees_prefix
        kept_tower, kept_decoder = vision.depth * pictures * vision.width * 4 * sees_tower, streams.depth * entering
        return images + kept_tower, kept_decoder, 2 * max(tower, backbone + expert)
    last, working = prefix * _keys_only_token(config, size), max(tower, backbone + expert)
    if how.activation_checkpointing == "selective":
        tower = pictures * _vision_token(config, size, products_only=True)
        backbone = prefix * _decoder_token(config, "backbone", prefix, size, products_only=True)
        expert = draws * suffix * _decoder_token(config, "action_expert", prefix + suffix, size, products_only=True, by_row=by_row)
    kept_decoder = ((streams.depth - 1) * backbone + last) * sees_prefix + streams.depth * expert
    return images + vision.depth * tower * sees_tower, kept_decoder, working


def _decoder_token(
    config: Pi0Config, stream: str, keys: int, size: NumberBytes, *, products_only: bool = False, by_row: bool = False
) -> int:
    sizes, decoder, c = getattr(config.decoder, stream), config.decoder, size.product
    width, heads, kv = sizes.width, decoder.num_heads, decoder.num_kv_heads
    r = 4 if stream == "backbone" else c
    norms = 2 * width * (r + c)
    if stream == "action_expert" and config.time_conditioning == "adaptive_norm":
        norms += 2 * width * (4 + r + c) + by_row * 2 * width * (4 + c)
    if products_only:
        return norms + (heads + 4 * kv) * decoder.head_dim * c + 2 * sizes.mlp_width * c
    heads_bytes = (2 * heads + 3 * kv) * decoder.head_dim * c
    return norms + heads_bytes + heads * keys * size.score + heads * decoder.head_dim * c + 3 * sizes.mlp_width * c


def _keys_only_token(config: Pi0Config, size: NumberBytes) -> int:
    decoder = config.decoder
    return decoder.backbone.width * (4 + size.product) + 3 * decoder.num_kv_heads * decoder.head_dim * size.product


def _joined(config: Pi0Config, keys: int, size: NumberBytes) -> int:
    return 2 * config.decoder.num_kv_heads * keys * config.decoder.head_dim * size.product


def _vision_token(config: Pi0Config, size: NumberBytes, products_only: bool = False) -> int:
    vision, c = config.vision, size.product
    norms, heads = 2 * vision.width * (4 + c), 3 * vision.width * c
    if products_only:
        return norms + heads + vision.mlp_width * c
    return norms + heads + vision.num_heads * vision.tokens_per_image * size.score + vision.width * c + 2 * vision.mlp_width * c
