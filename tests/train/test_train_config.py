"""Tests of the options of a run: ranges, the network, the split of a global batch."""

import pytest

from pi0fm.models.config import TINY
from pi0fm.train.components import RtcConfig
from pi0fm.train.config import TrainConfig
from pi0fm_client.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"global_batch_size": 0},
        {"micro_batch_size": 0},
        {"threads": 0},
        {"seed": -1},
        {"ema_decay": 1.0},
        {"precision": "float16"},
        {"normalization": "minmax"},
        {"norm_floor": 0.0},
        {"resume": "maybe"},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"keep_checkpoints": 0},
        {"execution_horizon": 17},
        {"execution_horizon": 0},
        {"rtc": RtcConfig(-1)},
        {"rtc": RtcConfig(16)},
    ],
)
def test_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_a_preset_and_its_changed_fields():
    assert TrainConfig().network() == TINY
    found = TrainConfig(model={"preset": "tiny", "action_horizon": 9, "decoder": {"depth": 2}}, execution_horizon=9).network()
    assert (found.action_horizon, found.decoder.depth, found.decoder.head_dim) == (9, 2, TINY.decoder.head_dim)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"preset": "tini"}, "did you mean 'tiny'"),
        ({"preset": "tiny", "decoder": {"dept": 3}}, "did you mean 'model.decoder.depth'"),
        ({"preset": "tiny", "decoder": {"num_kv_heads": 3}}, "num_kv_heads"),
        ({"preset": "tiny", "state_input": "words"}, "state_input"),
    ],
)
def test_a_network_that_does_not_exist(model, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(model=model)


@pytest.mark.parametrize(
    ("total", "micro", "workers", "expected"),
    [(32, None, 1, 32), (32, None, 4, 8), (32, 4, 2, 4), (32, 64, 2, 16), (6, 1, 3, 1), (32, None, 3, 11), (32, 5, 1, 5)],
)
def test_micro_batch(total, micro, workers, expected):
    assert TrainConfig(global_batch_size=total, micro_batch_size=micro).largest_micro_batch(workers) == expected


@pytest.mark.parametrize(
    ("total", "micro", "workers", "words"),
    [
        (2, None, 4, "at least the number of workers, found 2 for 4; type --global_batch_size 4"),
        (32, 1, 3, "shares of 10 and 11 samples .* found micro_batch_size 1; type --micro_batch_size 2"),
    ],
)
def test_a_batch_that_cannot_be_split(total, micro, workers, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(global_batch_size=total, micro_batch_size=micro).micro_steps(workers)
