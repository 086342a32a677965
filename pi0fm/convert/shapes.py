"""A network's sizes from the shapes of a checkpoint, and the checkpoint's parts that make each of our tensors.

Owns: the axes of convert/names' notation, the sizes, the list of mismatches. Does not know: files, types of numbers, robots.

    names and shapes --infer_sizes--> sizes --parts--> foreign parts of each of our tensors
                                       |--describe_mismatch--> every missing, unexpected and mis-shaped name
                                       '----network_config--> Pi0Config
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor

from pi0fm.convert.names import Kind, Layout, Row, dead_rows, table, unread_rows
from pi0fm.models.config import DecoderConfig, Pi0Config, StreamConfig, VisionConfig
from pi0fm.policy.saved import weights
from pi0fm_client.errors import BundleError

Shape = tuple[int, ...]
FIELDS = {
    "B": "decoder.backbone.width", "F": "decoder.backbone.mlp_width",
    "E": "decoder.action_expert.width", "G": "decoder.action_expert.mlp_width",
    "L": "decoder.depth", "N": "decoder.num_heads", "K": "decoder.num_kv_heads", "H": "decoder.head_dim",
    "W": "vocab_size", "A": "action_dim", "S": "state_dim",
    "D": "vision.width", "M": "vision.mlp_width", "T": "vision.depth", "X": "vision.num_heads", "P": "vision.patch_size",
}  # fmt: skip
LARGEST_SIZE = 2**24  # no axis of a policy is longer: a header with a larger size is damaged
LARGEST_DEPTH = 1024


@dataclass(frozen=True)
class ForeignPart:
    """A foreign tensor, or one entry of its leading axes, that becomes rows of one of ours.

    shape: of the whole foreign tensor. index: the entry of its leading axes. order: permutation of the remaining axes.
    """

    name: str
    shape: Shape
    index: Shape
    order: Shape

    def rows(self, tensor: Tensor, trailing: Shape) -> Tensor:
        """Return the rows [-1, *trailing] of this part from the whole foreign tensor; a view if no axes are permuted."""
        return tensor[self.index].permute(self.order).reshape(-1, *trailing)

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape[len(self.index) :])


def infer_sizes(layout: Layout, kind: Kind, shapes: Mapping[str, Shape], known: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes by letter of convert/names, each by a vote of all tensors; `known` holds given ones.

    Raises BundleError for a size that no tensor gives, or that is out of range.
    """
    sizes = dict(known)
    if layout == "torch":
        sizes |= {
            "L": _depth(shapes, r"\.(?:language_model|gemma_expert\.model)\.layers\.(\d+)\."),
            "T": _depth(shapes, r"\.encoder\.layers\.(\d+)\."),
        }
    rows = [row for group in table(layout, kind).values() for row in group]
    witnesses = [
        (axis, size)
        for row in rows
        for found in _matching(row.name, shapes)
        if len(found) == len(row.axes)
        for axis, size in zip(row.axes, found, strict=True)
    ]
    while votes := _votes(witnesses, sizes):
        sizes |= {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}
    silent = {letter for row in rows for axis in row.axes for letter in _letters(axis)} - sizes.keys()
    if silent:
        where = sorted({row.name for row in rows for axis in row.axes if silent & set(_letters(axis))})
        raise BundleError(
            f"the checkpoint must give its sizes {', '.join(sorted(silent))}, found no tensor that does among {', '.join(where)}; "
            "they are missing or mis-shaped, or --num_heads does not fit"
        )
    for letter, size in sizes.items():
        if not 0 < size <= (LARGEST_DEPTH if letter in "LT" else LARGEST_SIZE):
            raise BundleError(
                f"a size of the checkpoint is out of range: {letter} is {size}; the file is damaged, or the head count given does not fit"
            )
    return sizes


def parts(layout: Layout, kind: Kind, sizes: Mapping[str, int]) -> dict[str, tuple[ForeignPart, ...]]:
    """Return the foreign parts that are stacked into each tensor of the network."""
    found: dict[str, tuple[ForeignPart, ...]] = {}
    for ours, rows in table(layout, kind).items():
        for layer in _layers(ours, sizes):
            last = ".backbone." in ours and layer["layer"] == sizes["L"] - 1
            kept = rows[dead_rows(ours) :] if last else rows
            if kept:
                found[ours.format(**layer)] = tuple(_part(row, layer, sizes) for row in kept)
    return found


