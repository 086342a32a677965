"""Tests of LeRobot's PI0 at a small size against ours: inherited code is unchanged, and both sides agree within bounds or are refused."""

import math
from dataclasses import replace

import pytest
import torch
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.modeling_pi0 import PaliGemmaWithExpertModel, PI0Policy, PI0Pytorch

from pi0fm.bench import inference
from pi0fm.bench.config import InferenceOptions
from pi0fm.bench.harness import peer
from pi0fm.bench.harness.cases import make_batch, make_noise, make_observation
from pi0fm.bench.harness.limits import Rates, products_of
from pi0fm.bench.harness.peer import RobotFeatures, ShrunkPI0, image_key, policy_config, processors
from pi0fm.bench.harness.sizes import CASES, PEER_CASES, Case
from pi0fm.bench.harness.steps import Trainer, their_loss, their_sampler
from pi0fm.bench.inference import SamplerCall
from pi0fm.bench.training import lerobots_step, our_loss
from pi0fm.models.config import PI0, PI05, TINY, StreamConfig
from pi0fm_client.errors import ConfigError, DatasetError, Pi0fmError

CPU = torch.device("cpu")
SMALL = replace(
    CASES["tiny"].config,
    vision=replace(CASES["tiny"].config.vision, width=16, depth=1, num_heads=2, mlp_width=32, patch_size=12, image_size=24),
    decoder=replace(CASES["tiny"].config.decoder, backbone=StreamConfig(24, 32), action_expert=StreamConfig(16, 24), depth=2, head_dim=4),
    max_prompt_tokens=16,
    action_horizon=5,
)
CASE = Case(SMALL, present=(True, False, True), prompt_tokens=5, training_batch=3)
ROBOT = RobotFeatures(cameras=("front",), state_dim=4, action_dim=3)
STATS = {
    "observation.state": {"mean": torch.tensor([1.0, 0, 0, 0]), "std": torch.full((4,), 2.0)},
    "action": {"mean": torch.tensor([0.5, 0, -1]), "std": torch.tensor([1.0, 2, 4])},
}


def make_policy() -> ShrunkPI0:
    torch.manual_seed(0)
    return ShrunkPI0(policy_config(SMALL, ROBOT), SMALL)


def raw_batch(count: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        image_key("front"): torch.rand(count, 3, 24, 24, generator=generator),
        "observation.state": torch.randn(count, 4, generator=generator),
        "action": torch.randn(count, 5, 3, generator=generator),
        "action_is_pad": torch.zeros(count, 5, dtype=torch.bool),
        "task": ["press"] * count,
    }


def prepared_batch(policy: ShrunkPI0) -> dict:
    return processors(policy.config, STATS)[0](raw_batch())


def test_only_constructors_are_ours_and_nothing_of_lerobot_is_patched():
    pairs = ((ShrunkPI0, PI0Policy), (peer._ShrunkCore, PI0Pytorch), (peer._ShrunkStreams, PaliGemmaWithExpertModel))
    for ours, theirs in pairs:
        own = {name for name, value in vars(ours).items() if callable(value) or isinstance(value, (classmethod, staticmethod, property))}
        assert own == {"__init__"}, own
        assert ours.forward is theirs.forward
    assert modeling_pi0.get_gemma_config("gemma_300m").width == 1024
    assert modeling_pi0.PI0Pytorch is PI0Pytorch


def test_parameters_have_the_names_and_attributes_of_lerobots_own_constructor():
    """At the released size, the one that LeRobot's constructor can build; on the meta device."""
    config = policy_config(PI0, ROBOT)
    config.device = "meta"
    with torch.device("meta"):
        ours, theirs = ShrunkPI0(config, PI0), PI0Policy(config)
    shapes = [{name: value.shape for name, value in policy.state_dict().items()} for policy in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert vars(ours.model).keys() == vars(theirs.model).keys()
    streams = [policy.model.paligemma_with_expert for policy in (ours, theirs)]
    assert vars(streams[0]).keys() == vars(streams[1]).keys()
    for part in ("paligemma.config.text_config", "paligemma.config.vision_config", "gemma_expert.config"):
        mine, other = (stream.get_submodule(part.split(".")[0]).config for stream in streams)
        if part.count(".") == 2:
            mine, other = (getattr(config, part.rpartition(".")[2]) for config in (mine, other))
        mine, other = mine.to_dict(), other.to_dict()
        different = {key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)}
        assert different <= {"projector_hidden_act", "vocab_size" if "vision" in part else "", "num_image_tokens"}, (part, different)


def test_processors_write_the_prompt_in_bytes_normalise_and_restore():
    before, after = processors(make_policy().config, STATS)
    raw = raw_batch()
    batch = before(raw)
    length = len("press\n") + 1
    tokens, mask = batch["observation.language.tokens"][0], batch["observation.language.attention_mask"][0]
    assert [token - 3 for token in tokens[: length - 1].tolist()] == list(b"press\n")  # ByT5 keeps 0, 1, 2 for itself
    assert tokens[length - 1] == 1
    assert mask.tolist() == [True] * length + [False] * (SMALL.max_prompt_tokens - length)
    mean, std = STATS["observation.state"].values()
    torch.testing.assert_close(batch["observation.state"], (raw["observation.state"] - mean) / std)
    torch.testing.assert_close(after(batch["action"]), raw["action"], rtol=1e-5, atol=1e-5)
    with pytest.raises(DatasetError, match="action"):
        processors(make_policy().config, STATS | {"action": {"min": torch.zeros(3)}})


