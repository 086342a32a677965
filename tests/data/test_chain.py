"""Tests of the chain between robot units and tensors: every transform with its inverse, closed forms, refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi0fm.data.chain import Chain, DeltaActions, Normalize, PadDimensions, Sample, make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.data.normalization import Scaling, scale_notices, scaling
from pi0fm.data.prompt import PromptTokenizer, load_tokenizer
from pi0fm_client.errors import ConfigError, ObservationError
from pi0fm_client.types import Observation

RANDOM = np.random.default_rng(0)
STATS = NormStats(
    column_stats(RANDOM.normal(2, 5, (200, 3)).astype(np.float32), "state"),
    column_stats(RANDOM.uniform(-4, 1, (200, 2)).astype(np.float32), "action"),
    200,
)
ROBOT = Embodiment(cameras={"base": "b", "wrist": "w"}, state_dim=3, robot_action_dim=2, delta_actions=(1,))
PICTURE = np.full((8, 8, 3), 9, dtype=np.uint8)


def chain(embodiment: Embodiment = ROBOT, **change: object) -> Chain:
    how = {"normalization": "z_score", "floor": 1e-3, "image_size": 8, "padded_state_dim": 6, "padded_action_dim": 4} | change
    return make_chain(embodiment, STATS, PromptTokenizer(load_tokenizer("byt5", 384), 32), **how)


def numbers(*shape: int) -> st.SearchStrategy:
    return arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32))


@settings(max_examples=40, deadline=None)
@given(state=numbers(2, 3), actions=numbers(2, 4, 2), kind=st.sampled_from(["z_score", "quantile"]))
def test_round_trip(state, actions, kind):
    steps = chain(normalization=kind)
    back = steps.inverse(steps.forward(Sample(state, actions)))
    np.testing.assert_allclose(back.state, state, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(back.actions, actions, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("step", chain().transforms, ids=lambda step: type(step).__name__)
def test_each_transform_alone_has_its_inverse_and_leaves_its_input_alone(step):
    state, actions = RANDOM.normal(size=(2, 3)).astype(np.float32), RANDOM.normal(size=(2, 4, 2)).astype(np.float32)
    before = (state.copy(), actions.copy())
    back = step.inverse(step.forward(Sample(state, actions)))
    np.testing.assert_allclose(back.state, state, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(back.actions, actions, rtol=1e-6, atol=1e-6)
    assert np.array_equal(state, before[0])
    assert np.array_equal(actions, before[1])
    assert step.forward(Sample(state, None)).actions is None


def test_deltas_are_taken_from_the_state_at_the_chunks_start():
    state = np.array([[10, 20, 30]], dtype=np.float32)
    actions = np.array([[[1, 25], [2, 26]]], dtype=np.float32)
    assert DeltaActions((1,)).forward(Sample(state, actions)).actions.tolist() == [[[1, 5], [2, 6]]]


def test_z_score_closed_form():
    values = RANDOM.normal(3, 2, (500, 2)).astype(np.float32)
    normal = scaling(column_stats(values, "x"), "z_score", 0.01).forward(values)
    np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("rule", ["relative", "absolute", "centred"])
def test_quantile_closed_form(rule):
    values = np.linspace(-3, 7, 1001, dtype=np.float32)[:, None]
    found = scaling(column_stats(values, "x"), "quantile", 1e-3, rule=rule)
    np.testing.assert_allclose(found.forward(np.float32([[-2.9], [2.0], [6.9]])), [[-1], [0], [1]], atol=1e-5)
    np.testing.assert_allclose(found.inverse(found.forward(values)), values, atol=1e-5)


@pytest.mark.parametrize("rule", ["relative", "absolute"])
@pytest.mark.parametrize("low", [0.1, -1.7, 1e4])
def test_a_value_at_the_lower_quantile_is_minus_one_exactly_and_so_is_a_dimension_that_never_moves(rule, low):
    values = np.full((100, 2), low, dtype=np.float32)
    values[:, 1] += np.linspace(0, 3, 100, dtype=np.float32)
    stats = column_stats(values, "x")
    found = scaling(stats, "quantile", 1e-8 if rule == "absolute" else 0.01, rule=rule).forward(stats.q01[None])
    assert found.tolist() == [[-1, -1]]


def test_a_dimension_that_never_moves_does_not_blow_up_a_value_next_to_it():
    values = np.full((100, 1), 5, dtype=np.float32)
    values[0] += 5e-7  # what float32 may make of it
    for kind in ("z_score", "quantile"):
        found = scaling(column_stats(values, "x"), kind, 0.01)
        assert found.scale == 1
        assert scale_notices(column_stats(values, "x"), kind, 0.01, "action") == ["action dimension 0 never moves"]


@pytest.mark.parametrize("units", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_scales_do_not_depend_on_units(units, kind):
    """Metres a step are not squeezed by a floor in robot units."""
    values = RANDOM.normal(3, 2, (500, 2)).astype(np.float32)
    found = [scaling(column_stats(each, "x"), kind, 0.01).forward(each) for each in (values, values * np.float32(units))]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


def test_a_gripper_that_moves_rarely_is_scaled_by_what_it_does():
    """In 2 of 400 frames both quantiles are 0; in 1 of 100 000 the deviation is a hundredth of the range."""
    values = np.zeros((400, 1), np.float32)
    values[60:62] = 1
    found = scaling(column_stats(values, "x"), "quantile", 0.01)
    assert found.forward(values).min() == -1 and found.forward(values).max() == 1
    assert "q01 and q99 together" in scale_notices(column_stats(values, "x"), "quantile", 0.01, "action")[0]
    values = np.zeros((100_000, 1), np.float32)
    values[7] = 1
    assert scaling(column_stats(values, "x"), "z_score", 0.01).forward(values).max() < 101
    assert "moves rarely" in scale_notices(column_stats(values, "x"), "z_score", 0.01, "action")[0]


def test_old_rules_and_floors_of_peers():
    values = np.full((100, 1), 5, dtype=np.float32)
    for rule, expected in (("centred", 0.0), ("absolute", -1.0)):
        found = scaling(column_stats(values, "x"), "quantile", 0.01, rule=rule)
        assert found.scale == np.float32(0.01) and found.forward(values)[0, 0] == expected
    assert scaling(column_stats(values, "x"), "z_score", 0.0, 1e-6, "absolute").scale == np.float32(1e-6)


def test_unknown_normalisation():
    with pytest.raises(ConfigError, match="'z_score' or 'quantile', found 'minmax'"):
        scaling(STATS.state, "minmax", 1e-3)
    with pytest.raises(ConfigError, match="norm_rule must be one of relative"):
        scaling(STATS.state, "quantile", 1e-3, rule="other")


def test_padding_is_zero_and_behind():
    found = PadDimensions(3, 2, 6, 4).forward(Sample(np.ones((1, 3), np.float32), np.ones((1, 2, 2), np.float32)))
    assert found.state.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert found.actions.tolist() == [[[1, 1, 0, 0]] * 2]


def test_normalize_scales_each_dimension_by_its_own():
    step = Normalize(Scaling(np.float32([1, 2]), np.float32([10, 100]), 0), Scaling(np.float32([0]), np.float32([2]), 0))
    found = step.forward(Sample(np.array([[11, 102]], np.float32), np.array([[[4]]], np.float32)))
    assert found.state.tolist() == [[1, 1]]
    assert found.actions.tolist() == [[[2]]]


def test_training_and_inference_give_the_network_the_same():
    """The state and prompt that `observe` makes are those of the training path."""
    steps = chain()
    state = RANDOM.normal(size=(2, 3)).astype(np.float32)
    found = steps.observe([Observation({"base": PICTURE, "wrist": PICTURE}, row, "press it") for row in state])
    trained = steps.forward(Sample(state, np.zeros((2, 4, 2), np.float32)))
    expected = steps.to_model(np.full((2, 2, 8, 8, 3), 9, np.uint8), np.ones((2, 2), dtype=bool), trained.state, ["press it"] * 2)
    for field in dataclasses.fields(found):
        assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name


def test_missing_camera_is_masked_and_pictures_are_resized():
    found = chain().observe(
        [Observation({"wrist": PICTURE}, np.zeros(3, np.float32), "a"), Observation({"base": PICTURE[:4]}, np.zeros(3, np.float32), "bc")]
    )
    assert found.image_mask.tolist() == [[False, True], [True, False]]
    assert (found.images[0, 1] == 9).all()
    assert not found.images[0, 0].any()
    assert (found.images[1, 0, 2:6] == 9).all()
    assert not found.images[1, 0, :2].any()


def test_prompt_padding_is_trimmed_to_a_multiple_of_eight():
    seen = [Observation({"base": PICTURE}, np.zeros(3, np.float32), text) for text in ("a" * 8, "b")]
    found = chain().observe(seen)
    assert found.prompt_tokens.shape == (2, 16)
    assert found.prompt_mask.sum(dim=1).tolist() == [9, 2]
    assert chain().observe(seen[1:]).prompt_tokens.shape == (1, 8)


@pytest.mark.parametrize(
    ("images", "state", "words"),
    [
        ({"bose": PICTURE}, [0, 0, 0], "found .*bose"),
        ({}, [0, 0, 0], "must hold pictures"),
        ({"base": PICTURE}, [0, 0], r"numbers \[3\], found float32 \[2\]"),
        ({"base": PICTURE}, [0], r"numbers \[3\], found float32 \[1\]"),  # would broadcast
        ({"base": PICTURE}, [0, np.nan, 0], "finite"),
        ({"base": PICTURE[..., :1]}, [0, 0, 0], r"uint8 \[height, width, 3\]"),
    ],
)
def test_wrong_observations_are_refused(images, state, words):
    with pytest.raises(ObservationError, match=words) as caught:
        chain().observe([Observation(images, np.array(state, dtype=np.float32), "press")])
    assert "\n" not in str(caught.value)


def test_a_robot_wider_than_the_network_or_its_statistics_is_refused():
    with pytest.raises(ConfigError, match=r"action is 2 wide, the model's 1.*model\.action_dim"):
        chain(padded_action_dim=1)
    with pytest.raises(ConfigError, match=r"state is 3 wide, the model's 2.*model\.state_dim"):
        chain(padded_state_dim=2)
    with pytest.raises(ConfigError, match="norm stats of the action are 2 wide"):
        chain(dataclasses.replace(ROBOT, robot_action_dim=3))
