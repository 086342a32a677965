"""LeRobot's PI0 and ours side by side: the same answers within the bounds, or no figures at all."""

import math
from dataclasses import replace

import pytest
import torch

from pi0fm.bench import inference
from pi0fm.bench.inference import compare_inference, our_sampler, their_sampler
from pi0fm.bench.peer_cases import Case, case_named, make_batch, make_noise, make_observation
from pi0fm.bench.peer_config import DRAW_CASES, PEER_CASES, InferenceConfig
from pi0fm.bench.peer_pair import build_pair, check_alike, displacement_difference, gradient_difference, translated
from pi0fm.bench.products import Roofline, products_of, work_of
from pi0fm.bench.training_sides import our_loss, prepared, step_of, their_loss, their_step
from pi0fm.models.joint_decoder import StreamConfig
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.models.presets import PI0
from pi0fm_client.errors import Pi0fmError

CPU = torch.device("cpu")
TINY = case_named("tiny")
SMALL = Case(
    "small",
    replace(
        TINY.config,
        vision=replace(TINY.config.vision, width=16, depth=1, num_heads=2, mlp_width=32, patch_size=12, image_size=24),
        decoder=replace(TINY.config.decoder, backbone=StreamConfig(24, 32), action_expert=StreamConfig(16, 24), depth=2, head_dim=4),
        max_prompt_tokens=16,
        action_horizon=5,
    ),
    present=(True, False, True),
    prompt_tokens=5,
    training_batch=3,
)


@pytest.fixture
def pair():
    return build_pair(SMALL, 0, CPU)


@pytest.mark.parametrize("batch", [1, 2])
def test_both_sides_make_the_same_chunk(pair, batch):
    observation, noise = make_observation(SMALL, batch, 3), make_noise(SMALL, batch, 3)
    ours = our_sampler(pair.ours.eval(), observation, noise, torch.float32)()
    theirs = their_sampler(pair, observation, noise)()
    assert displacement_difference(ours, theirs, noise) < 1e-5
    assert (theirs - noise).abs().max() > 0.1  # the network has a say


def test_a_weight_that_differs_is_found(pair):
    observation, noise = make_observation(SMALL, 1, 3), make_noise(SMALL, 1, 3)
    with torch.no_grad():
        pair.ours.action_in.weight[0, 0] += 0.05
    difference = displacement_difference(
        our_sampler(pair.ours, observation, noise, torch.float32)(), their_sampler(pair, observation, noise)(), noise
    )
    assert difference > inference.BOUNDS[torch.float32]


def test_a_missing_camera_is_no_product_of_ours(pair):
    """Of LeRobot's it is one as any other."""
    observation, noise = make_observation(SMALL, 1, 3), make_noise(SMALL, 1, 3)
    whole = replace(observation, image_mask=torch.ones_like(observation.image_mask))

    def flops(seen) -> tuple[int, int]:
        ours, theirs = our_sampler(pair.ours, seen, noise, torch.float32), their_sampler(pair, seen, noise)
        return work_of(products_of(ours, ())).total_flops, work_of(products_of(theirs, ())).total_flops

    (ours, theirs), (ours_whole, theirs_whole) = flops(observation), flops(whole)
    assert ours < ours_whole
    assert theirs == theirs_whole


def test_losses_and_gradients_agree(pair):
    batch = make_batch(SMALL, 4)
    theirs, ours = their_loss(pair.theirs.train().model, batch, CPU)(), our_loss(pair.ours.train(), batch, CPU)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    ours.backward()
    assert gradient_difference(pair) < 1e-4
    pair.ours.state_in.bias.grad[0] += 0.1
    assert gradient_difference(pair) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_same_step_on_both_sides(pair, fused):
    """The first loss, and the weights that AdamW leaves: its first step moves each by the learning rate."""
    batch = make_batch(SMALL, 4)
    expected = their_loss(pair.theirs.model, batch, CPU)().item()
    before = pair.ours.action_out.weight.detach().clone()
    ours, theirs = step_of(*prepared(pair.ours, "float32", CPU), batch), their_step(pair.theirs, batch, CPU, fused)
    assert (ours(), theirs()) == (pytest.approx(expected, rel=1e-5), pytest.approx(expected, rel=1e-5))
    moved = translated(pair.theirs.model.state_dict(), SMALL.config)["action_out.weight"] - before
    assert moved.abs().max() > 1e-4
    assert ours() < expected
    assert theirs() < expected


