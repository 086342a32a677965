"""LeRobot's own PI0 and ours with the same weights: the same loss, velocity, samples and gradients, in float32.

The correspondence of names is written out here once more, on purpose: it is an independent reading of interop.md, section 2.
"""

import dataclasses

import pytest
import torch
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from torch import Tensor

from pi0fm.bench.lerobot_pi0 import RobotFeatures, ShrunkPI0, policy_config, same_size
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.pi0 import Pi0, Pi0Config, parameter_count
from pi0fm.models.presets import PI0, TINY

# LeRobot insists on 8 query heads, and on gelu-tanh.
CONFIG = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(TINY.decoder, num_heads=8, head_dim=24, gelu="tanh", depth=3),
    vision=dataclasses.replace(TINY.vision, gelu="tanh", depth=2),
)
BATCH, CAMERAS, STATE_DIM = 3, 2, 4
TOLERANCE = 1e-5
STREAMS = {"backbone": "paligemma.model.language_model", "action_expert": "gemma_expert.model"}
THEIRS = "model.paligemma_with_expert."
LINEARS = {
    "action_in": "model.action_in_proj",
    "action_out": "model.action_out_proj",
    "state_in": "model.state_proj",
    "time_mlp_in": "model.action_time_mlp_in",
    "time_mlp_out": "model.action_time_mlp_out",
    "vision.projector": f"{THEIRS}paligemma.model.multi_modal_projector.linear",
}


def unused(depth: int) -> list[str]:
    """LeRobot's parameters that no output depends on."""
    language = f"{THEIRS}paligemma.model.language_model."
    last = f"{language}layers.{depth - 1}."
    after_keys = ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    heads = (f"{THEIRS}paligemma.lm_head.weight", f"{THEIRS}gemma_expert.lm_head.weight", f"{language}norm.weight")
    return [*heads, *(f"{last}{name}.weight" for name in after_keys)]


def correspondence(config: Pi0Config) -> dict[str, list[str]]:
    """Our name -> their names, to be stacked along the first axis; the vision tower's names differ by their beginning only."""
    depth = config.decoder.depth
    names = {f"{ours}.{kind}": [f"{theirs}.{kind}"] for ours, theirs in LINEARS.items() for kind in ("weight", "bias")}
    names["prompt_embedding.weight"] = [f"{THEIRS}paligemma.model.language_model.embed_tokens.weight"]
    names["decoder.final_norm.scale"] = [f"{THEIRS}gemma_expert.model.norm.weight"]
    for index in range(depth):
        for stream, place in STREAMS.items():
            ours, theirs = f"decoder.layers.{index}.{stream}.", f"{THEIRS}{place}.layers.{index}."
            keys_only = stream == "backbone" and index == depth - 1
            names[f"{ours}attention_norm.scale"] = [f"{theirs}input_layernorm.weight"]
            names[f"{ours}qkv.weight"] = [f"{theirs}self_attn.{kind}_proj.weight" for kind in ("k" if keys_only else "qk") + "v"]
            if not keys_only:
                names[f"{ours}out.weight"] = [f"{theirs}self_attn.o_proj.weight"]
                names[f"{ours}mlp_norm.scale"] = [f"{theirs}post_attention_layernorm.weight"]
                names[f"{ours}mlp.gate_up.weight"] = [f"{theirs}mlp.{kind}_proj.weight" for kind in ("gate", "up")]
                names[f"{ours}mlp.down.weight"] = [f"{theirs}mlp.down_proj.weight"]
    return names


