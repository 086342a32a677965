"""LeRobot's PI0 or PI05 and ours with the same weights, and batches for both.

The correspondence of names is written out here once more, on purpose: it is an independent reading of interop.md, section 2.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import shrunk_pi05
import torch
from torch import Tensor

from pi0fm.bench.harness.peer import RobotFeatures
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.config import TINY, Pi0Config
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.sampling.sampler import arrange_matrices

# LeRobot insists on 8 query heads, and on gelu-tanh.
CONFIG = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(TINY.decoder, num_heads=8, head_dim=24, gelu="tanh", depth=3),
    vision=dataclasses.replace(TINY.vision, gelu="tanh", depth=2),
)
KINDS = ("pi0", "pi05")
CAMERAS = ("base", "wrist")
STREAMS = {"backbone": "paligemma.model.language_model", "action_expert": "gemma_expert.model"}
THEIRS = "model.paligemma_with_expert."
LINEARS = {
    "action_in": "model.action_in_proj",
    "action_out": "model.action_out_proj",
    "vision.projector": f"{THEIRS}paligemma.model.multi_modal_projector.linear",
}
OWN_LINEARS = {
    "pi0": {"state_in": "state_proj", "time_mlp_in": "action_time_mlp_in", "time_mlp_out": "action_time_mlp_out"},
    "pi05": {"time_mlp_in": "time_mlp_in", "time_mlp_out": "time_mlp_out"},
}


def config_of(kind: str, config: Pi0Config = CONFIG) -> Pi0Config:
    """`config`, which is a pi0's, as either kind."""
    return config if kind == "pi0" else dataclasses.replace(config, state_input="prompt", time_conditioning="adaptive_norm")


def unused(depth: int) -> list[str]:
    """LeRobot's parameters that no output depends on."""
    language = f"{THEIRS}paligemma.model.language_model."
    last = f"{language}layers.{depth - 1}."
    after_keys = ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    heads = (f"{THEIRS}paligemma.lm_head.weight", f"{THEIRS}gemma_expert.lm_head.weight", f"{language}norm.weight")
    return [*heads, *(f"{last}{name}.weight" for name in after_keys)]


