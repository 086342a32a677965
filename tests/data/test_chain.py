"""The chain between robot units and tensors: every transform and its inverse, closed forms, and what is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi0fm.data.chain import Chain, DeltaActions, Normalize, PadDimensions, Sample, affine, make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
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
    offset, scale = affine(column_stats(values, "x"), "z_score", 1e-3)
    normal = (values - offset) / scale
    np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=0), 1, atol=1e-5)


def test_quantile_closed_form():
    values = np.linspace(-3, 7, 1001, dtype=np.float32)[:, None]
    offset, scale = affine(column_stats(values, "x"), "quantile", 1e-3)
    np.testing.assert_allclose((np.array([[-2.9], [2.0], [6.9]]) - offset) / scale, [[-1], [0], [1]], atol=1e-5)


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_a_dimension_that_hardly_moves_is_not_blown_up(kind):
    values = np.full((100, 1), 5, dtype=np.float32)
    values[0] += 1e-6
    offset, scale = affine(column_stats(values, "x"), kind, 0.01)
    assert scale == np.float32(0.01)
    assert abs((5.02 - offset) / scale) < 2.1


def test_unknown_normalisation():
    with pytest.raises(ConfigError, match="'z_score' or 'quantile', found 'minmax'"):
        affine(STATS.state, "minmax", 1e-3)


def test_padding_is_zero_and_behind():
    found = PadDimensions(3, 2, 6, 4).forward(Sample(np.ones((1, 3), np.float32), np.ones((1, 2, 2), np.float32)))
    assert found.state.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert found.actions.tolist() == [[[1, 1, 0, 0]] * 2]


def test_normalize_scales_each_dimension_by_its_own():
    step = Normalize(*(np.array(row, dtype=np.float32) for row in ([1, 2], [10, 100], [0], [2])))
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