def translated(theirs: dict[str, Tensor], config: Pi0Config) -> dict[str, Tensor]:
    """Their tensors under our names; every one of theirs is used or known to be unused."""
    names, tower = correspondence(config), f"{THEIRS}paligemma.model.vision_tower."
    names |= {f"vision.tower.{name.removeprefix(tower)}": [name] for name in theirs if name.startswith(tower)}
    used = [name for group in names.values() for name in group]
    assert sorted([*used, *unused(config.decoder.depth)]) == sorted(theirs)
    return {ours: torch.cat([theirs[name] for name in group]) for ours, group in names.items()}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two networks and one batch; `pictures` and `masks` as LeRobot's forward takes them."""

    theirs: ShrunkPI0
    ours: Pi0
    observation: ModelObservation
    actions: Tensor
    noise: Tensor
    lerobot_time: Tensor

    @property
    def prefix(self) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        seen = self.observation
        pictures = [pixels(seen.images[:, camera]) for camera in range(CAMERAS)]
        return pictures, [seen.image_mask[:, camera] for camera in range(CAMERAS)], seen.prompt_tokens, seen.prompt_mask

    def their_loss(self) -> Tensor:
        """[B, H, A], not averaged."""
        return self.theirs.model.forward(*self.prefix, self.observation.state, self.actions, self.noise, self.lerobot_time)

    def our_pair(self) -> tuple[Tensor, Tensor]:
        """Our velocity and its target at the same point of the path; time runs the other way."""
        flow = FlowMatching.from_config(FlowConfig())
        t = 1.0 - self.lerobot_time
        pair = flow.training_pair(self.actions, t, self.noise)
        return self.ours(self.observation, pair.x_t, t), pair.target


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    theirs = ShrunkPI0(policy_config(same_size(CONFIG), RobotFeatures(("base", "wrist"), STATE_DIM, 8)), same_size(CONFIG)).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # norms and biases start at 0, where an error in them would not show
            torch.nn.init.normal_(parameter, std=0.2)
    ours = Pi0(CONFIG).eval()
    ours.load_state_dict(translated(theirs.state_dict(), CONFIG), strict=True)
    random = torch.Generator().manual_seed(1)
    size, length = CONFIG.vision.image_size, CONFIG.max_prompt_tokens
    observation = ModelObservation(
        images=torch.randint(0, 256, (BATCH, CAMERAS, size, size, 3), dtype=torch.uint8, generator=random),
        image_mask=torch.tensor([[True, True], [True, False], [True, True]]),
        prompt_tokens=torch.randint(3, CONFIG.vocab_size, (BATCH, length), generator=random),
        prompt_mask=torch.arange(length) < torch.tensor([20, length, 5])[:, None],
        state=torch.randn(BATCH, CONFIG.state_dim, generator=random),
    )
    shape = (BATCH, CONFIG.action_horizon, CONFIG.action_dim)
    actions, noise = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    return Pair(theirs, ours, observation, actions, noise, torch.tensor([0.05, 0.5, 0.98]))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """The largest difference over the largest entry."""
    assert expected.abs().max() > 0
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE


def test_loss(pair):
    with torch.no_grad():
        velocity, target = pair.our_pair()
        assert_near((velocity - target).square(), pair.their_loss())


def test_velocity_from_the_joint_pass_and_from_the_cache(pair):
    """LeRobot's head points from data to noise; its clock is 1 - t."""
    heads: list[Tensor] = []
    hook = pair.theirs.model.action_out_proj.register_forward_hook(lambda _module, _inputs, output: heads.append(output))
    with torch.no_grad():
        pair.their_loss()
        hook.remove()
        velocity, _ = pair.our_pair()
        assert_near(velocity, -heads[0])
        time = pair.lerobot_time[:, None, None]
        x_t = time * pair.noise + (1 - time) * pair.actions
        cache = pair.ours.encode_prefix(pair.observation)
        assert_near(pair.ours.velocity(cache, pair.observation.state, x_t, 1 - pair.lerobot_time), -heads[0])


def test_ten_step_sample(pair):
    state = pair.observation.state
    with torch.no_grad():
        expected = pair.theirs.model.sample_actions(*pair.prefix, state, noise=pair.noise, num_steps=10)
        cache = pair.ours.encode_prefix(pair.observation)
        flow = FlowMatching.from_config(FlowConfig())
        found = flow.sample(lambda x, t: pair.ours.velocity(cache, state, x, t), pair.noise, num_flow_steps=10, solver="euler")
    assert_near(found, expected)


def test_gradients(pair):
    pair.theirs.zero_grad()
    pair.ours.zero_grad()
    pair.their_loss().mean().backward()
    velocity, target = pair.our_pair()
    (velocity - target).square().mean().backward()
    theirs = {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in pair.theirs.named_parameters()}
    # The embedding is tied in name only: state_dict lists what named_parameters lists.
    expected = translated(theirs, CONFIG)
    found = {name: value.grad for name, value in pair.ours.named_parameters()}
    assert found.keys() == expected.keys()
    # Relative to the largest gradient of all: SigLIP's key biases have none but rounding.
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in found.items():
        assert float((value - expected[name]).abs().max()) < TOLERANCE * max(float(expected[name].abs().max()), 1e-2 * largest), name


def test_parameter_count_of_the_released_size_is_lerobots_but_for_what_is_dead():
    """LeRobot's own constructor, on the meta device, less the two lm_heads and what no output depends on."""
    config = policy_config(same_size(PI0), RobotFeatures(("base",), 32, 32))
    config.device = "meta"
    with torch.device("meta"):
        theirs, ours = PI0Policy(config), Pi0(PI0)
    left_out = set(unused(PI0.decoder.depth))
    counted = {name: parameter.numel() for name, parameter in theirs.named_parameters(remove_duplicate=False)}
    assert left_out <= counted.keys()
    assert parameter_count(ours) == sum(count for name, count in counted.items() if name not in left_out)