def correspondence(config: Pi0Config) -> dict[str, list[str]]:
    """Our name -> their names, to be stacked along the first axis; the vision tower's are in `tower_correspondence`."""
    kind = "pi0" if config.state_input == "token" else "pi05"
    linears = LINEARS | {ours: f"model.{theirs}" for ours, theirs in OWN_LINEARS[kind].items()}
    names = {f"{ours}.{leaf}": [f"{theirs}.{leaf}"] for ours, theirs in linears.items() for leaf in ("weight", "bias")}
    names["prompt_embedding.weight"] = [f"{THEIRS}paligemma.model.language_model.embed_tokens.weight"]

    def norm(ours: str, theirs: str, adaptive: bool) -> None:
        if adaptive:
            names.update({f"{ours}.modulation.{leaf}": [f"{theirs}.dense.{leaf}"] for leaf in ("weight", "bias")})
        else:
            names[f"{ours}.scale"] = [f"{theirs}.weight"]

    norm("decoder.final_norm", f"{THEIRS}gemma_expert.model.norm", kind == "pi05")
    depth = config.decoder.depth
    for index in range(depth):
        for stream, place in STREAMS.items():
            ours, theirs = f"decoder.layers.{index}.{stream}.", f"{THEIRS}{place}.layers.{index}."
            adaptive = kind == "pi05" and stream == "action_expert"
            keys_only = stream == "backbone" and index == depth - 1
            norm(f"{ours}attention_norm", f"{theirs}input_layernorm", adaptive)
            names[f"{ours}qkv.weight"] = [f"{theirs}self_attn.{part}_proj.weight" for part in ("k" if keys_only else "qk") + "v"]
            if not keys_only:
                norm(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm", adaptive)
                names[f"{ours}out.weight"] = [f"{theirs}self_attn.o_proj.weight"]
                names[f"{ours}mlp.gate_up.weight"] = [f"{theirs}mlp.{part}_proj.weight" for part in ("gate", "up")]
                names[f"{ours}mlp.down.weight"] = [f"{theirs}mlp.down_proj.weight"]
    return names


def tower_correspondence(depth: int) -> dict[str, list[str]]:
    """The same for the vision tower."""
    tower = f"{THEIRS}paligemma.model.vision_tower.vision_model."
    names = {"vision.position_embedding": [f"{tower}embeddings.position_embedding.weight"]}
    for leaf in ("weight", "bias"):
        names[f"vision.patch_embedding.{leaf}"] = [f"{tower}embeddings.patch_embedding.{leaf}"]
        names[f"vision.final_norm.{leaf}"] = [f"{tower}post_layernorm.{leaf}"]
        for index in range(depth):
            ours, theirs = f"vision.layers.{index}.", f"{tower}encoder.layers.{index}."
            names[f"{ours}qkv.{leaf}"] = [f"{theirs}self_attn.{part}_proj.{leaf}" for part in "qkv"]
            pairs = {"attention_norm": "layer_norm1", "out": "self_attn.out_proj", "mlp_norm": "layer_norm2"}
            for one, other in (pairs | {name: name for name in ("mlp.fc1", "mlp.fc2")}).items():
                names[f"{ours}{one}.{leaf}"] = [f"{theirs}{other}.{leaf}"]
    return names


def translated(theirs: dict[str, Tensor], config: Pi0Config) -> dict[str, Tensor]:
    """Their tensors under our names; every one of theirs is used or known to be unused."""
    names = correspondence(config) | tower_correspondence(config.vision.depth)
    used = [name for group in names.values() for name in group]
    assert sorted([*used, *unused(config.decoder.depth)]) == sorted(theirs)
    return {ours: torch.cat([theirs[name] for name in group]) for ours, group in names.items()}


@dataclass(frozen=True)
class Batch:
    """What both networks are asked; t is LeRobot's, from data to noise."""

    observation: ModelObservation
    actions: Tensor
    noise: Tensor
    time: Tensor


def make_batch(config: Pi0Config, image_mask: list[list[bool]], lengths: list[int], seed: int) -> Batch:
    """Random pictures, words, states, actions, noise and times; a row of `image_mask` and a length for each sample."""
    random = torch.Generator().manual_seed(seed)
    count, size, longest = len(lengths), config.vision.image_size, config.max_prompt_tokens
    observation = ModelObservation(
        images=torch.randint(0, 256, (count, len(CAMERAS), size, size, 3), dtype=torch.uint8, generator=random),
        image_mask=torch.tensor(image_mask),
        prompt_tokens=torch.randint(3, config.vocab_size, (count, longest), generator=random),
        prompt_mask=torch.arange(longest) < torch.tensor(lengths)[:, None],
        state=torch.randn(count, config.state_dim, generator=random),
    )
    shape = (count, config.action_horizon, config.action_dim)
    actions, noise = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    return Batch(observation, actions, noise, torch.rand(count, generator=random))


@dataclass(frozen=True)
class Answers:
    """What one side says to one batch, float32; gradients by our names."""

    loss: Tensor
    velocity: Tensor
    sample: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """The two networks."""

    kind: str
    config: Pi0Config
    theirs: Any
    ours: Pi0

    def their_answers(self, batch: Batch, gradients: bool = True) -> Answers:
        """LeRobot's: its own forward, its own sampler."""
        model, seen = self.theirs.model, batch.observation
        given = [
            [pixels(seen.images[:, camera]) for camera in range(len(CAMERAS))],
            [seen.image_mask[:, camera] for camera in range(len(CAMERAS))],
            seen.prompt_tokens,
            seen.prompt_mask,
            *([seen.state] if self.kind == "pi0" else []),
        ]
        heads: list[Tensor] = []
        hook = model.action_out_proj.register_forward_hook(lambda _module, _inputs, output: heads.append(output.detach()))
        with torch.set_grad_enabled(gradients):
            loss = model.forward(*given, batch.actions, batch.noise, batch.time)
        hook.remove()
        found = {}
        if gradients:
            self.theirs.zero_grad()
            loss.mean().backward()
            # The embedding is tied in name only: state_dict lists what named_parameters lists.
            named = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in self.theirs.named_parameters()}
            found = {name: value.float() for name, value in translated(named, self.config).items()}
        with torch.no_grad():
            sample = model.sample_actions(*given, noise=batch.noise, num_steps=10)
        return Answers(loss.detach().float(), -heads[0].float(), sample.float(), found)  # its head points from data to noise

    def our_answers(self, batch: Batch, dtype: torch.dtype = torch.float32, trimmed: bool = True, gradients: bool = True) -> Answers:
        """Ours, as `pi0fm train` and `LocalPolicy` ask for them. trimmed: as the chain hands an observation over."""
        flow, t = FlowMatching.from_config(FlowConfig()), 1.0 - batch.time
        observation = batch.observation.trimmed() if trimmed else batch.observation
        pair = flow.training_pair(batch.actions, t, batch.noise)
        casts = {"device_type": "cpu", "dtype": dtype, "enabled": dtype != torch.float32}
        with torch.set_grad_enabled(gradients), torch.autocast(**casts):
            velocity = self.ours(observation, pair.x_t, t)
        loss = (velocity - pair.target).square()
        found = {}
        if gradients:
            self.ours.zero_grad()
            loss.mean().backward()
            found = {name: value.grad for name, value in self.ours.named_parameters()}
        sampler = self.ours
        if dtype != torch.float32:
            sampler = copy.deepcopy(self.ours).requires_grad_(False)
            arrange_matrices(sampler, dtype, torch.device("cpu"))
        with torch.inference_mode(), torch.autocast(**casts):
            sample = flow.sample(sampler.cached_velocity(observation), batch.noise, num_flow_steps=10, solver="euler")
        return Answers(loss.detach(), velocity.detach(), sample, found)

    def halved(self) -> "Pair":
        """LeRobot's side as its own dtype bfloat16 makes it; ours as it is, since autocast and `arrange_matrices` halve it."""
        theirs = copy.deepcopy(self.theirs)
        theirs.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
        return dataclasses.replace(self, theirs=theirs)


def make_pair(kind: str, config: Pi0Config, seed: int = 0) -> Pair:
    """Both networks with the same random weights, none of which is zero. config: a pi0's, whichever the kind."""
    lerobot_config = shrunk_pi05.make_config(kind, config, RobotFeatures(CAMERAS, config.state_dim, config.action_dim))
    theirs = shrunk_pi05.make_policy(kind, lerobot_config, config)
    _spread(theirs, seed)
    own = config_of(kind, config)
    ours = Pi0(own).eval()
    ours.load_state_dict(translated(theirs.state_dict(), own), strict=True)
    return Pair(kind, own, theirs, ours)


def _spread(policy: torch.nn.Module, seed: int) -> None:
    """Weights under which every token has a variance of about 1; LeRobot's constructors leave a network that hardly moves its noise."""
    torch.manual_seed(seed)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


def gradient_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of any parameter's gradient over its largest entry, and the parameter's name.

    Over 1 % of the largest of all where that is more: SigLIP's key biases have no gradient but rounding.
    """
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    worst = {
        name: float((found[name] - value).abs().max()) / max(float(value.abs().max()), 1e-2 * largest) for name, value in expected.items()
    }
    name = max(worst, key=lambda each: worst[each])
    return worst[name], name
