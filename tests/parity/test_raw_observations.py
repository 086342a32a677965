"""Tests of raw observations (pictures of any size, states in robot units) in our chain against LeRobot's processors.

The network's weights are the same on both sides once converted; here everything in front of them is compared.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from pi0fm.data.chain import make_chain
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.data.pictures.resizing import RESIZES, content_box
from pi0fm.data.prompt import PromptTokenizer, bins, load_tokenizer
from pi0fm_client.types import Observation

SIZES = [(480, 848), (240, 424), (256, 340), (340, 256), (480, 640), (720, 1280), (224, 224), (96, 96), (37, 311), (100, 223)]
RANDOM = np.random.default_rng(0)
STATES = RANDOM.normal(1, 3, (500, 5)).astype(np.float32)
STATES[:, 3], STATES[:, 4] = 0.25, (np.arange(500) == 7).astype(np.float32)  # never moves; moves once
STATS = NormStats(column_stats(STATES, "state"), column_stats(STATES[:, :3], "action"), 500)
ROBOT = Embodiment(cameras={"base": "base"}, state_dim=5, robot_action_dim=3)


def chain(normalization="quantile", resize="plain", rule="absolute", floor=5e-9, epsilon=0.0):
    return make_chain(
        ROBOT,
        STATS,
        PromptTokenizer(load_tokenizer("byt5", 384), 200, with_state=True, dialect="lerobot"),
        normalization=normalization,
        floor=floor,
        epsilon=epsilon,
        rule=rule,
        resize=resize,
        image_size=224,
        padded_state_dim=5,
        padded_action_dim=3,
    )


def smooth(height: int, width: int) -> np.ndarray:
    """A picture with structure at every scale, so that a shift of a pixel is seen."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(y * 255 // height), (x * 255 // width), ((x // 9 + y // 7) % 2) * 200], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_are_lerobots(height, width):
    from lerobot.policies.common.vla_utils import resize_with_pad_torch

    picture = smooth(height, width)
    ours = chain().observe([Observation({"base": picture}, STATES[0], "go")]).images[0, 0].float() / 255
    theirs = resize_with_pad_torch(torch.from_numpy(picture)[None].float() / 255, 224, 224)[0]
    assert (ours - theirs).abs().max() <= 0.5 / 255 + 1e-5  # ours are kept as whole numbers


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_are_openpis(height, width):
    """openpi_client.image_tools: PIL's bilinear filter into the integer part of size / ratio, centred."""
    ratio = max(width / 224, height / 224)
    box = int(height / ratio), int(width / ratio)
    resized = np.asarray(Image.fromarray(smooth(height, width)).resize(box[::-1], Image.Resampling.BILINEAR))
    expected = np.zeros((224, 224, 3), np.uint8)
    top, left = (224 - box[0]) // 2, (224 - box[1]) // 2
    expected[top : top + box[0], left : left + box[1]] = resized
    ours = chain(resize="antialias").observe([Observation({"base": smooth(height, width)}, STATES[0], "go")]).images[0, 0].numpy()
    assert np.abs(ours.astype(int) - expected).max() <= 1


def test_the_three_forms_differ_where_they_should():
    found = {resize: chain(resize=resize).observe([Observation({"base": smooth(480, 848)}, STATES[0], "go")]).images for resize in RESIZES}
    assert content_box(480, 848, 224, "antialias") == content_box(480, 848, 224, "plain") == (126, 224)
    assert content_box(480, 848, 224, "rounded") == (127, 224)
    assert not torch.equal(found["antialias"], found["plain"]) and not torch.equal(found["antialias"], found["rounded"])


def test_normalised_states_and_their_bins_are_lerobots():
    """A dimension that never moves, a value at a quantile and values beyond: the same numbers, and so the same words of the prompt."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor.normalize_processor import NormalizerProcessorStep

    raw = np.concatenate([STATES[:50], STATS.state.q01[None], STATS.state.q99[None], STATS.state.min[None]])
    for kind, mode in (("quantile", NormalizationMode.QUANTILES), ("z_score", NormalizationMode.MEAN_STD)):
        stats = {"observation.state": {name: getattr(STATS.state, name) for name in ("mean", "std", "q01", "q99", "min", "max")}}
        step = NormalizerProcessorStep(
            features={"observation.state": PolicyFeature(FeatureType.STATE, (5,))},
            norm_map={FeatureType.STATE: mode},
            stats=stats,
            eps=1e-8,
        )
        theirs = step._apply_transform(torch.from_numpy(raw), "observation.state", FeatureType.STATE).numpy()
        how = {"floor": 5e-9} if kind == "quantile" else {"floor": 0.0, "epsilon": 1e-8}
        found = chain(kind, **how).transforms[1].state.forward(raw)
        np.testing.assert_allclose(found, theirs, rtol=1e-6, atol=1e-6)
        if kind == "quantile":
            assert np.array_equal(found[:, 3], np.full(53, -1, np.float32))
            assert (found[50] == -1).all()
            discretized = np.digitize(theirs, np.linspace(-1, 1, 257)[:-1]) - 1  # LeRobot's pi05 processor
            assert [bins(row) for row in found] == [" ".join(map(str, row)) for row in discretized]
            assert bins(np.float32([-1, 0])) == "0 128"


def test_our_own_rule_equals_lerobots_where_no_dimension_is_degenerate():
    moving = NormStats(column_stats(STATES[:, :3], "state"), STATS.action, 500)
    from pi0fm.data.normalization import scaling

    for kind in ("quantile", "z_score"):
        ours, theirs = (scaling(moving.state, kind, floor, rule=rule) for floor, rule in ((0.01, "relative"), (5e-9, "absolute")))
        assert np.array_equal(ours.forward(STATES[:, :3]), theirs.forward(STATES[:, :3]))
