"""The networks and inputs on which pi0fm and LeRobot's PI0 are timed.

Owns: the sizes of each case, its observations, noise and batches, all functions of a seed, in the form of each side.
Does not know: LeRobot's library, clocks.

    case                           cameras   tokens a picture   prompt tokens     horizon   what it shows
    tiny                           1         36                 23 of 64          16        the quickstart's size: the cost of calls
    width_512                      3         256                18 of 48          50        both streams and the tower 512 wide
    width_512_one_camera_missing   2 of 3    256                18 of 48          50        what a masked camera costs
    pi0_proportions                3         256                18 of 48          50        half of pi0's widths, a third of its layers

LeRobot's code fixes 8 query heads and the tanh form of GELU, so every case has them. The vocabulary is ByT5's: a lookup in a larger one
costs the same, but memory that nothing here measures.
Shape letters: B batch, C cameras, K flow draws, H horizon, A action dim.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pi0fm.bench.peer_config import PI0_PROPORTIONS
from pi0fm.data.loading.batch import Batch
from pi0fm.models.joint_decoder import DecoderConfig, StreamConfig
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.pi0 import Pi0Config
from pi0fm.models.presets import PI0, TINY
from pi0fm.models.vision import VisionConfig

Prefix = tuple[list[Tensor], list[Tensor], Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One network and what it is shown.

    present: which cameras there are, in order; the others are masked. prompt_tokens: real ones, the rest of the width is padding.
    training_batch: observations in a training step.
    """

    name: str
    config: Pi0Config
    present: tuple[bool, ...]
    prompt_tokens: int
    training_batch: int


def case_named(name: str) -> Case:
    """The case of that name, one of peer_config's."""
    return {case.name: case for case in (_tiny(), _width_512(), _width_512_one_camera_missing(), _pi0_proportions())}[name]


def make_observation(case: Case, batch: int, seed: int) -> ModelObservation:
    """Pictures of random bytes (0 where a camera is missing, as the chain leaves it), random tokens and states; on the CPU."""
    random = torch.Generator().manual_seed(seed)
    config, size = case.config, case.config.vision.image_size
    present = torch.tensor(case.present)
    images = torch.randint(0, 256, (batch, len(present), size, size, 3), dtype=torch.uint8, generator=random)
    prompt = torch.arange(config.max_prompt_tokens) < case.prompt_tokens
    return ModelObservation(
        images=images * present[None, :, None, None, None],
        image_mask=present.repeat(batch, 1),
        prompt_tokens=torch.randint(3, config.vocab_size, (batch, config.max_prompt_tokens), generator=random) * prompt,
        prompt_mask=prompt.repeat(batch, 1),
        state=torch.randn(batch, config.state_dim, generator=random),
    )


def make_noise(case: Case, batch: int, seed: int) -> Tensor:
    """N(0, I), [B, H, A]; another stream of numbers than the observation's."""
    random = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, case.config.action_horizon, case.config.action_dim, generator=random)


def make_batch(case: Case, seed: int, flow_draws: int = 1) -> Batch:
    """`training_batch` observations with actions, `flow_draws` of noise and time each; every entry is real."""
    random = torch.Generator().manual_seed(seed + 2)
    count, horizon, width = case.training_batch, case.config.action_horizon, case.config.action_dim
    return Batch(
        observation=make_observation(case, count, seed),
        actions=torch.randn(count, horizon, width, generator=random),
        action_mask=torch.ones(count, horizon, width, dtype=torch.bool),
        noise=torch.randn(count, flow_draws, horizon, width, generator=random),
        uniform=torch.rand(count, flow_draws, generator=random),
    )


def their_prefix(observation: ModelObservation, device: torch.device) -> Prefix:
    """Pictures in [-1, 1], their masks, tokens and mask, as LeRobot's `predict_action_chunk` and `forward` hand them to its model."""
    seen = observation.to(device)
    cameras = range(seen.images.shape[1])
    pictures, masks = [pixels(seen.images[:, camera]) for camera in cameras], [seen.image_mask[:, camera] for camera in cameras]
    return pictures, masks, seen.prompt_tokens, seen.prompt_mask


def _tiny() -> Case:
    decoder = replace(TINY.decoder, num_heads=8, head_dim=24, gelu="tanh")
    config = replace(TINY, decoder=decoder, vision=replace(TINY.vision, gelu="tanh"))
    return Case("tiny", config, present=(True,), prompt_tokens=23, training_batch=8)


def _width_512() -> Case:
    stream = StreamConfig(width=512, mlp_width=2048)
    config = replace(
        PI0,
        vision=VisionConfig(width=512, depth=6, num_heads=8, mlp_width=2048, patch_size=14, image_size=224),
        decoder=DecoderConfig(stream, stream, depth=6, num_heads=8, num_kv_heads=1, head_dim=64),
        vocab_size=TINY.vocab_size,
    )
    return Case("width_512", config, present=(True, True, True), prompt_tokens=18, training_batch=2)


def _width_512_one_camera_missing() -> Case:
    return replace(_width_512(), name="width_512_one_camera_missing", present=(True, True, False))


def _pi0_proportions() -> Case:
    vision = VisionConfig(width=576, depth=9, num_heads=8, mlp_width=2152, patch_size=14, image_size=224)
    decoder = DecoderConfig(StreamConfig(1024, 8192), StreamConfig(512, 2048), depth=6, num_heads=8, num_kv_heads=1, head_dim=128)
    config = replace(PI0, vision=vision, decoder=decoder, vocab_size=TINY.vocab_size)
    return Case(PI0_PROPORTIONS, config, present=(True, True, True), prompt_tokens=18, training_batch=1)
