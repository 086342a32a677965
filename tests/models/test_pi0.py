"""Tests of the whole network: the cache is exact, masked inputs have no effect, every parameter has one."""

import dataclasses

import pytest
import torch
from small_pi0 import BOTH, LIKE_PI0, TOKENS_PER_IMAGE, network, observation, question

from pi0fm.flow.density import exact_divergence
from pi0fm.models.config import TINY
from pi0fm.models.observation import ModelObservation, pixels
from pi0fm.models.pi0 import Pi0
from pi0fm.models.prefix_cache import PrefixCache
from pi0fm_client.errors import ConfigError

variants = pytest.mark.parametrize("name", list(BOTH))


@torch.no_grad()
def answer(model: Pi0, seen: ModelObservation) -> torch.Tensor:
    return model(seen, *question())


@variants
def test_cached_prefix_is_the_joint_pass(name):
    model, seen, (x_t, t) = network(BOTH[name]), observation(), question()
    seen = dataclasses.replace(seen, image_mask=torch.tensor([[True, True], [True, False], [False, True]]))
    with torch.no_grad():
        joint, cache = model(seen, x_t, t), model.encode_prefix(seen)
        torch.testing.assert_close(model.velocity(cache, seen.state, x_t, t), joint, rtol=0, atol=1e-6)
        # The same cache serves another time.
        torch.testing.assert_close(model.velocity(cache, seen.state, x_t, 1 - t), model(seen, x_t, 1 - t), rtol=0, atol=1e-6)
    assert joint.abs().mean() > 0.1
    assert cache.length.tolist() == [2 * TOKENS_PER_IMAGE + 3, TOKENS_PER_IMAGE + 8, TOKENS_PER_IMAGE + 5]


@variants
def test_one_row_does_not_see_another(name):
    model, seen, (x_t, t) = network(BOTH[name]), observation(), question()
    with torch.no_grad():
        alone = model(
            ModelObservation(**{field.name: getattr(seen, field.name)[1:2] for field in dataclasses.fields(seen)}), x_t[1:2], t[1:2]
        )
        torch.testing.assert_close(model(seen, x_t, t)[1:2], alone, rtol=0, atol=1e-6)


@variants
def test_padding_and_missing_cameras_change_nothing(name):
    model, seen = network(BOTH[name]), observation()
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    seen = dataclasses.replace(seen, image_mask=mask)
    images, tokens = seen.images.clone(), seen.prompt_tokens.clone()
    images[~mask] = 255 - images[~mask]
    tokens[~seen.prompt_mask] = 39 - tokens[~seen.prompt_mask]
    assert torch.equal(answer(model, dataclasses.replace(seen, images=images, prompt_tokens=tokens)), answer(model, seen))


@variants
def test_a_picture_or_a_word_that_is_there_changes_the_answer(name):
    model, seen = network(BOTH[name]), observation()
    before = answer(model, seen)
    for field in ("images", "prompt_tokens"):
        other = getattr(seen, field).clone()
        other[:, :1] = 39 - other[:, :1] if field == "prompt_tokens" else 255 - other[:, :1]
        changed = answer(model, dataclasses.replace(seen, **{field: other}))
        assert ((changed - before).abs().amax(dim=(1, 2)) > 1e-3).all(), field


@variants
def test_leaving_masked_tokens_out_gives_the_same_velocity(name):
    """Positions count real tokens only, so a prefix without its padding has the same keys."""
    model, seen = network(BOTH[name]), observation(prompts=(3, 3, 3))
    seen = dataclasses.replace(seen, image_mask=torch.tensor([[False, True]] * 3))
    shorter = ModelObservation(seen.images[:, 1:], seen.image_mask[:, 1:], seen.prompt_tokens[:, :3], seen.prompt_mask[:, :3], seen.state)
    torch.testing.assert_close(answer(model, shorter), answer(model, seen), rtol=0, atol=2e-6)