def test_their_step_under_autocast_is_the_same_step_rounded(pair):
    batch = make_batch(SMALL, 4)
    expected = their_loss(pair.theirs.model, batch, CPU)().item()
    found = their_step(pair.theirs, batch, CPU, fused=False, bfloat16=True)()
    assert found != expected
    assert found == pytest.approx(expected, rel=2e-2)


def test_a_step_with_eight_draws_trains_on_all(pair):
    batch = make_batch(SMALL, 4, flow_draws=8)
    loss = step_of(*prepared(pair.ours, "float32", CPU), batch)()
    single = [replace(batch, noise=batch.noise[:, [draw]], uniform=batch.uniform[:, [draw]]) for draw in range(8)]
    pair.ours.load_state_dict(translated(pair.theirs.model.state_dict(), SMALL.config))
    assert loss == pytest.approx(sum(our_loss(pair.ours, each, CPU).item() for each in single) / 8, rel=1e-5)


def test_the_same_seed_is_the_same_pair_and_leaves_the_callers_randomness_alone(pair):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, other = build_pair(SMALL, 0, CPU), build_pair(SMALL, 1, CPU)
    assert torch.equal(torch.rand(1), expected)
    weights = [each.ours.action_in.weight for each in (pair, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("difference", [0.2, math.nan])
def test_what_differs_is_refused_in_one_line(difference):
    check_alike("tiny", "as_shipped", "losses", 0.01, 0.01)
    with pytest.raises(
        Pi0fmError, match=r"losses of both sides must agree within 0.01 .*found .* for tiny as_shipped; no ratio is printed"
    ):
        check_alike("tiny", "as_shipped", "losses", difference, 0.01)


def test_no_figure_is_given_when_the_chunks_differ(monkeypatch):
    monkeypatch.setattr(inference, "case_named", lambda _: SMALL)
    monkeypatch.setattr(inference, "measure_roofline", lambda *_: Roofline({}, 1.0))
    monkeypatch.setitem(inference.BOUNDS, torch.float32, 0.0)
    with pytest.raises(Pi0fmError, match="action chunks of both sides"):
        compare_inference(InferenceConfig(cases=("tiny",), rounds=1))


def test_cases_have_what_their_names_say():
    widths = [case_named(name) for name in PEER_CASES]
    assert [case.name for case in widths] == list(PEER_CASES)
    assert [sum(case.present) for case in widths] == [1, 3, 2]
    assert all(case_named(name).config.decoder.num_heads == 8 for name in DRAW_CASES)
    observation = make_observation(widths[2], 2, 0)
    assert not observation.images[:, 2].any()
    assert observation.images[:, 1].any()
    assert observation.prompt_mask.sum(dim=1).tolist() == [18, 18]


def test_pi0s_proportions_are_pi0s():
    """Every width a half, every depth a third."""
    config = case_named("pi0_proportions").config
    pairs = [
        (config.vision.width, PI0.vision.width),
        (config.vision.mlp_width, PI0.vision.mlp_width),
        (config.decoder.head_dim, PI0.decoder.head_dim),
        *(
            (getattr(ours, field), getattr(released, field))
            for ours, released in (
                (config.decoder.backbone, PI0.decoder.backbone),
                (config.decoder.action_expert, PI0.decoder.action_expert),
            )
            for field in ("width", "mlp_width")
        ),
    ]
    assert all(2 * ours == released for ours, released in pairs)
    assert (3 * config.decoder.depth, 3 * config.vision.depth) == (PI0.decoder.depth, PI0.vision.depth)
    with torch.device("meta"):
        assert parameter_count(Pi0(config)) < 3e8
