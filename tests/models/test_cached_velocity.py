"""Tests that values kept between a sampler's evaluations change no velocity."""

import dataclasses

import pytest
import torch
from small_pi0 import BOTH, LIKE_PI0, TOKENS_PER_IMAGE, network, observation, question

from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import exact_divergence
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.attention import additive, attend

# a state token under adaptive norms changes with the time, so nothing of it can be kept
ALL = BOTH | {"state under adaptive norms": dataclasses.replace(LIKE_PI0, time_conditioning="adaptive_norm")}
variants = pytest.mark.parametrize("name", list(ALL))
MISSING = torch.tensor([[True, True], [True, False], [False, True]])


@variants
@torch.no_grad()
def test_the_field_is_the_joint_pass_at_every_time_and_in_any_order(name):
    model, seen, (x_t, t) = network(ALL[name]), dataclasses.replace(observation(), image_mask=MISSING), question()
    field = model.cached_velocity(seen)
    first = field(x_t, t)
    torch.testing.assert_close(first, model(seen, x_t, t), rtol=0, atol=1e-6)
    torch.testing.assert_close(field(2 * x_t, 1 - t), model(seen, 2 * x_t, 1 - t), rtol=0, atol=1e-6)
    assert torch.equal(field(x_t, t), first)  # what the evaluation between wrote is overwritten


@variants
@torch.no_grad()
def test_one_time_for_all_is_each_rows_own(name):
    model, (x_t, _) = network(ALL[name]), question()
    field = model.cached_velocity(observation())
    for time in (0.0, 0.3, 0.3, 0.9):
        expected = field(x_t, torch.full((3,), time))
        torch.testing.assert_close(field.at(x_t, time), expected, rtol=0, atol=3e-6)


@variants
@torch.no_grad()
def test_rows_with_times_of_their_own_are_those_of_the_joint_pass(name):
    """Held rows stand at t = 1; where all rows share a time, it is the chunk's."""
    model, (x_t, t) = network(ALL[name]), question()
    seen = dataclasses.replace(observation(), image_mask=MISSING)
    field, held = model.cached_velocity(seen), torch.arange(4) < torch.tensor([0, 1, 3])[:, None]
    torch.testing.assert_close(field(x_t, t[:, None].expand(-1, 4)), field(x_t, t), rtol=0, atol=3e-6)
    by_row = torch.where(held, 1.0, 0.3)
    expected = model(seen, x_t, by_row)
    for found in (field.at_rows(x_t, 0.3, held), field(x_t, by_row)):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(expected[0], field.at(x_t, 0.3)[0], rtol=0, atol=3e-6)
    assert (expected[1:] - field.at(x_t, 0.3)[1:]).abs().amax(dim=(1, 2)).min() > 1e-3


@variants
@torch.no_grad()
def test_several_chunks_of_an_observation_share_its_prefix_and_do_not_see_each_other(name):
    """Whatever one of them is, the others stay; padding and missing cameras differ between the observations."""
    model, seen, chunks = network(ALL[name]), dataclasses.replace(observation(), image_mask=MISSING), 4
    x_t, t = torch.randn(3 * chunks, 4, 5, generator=torch.Generator().manual_seed(5)), torch.linspace(0.05, 0.9, 3 * chunks)
    field, alone = model.cached_velocity(seen, chunks), model.cached_velocity(seen)
    for first in range(chunks):
        torch.testing.assert_close(field.at(x_t, 0.3)[first::chunks], alone.at(x_t[first::chunks], 0.3), rtol=0, atol=3e-6)
        torch.testing.assert_close(field(x_t, t)[first::chunks], alone(x_t[first::chunks], t[first::chunks]), rtol=0, atol=3e-6)
    before, changed = field.at(x_t, 0.3), x_t.clone()
    changed[1] = 100.0
    after = field.at(changed, 0.3)
    assert not torch.equal(before[1], after[1])
    torch.testing.assert_close(after[torch.arange(12) != 1], before[torch.arange(12) != 1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_what_is_known_to_be_whole_needs_no_mask():
    model, (x_t, t) = network(LIKE_PI0), question()
    seen = dataclasses.replace(observation(), prompt_mask=torch.ones(3, 8, dtype=torch.bool))
    assert seen.is_whole() and not observation().is_whole()
    cache = model.encode_prefix(seen, whole=True)
    assert cache.whole and not model.encode_prefix(observation()).whole
    torch.testing.assert_close(model.velocity(cache, seen.state, x_t, t), model(seen, x_t, t), rtol=0, atol=1e-6)


@torch.no_grad()
def test_when_every_token_is_real_no_mask_is_added():
    model, (x_t, t) = network(LIKE_PI0), question()
    whole = dataclasses.replace(observation(), prompt_mask=torch.ones(3, 8, dtype=torch.bool))
    field = model.cached_velocity(whole)
    assert field._context is not None and field._context.bias is None
    torch.testing.assert_close(field(x_t, t), model(whole, x_t, t), rtol=0, atol=1e-6)


@variants
def test_derivatives_go_through_it(name):
    model, (x_t, t) = network(ALL[name]).double(), question()
    model.requires_grad_(False)
    seen = dataclasses.replace(observation(), state=observation().state.double())
    x_t, t = x_t.double(), t.double()
    field = model.cached_velocity(seen)
    value, divergence = exact_divergence(lambda x: field(x, t), x_t)
    expected = exact_divergence(lambda x: model(seen, x, t), x_t)
    torch.testing.assert_close(value, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(divergence, expected[1], rtol=0, atol=1e-5)


@variants
@torch.no_grad()
def test_a_missing_camera_and_padding_are_left_out_and_change_nothing(name):
    model, (x_t, t) = network(ALL[name]), question()
    seen = dataclasses.replace(observation(prompts=(3, 2, 1)), image_mask=torch.tensor([[True, False]] * 3))
    seen = dataclasses.replace(
        seen,
        prompt_tokens=seen.prompt_tokens.repeat(1, 3),
        prompt_mask=torch.cat((seen.prompt_mask, torch.zeros(3, 16, dtype=torch.bool)), 1),
    )
    kept = seen.trimmed()
    assert kept.images.shape[1] == 1 and kept.prompt_tokens.shape == (3, 8)
    assert model.encode_prefix(kept).mask.shape[1] == TOKENS_PER_IMAGE + 8
    torch.testing.assert_close(model.cached_velocity(kept)(x_t, t), model(seen, x_t, t), rtol=0, atol=1e-6)


def test_what_all_rows_have_is_not_trimmed():
    seen = dataclasses.replace(observation(), image_mask=MISSING)
    kept = seen.trimmed()
    assert kept.images is seen.images and torch.equal(kept.prompt_tokens, seen.prompt_tokens)


@torch.no_grad()
def test_a_sample_is_that_of_the_plain_velocity():
    model, seen, (noise, _) = network(LIKE_PI0), observation(), question()
    flow, cache = FlowMatching.from_config(FlowConfig()), model.encode_prefix(seen)
    plain = flow.sample(lambda x, t: model.velocity(cache, seen.state, x, t), noise)
    torch.testing.assert_close(flow.sample(model.cached_velocity(seen), noise), plain, rtol=0, atol=1e-5)


def test_an_additive_mask_is_the_boolean_one():
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 4, generator=random) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 1, 5, generator=random) < 0.7
    mask[..., 0] = True
    assert torch.equal(attend(query, key, value, additive(mask)), attend(query, key, value, mask))