def test_sizes_that_lerobot_cannot_run_are_refused():
    assert peer.at_lerobots_heads(TINY) == replace(TINY, decoder=replace(TINY.decoder, num_heads=8, head_dim=24))
    assert peer.at_lerobots_heads(PI0) == PI0
    with pytest.raises(ConfigError, match="only a pi0 can be compared"):
        peer.at_lerobots_heads(PI05)
    with pytest.raises(ConfigError, match="multiple of 16"):
        peer.at_lerobots_heads(replace(TINY, decoder=replace(TINY.decoder, head_dim=6)))
    with pytest.raises(ConfigError, match="8 query heads"):
        ShrunkPI0(policy_config(TINY, ROBOT), TINY)
    with pytest.raises(ConfigError, match="9"):
        policy_config(SMALL, replace(ROBOT, action_dim=9))


@pytest.fixture
def pair():
    return peer.build_pair(CASE, 0, CPU)


@pytest.mark.parametrize("batch", [1, 2])
def test_both_sides_make_the_same_chunk_and_a_weight_that_differs_is_found(pair, batch):
    observation, noise = make_observation(CASE, batch, 3), make_noise(CASE, batch, 3)
    theirs = their_sampler(pair.theirs.model, observation, noise)()
    assert (theirs - noise).abs().max() > 0.1  # the network has a say
    assert peer.displacement_difference(SamplerCall.for_network(pair.ours, observation, noise, torch.float32)(), theirs, noise) < 1e-5
    with torch.no_grad():
        pair.ours.action_in.weight[0, 0] += 0.05
    changed = SamplerCall.for_network(pair.ours, observation, noise, torch.float32)()
    assert peer.displacement_difference(changed, theirs, noise) > inference.BOUNDS[torch.float32]


def test_a_missing_camera_is_no_product_of_ours(pair):
    """Of LeRobot's it is one as any other."""
    observation, noise = make_observation(CASE, 1, 3), make_noise(CASE, 1, 3)
    whole = replace(observation, image_mask=torch.ones_like(observation.image_mask))

    def flops(seen) -> list[int]:
        calls = SamplerCall.for_network(pair.ours, seen, noise, torch.float32), their_sampler(pair.theirs.model, seen, noise)
        return [products_of(call).flops.total() for call in calls]

    (ours, theirs), (ours_whole, theirs_whole) = flops(observation), flops(whole)
    assert ours < ours_whole
    assert theirs == theirs_whole


def test_losses_and_gradients_agree_and_a_gradient_that_differs_is_found(pair):
    batch = make_batch(CASE, 4)
    theirs, ours = their_loss(pair.theirs.train().model, batch, CPU)(), our_loss(Trainer.for_network(pair.ours, "float32", CPU), batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    ours.backward()
    assert peer.gradient_difference(pair) < 1e-4
    pair.ours.state_in.bias.grad[0] += 0.1
    assert peer.gradient_difference(pair) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_same_step_on_both_sides(pair, fused):
    """The first loss, and the weights that AdamW leaves: its first step moves each by the learning rate."""
    batch = make_batch(CASE, 4)
    expected = their_loss(pair.theirs.model, batch, CPU)().item()
    before = pair.ours.action_out.weight.detach().clone()
    ours, theirs = Trainer.for_network(pair.ours, "float32", CPU).step_on(batch), lerobots_step(pair.theirs, batch, CPU, fused)
    assert (ours(), theirs()) == (pytest.approx(expected, rel=1e-5), pytest.approx(expected, rel=1e-5))
    moved = peer.to_our_names(pair.theirs.model.state_dict(), SMALL)["action_out.weight"] - before
    assert moved.abs().max() > 1e-4
    assert ours() < expected and theirs() < expected


def test_a_step_with_eight_draws_trains_on_all(pair):
    batch = make_batch(CASE, 4, flow_draws=8)
    single = [replace(batch, noise=batch.noise[:, [draw]], uniform=batch.uniform[:, [draw]]) for draw in range(8)]
    trainer = Trainer.for_network(pair.ours, "float32", CPU)
    expected = sum(our_loss(trainer, each).item() for each in single) / 8
    assert trainer.step_on(batch)() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("difference", [0.2, math.nan])
def test_what_differs_is_refused_in_one_line(difference):
    peer.check_alike("tiny as_shipped", "losses", 0.01, 0.01)
    with pytest.raises(Pi0fmError, match=r"losses of both sides must agree within 0.01 .*found .* for tiny as_shipped; no ratio is"):
        peer.check_alike("tiny as_shipped", "losses", difference, 0.01)


def test_no_figure_is_given_when_the_chunks_differ(monkeypatch):
    monkeypatch.setitem(CASES, "tiny", CASE)
    monkeypatch.setattr(inference, "measure_rates", lambda *_: Rates({}, 1.0))
    monkeypatch.setitem(inference.BOUNDS, torch.float32, 0.0)
    with pytest.raises(Pi0fmError, match="action chunks of both sides"):
        inference.measure(InferenceOptions(cases=("tiny",), rounds=1))


def test_cases_have_what_their_names_say():
    assert [sum(CASES[name].present) for name in PEER_CASES] == [1, 3, 2]
    observation = make_observation(CASES["width_512_one_camera_missing"], 2, 0)
    assert observation.images[:, 1].any() and not observation.images[:, 2].any()
    assert observation.prompt_mask.sum(dim=1).tolist() == [18, 18]
    half, decoder = CASES["pi0_proportions"].config, PI0.decoder
    assert (3 * half.decoder.depth, 3 * half.vision.depth) == (decoder.depth, PI0.vision.depth)
    assert (2 * half.decoder.backbone.width, 2 * half.vision.width) == (decoder.backbone.width, PI0.vision.width)