def unread_shapes(layout: Layout, kind: Kind, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Return name and shape of the tensors in a peer's file that no output depends on."""
    found = (_part(row, {"layer": sizes["L"] - 1}, sizes) for row in unread_rows(layout, kind))
    return {part.name: part.shape for part in found}


def describe_mismatch(layout: Layout, kind: Kind, sizes: Mapping[str, int], shapes: Mapping[str, Shape]) -> str:
    """Format every name that is missing, unknown or of another shape; empty if none is. Unread tensors may be absent."""
    read = {part.name: part.shape for group in parts(layout, kind, sizes).values() for part in group}
    return weights.describe_mismatch(shapes, read, unread_shapes(layout, kind, sizes))


def network_config(kind: Kind, sizes: Mapping[str, int], action_horizon: int, max_prompt_tokens: int) -> Pi0Config:
    """Return the network of these sizes. pi0.5 has no state projection: its state is as wide as the actions.

    Raises BundleError where the number of a picture's tokens is not a square.
    """
    side = math.isqrt(sizes["V"])
    if side * side != sizes["V"]:
        raise BundleError(f"a picture's tokens must fill a square, found {sizes['V']} positions; other pictures cannot be converted")
    return Pi0Config(
        vision=VisionConfig(sizes["D"], sizes["T"], sizes["X"], sizes["M"], sizes["P"], side * sizes["P"]),
        decoder=DecoderConfig(
            StreamConfig(sizes["B"], sizes["F"]), StreamConfig(sizes["E"], sizes["G"]), sizes["L"], sizes["N"], sizes["K"], sizes["H"]
        ),
        vocab_size=sizes["W"],
        max_prompt_tokens=max_prompt_tokens,
        action_dim=sizes["A"],
        state_dim=sizes.get("S", sizes["A"]),
        action_horizon=action_horizon,
        state_input="token" if kind == "pi0" else "prompt",
        time_conditioning="concatenate" if kind == "pi0" else "adaptive_norm",
    )


def sizes_of(config: Pi0Config) -> dict[str, int]:
    """Return a network's sizes by letter; the inverse of `network_config`."""
    vision = config.vision
    sizes = {letter: int(attrgetter(field)(config)) for letter, field in FIELDS.items()}
    return {**sizes, "Y": vision.width // vision.num_heads, "V": vision.tokens_per_image}


def _votes(witnesses: list[tuple[str, int]], sizes: Mapping[str, int]) -> dict[str, Counter[int]]:
    """Count, for each unknown letter, the sizes implied by axes in which no other letter is unknown."""
    votes: dict[str, Counter[int]] = {}
    for axis, size in witnesses:
        unknown = [letter for letter in _letters(axis) if letter not in sizes]
        rest = math.prod(sizes.get(factor, int(factor) if factor.isdigit() else 1) for factor in _factors(axis))
        if len(unknown) == 1 and rest and size % rest == 0:
            votes.setdefault(unknown[0], Counter())[size // rest] += 1
    return votes


def _matching(name: str, shapes: Mapping[str, Shape]) -> list[Shape]:
    if "{" not in name:  # most names: a lookup, not a search
        return [shapes[name]] if name in shapes else []
    pattern = re.compile(re.sub(r"\\{\w+\\}", r"\\d+", re.escape(name)))
    return [shape for found, shape in shapes.items() if pattern.fullmatch(found)]


def _depth(shapes: Mapping[str, Shape], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in shapes if (found := re.search(pattern, name))), default=-1)


def _layers(ours: str, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    for word, depth in (("layer", "L"), ("block", "T")):
        if f"{{{word}}}" in ours:
            return [{word: index} for index in range(sizes[depth])]
    return [{}]


def _part(row: Row, layer: Mapping[str, int], sizes: Mapping[str, int]) -> ForeignPart:
    picks = [axis for axis in row.axes if "/" in axis]
    remaining = row.axes[len(picks) :]
    index = tuple(layer[word] if (word := axis.split("/")[0]) in layer else int(word) for axis in picks)
    order = tuple(remaining.index(axis) for axis in row.permuted or remaining)
    return ForeignPart(row.name.format(**layer), tuple(_size(axis, sizes) for axis in row.axes), index, order)


def _factors(axis: str) -> list[str]:
    """Split `layer/L` to L, `B'` to B, `3*E` to 3, E."""
    return axis.rsplit("/", 1)[-1].rstrip("'").split("*")


def _letters(axis: str) -> list[str]:
    return [factor for factor in _factors(axis) if not factor.isdigit()]


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    return math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in _factors(axis))
