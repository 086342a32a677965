"""LeRobot's PI0 at a small size: what is theirs stays theirs, and ours is built as theirs is."""

import dataclasses
from functools import partial

import pytest
import torch
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch
from transformers import ByT5Tokenizer

from pi0fm.bench import lerobot_pi0
from pi0fm.bench.lerobot_pi0 import PromptTokenizer, RobotFeatures, ShrunkPI0, ShrunkSize, image_key, policy_config, processors, same_size
from pi0fm.models.presets import PI0, PI05, TINY
from pi0fm_client.errors import ConfigError, DatasetError

SMALL = ShrunkSize(
    vision_width=32, vision_depth=1, vision_heads=2, vision_mlp=32, patch_size=12, image_size=24, width=32, mlp=48, expert_width=16,
    expert_mlp=32, depth=2, head_dim=4, prompt_tokens=16, action_dim=6, state_dim=5, action_horizon=4,
)  # fmt: skip
ROBOT = RobotFeatures(cameras=("front",), state_dim=4, action_dim=3)
STATS = {
    "observation.state": {"mean": torch.tensor([1.0, 0, 0, 0]), "std": torch.full((4,), 2.0)},
    "action": {"mean": torch.tensor([0.5, 0, -1]), "std": torch.tensor([1.0, 2, 4])},
}


def make_policy(size: ShrunkSize = SMALL) -> ShrunkPI0:
    torch.manual_seed(0)
    return ShrunkPI0(policy_config(size, ROBOT), size)


def raw_batch(count: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        image_key("front"): torch.rand(count, 3, 24, 24, generator=generator),
        "observation.state": torch.randn(count, 4, generator=generator),
        "action": torch.randn(count, 4, 3, generator=generator),
        "action_is_pad": torch.zeros(count, 4, dtype=torch.bool),
        "task": ["press"] * count,
    }


def test_only_constructors_are_ours():
    for ours, theirs in (
        (ShrunkPI0, PI0Policy),
        (lerobot_pi0._ShrunkCore, PI0Pytorch),
        (lerobot_pi0._ShrunkStreams, PaliGemmaWithExpertModel),
    ):
        own = {name for name, value in vars(ours).items() if callable(value) or isinstance(value, (classmethod, staticmethod, property))}
        assert own == {"__init__"}, own
        assert ours.forward is theirs.forward


def test_parameters_have_the_names_and_attributes_of_lerobots_own_constructor():
    """At the released size, the one that LeRobot's constructor can build; on the meta device."""
    released = ShrunkSize(
        vision_width=1152, vision_depth=27, vision_heads=16, vision_mlp=4304, patch_size=14, image_size=224, width=2048, mlp=16384,
        expert_width=1024, expert_mlp=4096, depth=18, head_dim=256, vocab_size=257152, action_dim=32, state_dim=32, action_horizon=50,
    )  # fmt: skip
    config = policy_config(released, ROBOT)
    config.device = "meta"
    with torch.device("meta"):
        theirs = PI0Policy(config)
        ours = ShrunkPI0(config, released)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert vars(ours.model).keys() == vars(theirs.model).keys()
    assert vars(ours.model.paligemma_with_expert).keys() == vars(theirs.model.paligemma_with_expert).keys()
    for part in ("paligemma.config.text_config", "paligemma.config.vision_config", "gemma_expert.config"):
        mine, peer = (_config(model, part) for model in (ours, theirs))
        different = {key for key in mine.keys() | peer.keys() if mine.get(key) != peer.get(key)}
        assert different <= {"projector_hidden_act", "vocab_size" if "vision" in part else "", "num_image_tokens"}, (part, different)


def _config(policy: PI0Policy, path: str) -> dict:
    node = policy.model.paligemma_with_expert
    for name in path.split("."):
        node = getattr(node, name)
    return node.to_dict()


def test_loss_is_the_mean_over_the_robots_dimensions_only():
    policy = make_policy()
    batch = processors(policy.config, STATS)[0](raw_batch())
    torch.manual_seed(7)
    loss, parts = policy.forward(batch)
    assert len(parts["loss_per_dim"]) == ROBOT.action_dim
    assert loss.item() == pytest.approx(sum(parts["loss_per_dim"]) / ROBOT.action_dim, rel=1e-5)


def test_every_parameter_that_can_learn_gets_a_gradient():
    """All but the unused lm_heads and what follows keys and values in the last backbone layer: only the suffix is read."""
    policy = make_policy()
    policy.forward(processors(policy.config, STATS)[0](raw_batch()))[0].backward()
    without = {name.split("paligemma_with_expert.")[1] for name, value in policy.named_parameters() if value.grad is None}
    backbone = "paligemma.model.language_model."
    after_attention = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    assert without == {
        "paligemma.lm_head.weight",
        "gemma_expert.lm_head.weight",
        f"{backbone}norm.weight",
        *(f"{backbone}layers.1.{name}.weight" for name in after_attention),
    }


