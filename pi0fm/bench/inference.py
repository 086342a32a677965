"""Ten Euler steps for one observation: LeRobot's PI0 against ours, in one process, with the same weights and noise.

Owns: what lies within the two clocks, the two modes, the bounds within which the chunks must agree. Does not know: the table.

    inside both clocks     pictures, prompt and state to keys and values once; ten velocities; the chunk, normalised
    only inside ours       masked cameras and unused prompt columns left out, pictures from uint8 to [-1, 1]
    inside neither         resizing, tokenizing, normalising, drawing noise, actions to robot units

LeRobot's side is `PI0Pytorch.sample_actions` with the arguments that its `predict_action_chunk` passes on; ours is what `LocalPolicy` does
with an observation that its chain has made. Both are eager, unless ours is told to compile.

    like_for_like   float32 on both sides, torch's default for products, the same threads
    as_shipped      LeRobot's configuration on a CPU is float32; `pi0fm.load` takes bfloat16 for the towers' matrices where the processor
                    multiplies it in hardware, and float32 elsewhere
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi0fm import progress
from pi0fm.bench.paired import paired_ratio
from pi0fm.bench.peer_cases import case_named, make_noise, make_observation, their_prefix
from pi0fm.bench.peer_config import MODES, InferenceConfig
from pi0fm.bench.peer_pair import PeerPair, build_pair, check_alike, displacement_difference
from pi0fm.bench.peer_report import Speed, summary
from pi0fm.bench.products import Roofline, bare, measure_roofline, products_of, synchronized, work_of
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.device import choose_device, inference_dtype
from pi0fm.policy.sampler import Sampler

FLOW_STEPS = 10
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of `displacement_difference`, by the type of our matrices. bfloat16 keeps 8 bits, and ten steps through some ten layers add up."""


def compare_inference(config: InferenceConfig) -> dict[str, Any]:
    """Both modes of every case. Raises Pi0fmError when the two sides differ, ConfigError for a device that is not there."""
    device = choose_device(config.device)
    torch.set_num_threads(config.threads)
    roofline = measure_roofline(device, BOUNDS)
    rows: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in MODES}
    with progress.step("calls compared", len(config.cases) * len(MODES)) as bar:
        for name in config.cases:
            pair = build_pair(case_named(name), config.seed, device)
            for mode in MODES:
                rows[mode][name] = _measured(pair, mode, config, device, roofline)
                bar.advance(1, f"{name} {mode}")
    return summary(rows, roofline)


@dataclass(frozen=True)
class OurCall:
    """A call of ours: one chunk [B, H, A] from `observation`, which lies on the host as the chain leaves it."""

    sampler: Sampler
    observation: ModelObservation
    noise: Tensor

    def __call__(self) -> Tensor:
        """The chunk."""
        return self.sampler(self.observation.trimmed(), self.noise, torch.ones_like(self.noise, dtype=torch.bool))


def our_sampler(model: Pi0, observation: ModelObservation, noise: Tensor, dtype: torch.dtype, compile: str = "off") -> OurCall:
    """On a copy of the model. dtype: of the matrices. compile: a word of `policy.sampler.COMPILE`."""
    flow = FlowMatching.from_config(FlowConfig(solver="euler", num_flow_steps=FLOW_STEPS))
    return OurCall(Sampler(copy.deepcopy(model), flow, noise.device, dtype, compile), observation, noise)


def their_sampler(pair: PeerPair, observation: ModelObservation, noise: Tensor) -> Callable[[], Tensor]:
    """A call of LeRobot's, on tensors that are on the device."""
    model, prefix, state = pair.theirs.eval().model, their_prefix(observation, noise.device), observation.state.to(noise.device)

    def theirs() -> Tensor:
        return model.sample_actions(*prefix, state, noise=noise, num_steps=FLOW_STEPS)

    return theirs


def _measured(pair: PeerPair, mode: str, config: InferenceConfig, device: torch.device, roofline: Roofline) -> dict[str, Any]:
    observation, noise = make_observation(pair.case, 1, config.seed), make_noise(pair.case, 1, config.seed).to(device)
    dtype = torch.float32 if mode == MODES[0] else inference_dtype("auto", device, pair.ours.config.decoder.backbone.width)
    ours, theirs = our_sampler(pair.ours, observation, noise, dtype, config.compile), their_sampler(pair, observation, noise)
    difference = displacement_difference(ours(), theirs(), noise)
    check_alike(pair.case.name, mode, "action chunks", difference, BOUNDS[dtype])
    # what compiled kernels multiply cannot be seen from outside; it is what the same network multiplies uncompiled
    plain = ours if config.compile == "off" else our_sampler(pair.ours, observation, noise, dtype)
    products = products_of(plain, plain.sampler.model.parameters())
    our_call, their_call, bare_call = (synchronized(call, device) for call in (ours, theirs, bare(products)))
    return Speed(
        peer=paired_ratio(their_call, our_call, config.rounds),
        products=paired_ratio(our_call, bare_call, config.rounds),
        difference=difference,
        bound=BOUNDS[dtype],
        work=work_of(products),
        peer_flops=work_of(products_of(theirs, pair.theirs.parameters())).total_flops,
    ).row(roofline)
