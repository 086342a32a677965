"""Sizes of the networks and inputs for measurements.

Owns: the sizes of each case. Does not know: torch, how a network or an input is made (harness/cases).

    case                           cameras   tokens a picture   prompt tokens     horizon   purpose
    tiny                           1         36                 23 of 64          16        the quickstart's size: overhead of calls
    width_512                      3         256                18 of 48          50        both streams and the tower 512 wide
    width_512_one_camera_missing   2 of 3    256                18 of 48          50        cost of a masked camera
    pi0_proportions                3         256                18 of 48          50        half of pi0's widths, a third of its layers

LeRobot's code fixes 8 query heads and the tanh form of GELU, so every case has them. The vocabulary is ByT5's: a lookup in a larger one
takes as long, and its memory is not measured here.
"""

from dataclasses import dataclass, replace

from pi0fm.models.config import PI0, TINY, DecoderConfig, Pi0Config, StreamConfig, VisionConfig


@dataclass(frozen=True)
class Case:
    """A network and its inputs.

    present: by camera, False for a masked one. prompt_tokens: real tokens, the rest is padding. training_batch: observations in a
    training step.
    """

    config: Pi0Config
    present: tuple[bool, ...]
    prompt_tokens: int
    training_batch: int


TINY_8 = replace(TINY, decoder=replace(TINY.decoder, num_heads=8, head_dim=24, gelu="tanh"), vision=replace(TINY.vision, gelu="tanh"))
WIDTH_512 = replace(
    PI0,
    vision=VisionConfig(width=512, depth=6, num_heads=8, mlp_width=2048, patch_size=14, image_size=224),
    decoder=DecoderConfig(StreamConfig(512, 2048), StreamConfig(512, 2048), depth=6, num_heads=8, num_kv_heads=1, head_dim=64),
    vocab_size=TINY.vocab_size,
)
PROPORTIONS = replace(
    WIDTH_512,
    vision=VisionConfig(width=576, depth=9, num_heads=8, mlp_width=2152, patch_size=14, image_size=224),
    decoder=DecoderConfig(StreamConfig(1024, 8192), StreamConfig(512, 2048), depth=6, num_heads=8, num_kv_heads=1, head_dim=128),
)
CASES = {
    "tiny": Case(TINY_8, (True,), prompt_tokens=23, training_batch=8),
    "width_512": Case(WIDTH_512, (True, True, True), prompt_tokens=18, training_batch=2),
    "width_512_one_camera_missing": Case(WIDTH_512, (True, True, False), prompt_tokens=18, training_batch=2),
    "pi0_proportions": Case(PROPORTIONS, (True, True, True), prompt_tokens=18, training_batch=1),
}
PEER_CASES = tuple(CASES)[:3]  # those on which LeRobot's side is timed too