def hidden(model: Pi0, seen: ModelObservation, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The suffix behind the decoder, state token first."""
    cache: PrefixCache = model.encode_prefix(seen)
    suffix, count, condition = model._suffix(seen.state, x_t, t)
    assert count == 1
    return model.decoder.decode(suffix, cache, count, condition)


@torch.no_grad()
def test_state_token_does_not_see_the_actions_and_they_see_it():
    model, seen, (x_t, t) = network(LIKE_PI0), observation(), question()
    before, other = hidden(model, seen, x_t, t), hidden(model, seen, x_t + 1, t)
    assert torch.equal(before[:, 0], other[:, 0])
    assert (before[:, 1:] - other[:, 1:]).abs().amax(dim=(1, 2)).min() > 1e-3
    moved = hidden(model, dataclasses.replace(seen, state=seen.state + 1), x_t, t)
    assert (before[:, 1:] - moved[:, 1:]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_pi05_does_not_read_the_state_but_in_the_prompt():
    model, seen = network(BOTH["pi05"]), observation()
    assert torch.equal(answer(model, seen), answer(model, dataclasses.replace(seen, state=seen.state + 1)))


@variants
def test_every_action_sees_every_action(name):
    model, seen, (x_t, t) = network(BOTH[name]), observation(batch=1, prompts=(4,)), question(1)
    with torch.no_grad():
        before = model(seen, x_t, t)
        for step in range(4):
            other = x_t.clone()
            other[:, step] += 1
            assert ((model(seen, other, t) - before).abs().amax(dim=2) > 1e-5).all()


@variants
def test_flow_time_changes_the_answer(name):
    model, seen, (x_t, t) = network(BOTH[name]), observation(), question()
    with torch.no_grad():
        assert (model(seen, x_t, t) - model(seen, x_t, t * 0.9)).abs().amax(dim=(1, 2)).min() > 1e-4


@pytest.mark.parametrize("name", ["pi0", "pi05", "tiny"])
def test_every_parameter_gets_a_gradient(name):
    """No dead parameter, and none that is not finite."""
    model = network({**BOTH, "tiny": TINY}[name])
    if name == "tiny":
        small = observation(batch=1, prompts=(4,))
        images = torch.randint(0, 256, (1, 1, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        seen = dataclasses.replace(small, images=images, image_mask=torch.ones(1, 1, dtype=torch.bool), state=torch.ones(1, 8))
        found = model(seen, torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.4]))
    else:
        found = model(observation(), *question())
    found.square().sum().backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []
    # A softmax does not change when every key is moved by the same vector, so the tower's key bias has no gradient but rounding.
    for layer in model.vision.layers:
        query, _, value = layer.qkv.bias.grad.chunk(3)
        assert query.any() and value.any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@variants
def test_several_rows_of_one_observation_share_its_prefix(name):
    """K pairs (x_t, t) for each observation in one pass are K separate passes, in the observations' order."""
    model, seen = network(BOTH[name]), observation()
    questions = [question(), tuple(value.flip(0) * 0.7 for value in question())]
    x_t, t = (torch.stack(values, dim=1).flatten(0, 1) for values in zip(*questions, strict=True))
    with torch.no_grad():
        found = model(seen, x_t, t).unflatten(0, (3, 2))
        for number, (one, at) in enumerate(questions):
            torch.testing.assert_close(found[:, number], model(seen, one, at), rtol=0, atol=2e-6)


@variants
def test_torch_func_differentiates_the_velocity_as_autograd_does(name):
    """vjp alone, and vmap over its pullback with one row for each output: together the whole Jacobian."""
    model, seen, (x_t, t) = network(BOTH[name]), observation(), question()
    with torch.no_grad():
        cache = model.encode_prefix(seen)

    def field(x):
        return model.velocity(cache, seen.state, x, t)

    start = x_t.clone().requires_grad_()
    value = field(start)
    rows = torch.eye(20).reshape(20, 1, 4, 5).expand(20, *x_t.shape)
    expected = torch.stack([torch.autograd.grad(value, start, row, retain_graph=True)[0] for row in rows])
    found, pullback = torch.func.vjp(field, x_t)
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(pullback(rows[7])[0], expected[7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(lambda row: pullback(row)[0])(rows), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().amax(dim=(1, 2, 3)).min() > 1e-3

    _, divergence = exact_divergence(field, x_t)
    torch.testing.assert_close(divergence, expected.flatten(2).diagonal(dim1=0, dim2=2).sum(1), rtol=1e-4, atol=1e-4)


def test_pi05s_expert_begins_as_the_identity():
    """Zero gates: before training, the actions pass all layers unchanged."""
    torch.manual_seed(0)
    model = Pi0(BOTH["pi05"]).eval()
    seen, (x_t, t) = observation(), question()
    with torch.no_grad():
        suffix, _, condition = model._suffix(seen.state, x_t, t)
        expected = -model.action_out(model.decoder.final_norm(suffix, condition)[0])
        torch.testing.assert_close(model(seen, x_t, t), expected)


def test_pixels_fill_minus_one_to_one():
    images = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    images[0, 0, 0] = torch.tensor([255, 51, 0], dtype=torch.uint8)
    found = pixels(images)
    assert found.shape == (2, 3, 4, 6)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([1.0, -0.6, -1.0]))
    assert found.min() == -1.0


def test_autocast_answers_in_float32_and_near():
    model, seen, (x_t, t) = network(LIKE_PI0), observation(), question()
    exact = answer(model, seen)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(seen, x_t, t)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("change", [{"num_heads": 3, "num_kv_heads": 2}, {"head_dim": 7}])
def test_impossible_decoders_are_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(LIKE_PI0, decoder=dataclasses.replace(LIKE_PI0.decoder, **change))


@pytest.mark.parametrize("change", [{"image_size": 33}, {"num_heads": 3}])
def test_impossible_towers_are_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(LIKE_PI0.vision, **change)