def test_sampling_takes_ten_euler_steps_of_the_training_velocity():
    """The chunk that LeRobot samples through its cache is Euler on the velocity that its joint training pass predicts."""
    policy = make_policy().eval()
    batch = processors(policy.config, STATS)[0](raw_batch())
    noise = torch.randn(2, SMALL.action_horizon, SMALL.action_dim, generator=torch.Generator().manual_seed(3))
    sampled = policy.predict_action_chunk(batch, noise=noise)
    pictures, masks = policy._preprocess_images(batch)
    fixed = partial(
        policy.model.forward,
        pictures,
        masks,
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
        policy.prepare_state(batch),
    )
    x_t = noise
    with torch.no_grad():
        for step in range(10):
            time = torch.full((2,), 1.0 - step / 10)
            x_t = x_t - 0.1 * velocity_from_loss(fixed, x_t, time)
    torch.testing.assert_close(sampled, x_t[:, :, : ROBOT.action_dim], rtol=1e-4, atol=1e-5)


def velocity_from_loss(forward, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The network's output, from its squared errors against two targets that differ by 1: noise = x_t + (1 - t) u, actions = x_t - t u."""
    zero = forward(x_t, x_t, time)  # target 0: loss v^2
    one = forward(x_t - time[:, None, None], x_t + 1 - time[:, None, None], time)  # target 1: loss (1 - v)^2
    return (zero - one + 1) / 2


def test_prompt_is_bytes_with_a_newline_and_an_end():
    policy = make_policy()
    batch = processors(policy.config, STATS)[0](raw_batch())
    length = len("press\n") + 1
    tokens, mask = batch["observation.language.tokens"][0], batch["observation.language.attention_mask"][0]
    assert [token - 3 for token in tokens[: length - 1].tolist()] == list(b"press\n")  # ByT5 keeps 0, 1, 2 for itself
    assert tokens[length - 1] == 1
    assert mask.tolist() == [True] * length + [False] * (SMALL.prompt_tokens - length)


def test_remembered_sentences_are_tokenised_as_transformers_does():
    settings = {"max_length": 12, "truncation": True, "padding": "max_length", "padding_side": "right", "return_tensors": "pt"}
    tokenizer, sentences = PromptTokenizer(), ["press", "öffne die Schublade", "press"]
    expected = ByT5Tokenizer()(sentences, **settings)
    for found in (tokenizer(sentences, **settings), tokenizer(sentences, **settings)):
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert tokenizer(["press"], **{**settings, "max_length": 8})["input_ids"].shape == (1, 8)


def test_processors_normalise_and_restore():
    before, after = processors(make_policy().config, STATS)
    raw = raw_batch()
    batch = before(raw)
    torch.testing.assert_close(
        batch["observation.state"], (raw["observation.state"] - STATS["observation.state"]["mean"]) / STATS["observation.state"]["std"]
    )
    torch.testing.assert_close(after(batch["action"]), raw["action"], rtol=1e-5, atol=1e-5)


def test_missing_statistic_is_refused():
    with pytest.raises(DatasetError, match="action"):
        processors(make_policy().config, {"observation.state": STATS["observation.state"], "action": {"min": torch.zeros(3)}})


def test_four_heads_are_refused_because_lerobot_cannot_run_them(monkeypatch):
    with pytest.raises(ConfigError, match="8 query heads"):
        dataclasses.replace(SMALL, num_heads=4)
    monkeypatch.setattr(lerobot_pi0, "QUERY_HEADS", 4)
    policy = make_policy(dataclasses.replace(SMALL, num_heads=4, head_dim=8))
    with pytest.raises(RuntimeError, match="shape"):
        policy.forward(processors(policy.config, STATS)[0](raw_batch()))


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"image_size": 25}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(SMALL, **change)


def test_robot_wider_than_the_padding_is_refused():
    with pytest.raises(ConfigError, match="9"):
        policy_config(SMALL, dataclasses.replace(ROBOT, action_dim=9))


def test_same_size_keeps_every_width():
    size = same_size(TINY)
    assert size.num_heads * size.head_dim == TINY.decoder.num_heads * TINY.decoder.head_dim
    assert (size.width, size.expert_width, size.depth, size.vision_width) == (192, 128, 4, 128)
    assert same_size(PI0).head_dim == 256
    with pytest.raises(ConfigError, match="pi0"):
        same_size(PI05)


def test_nothing_of_lerobot_is_patched():
    assert modeling_pi0.get_gemma_config("gemma_300m").width == 1024
    assert modeling_pi0.PI0Pytorch is PI0Pytorch
