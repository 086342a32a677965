"""Tests of prompts to tokens: known values, never cut."""

import time

import numpy as np
import pytest

from pi0fm.data.prompt import PromptTokenizer, bins, clean, load_tokenizer
from pi0fm_client.errors import ConfigError, ObservationError

STATE = np.zeros((1, 2), dtype=np.float32)


def tokenizer(max_tokens: int = 16, with_state: bool = False) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer("byt5", 384), max_tokens, with_state)


def text_of(ids: np.ndarray, mask: np.ndarray) -> str:
    """ByT5 keeps 0, 1 and 2 for itself: byte b is token b + 3."""
    return bytes((ids[mask] - 3).tolist()).decode()


def test_bytes_by_hand():
    ids, mask = tokenizer()(["ab é"], STATE)
    assert ids[0].tolist() == [ord("a") + 3, ord("b") + 3, ord(" ") + 3, 0xC3 + 3, 0xA9 + 3, ord("\n") + 3] + [0] * 10
    assert mask[0].tolist() == [True] * 6 + [False] * 10
    assert ids.dtype == np.int64


def test_ragged_prompts_are_padded_on_the_right():
    ids, mask = tokenizer()(["press", "open it", "press"], np.zeros((3, 2), dtype=np.float32))
    assert mask.sum(axis=1).tolist() == [6, 8, 6]
    assert np.array_equal(ids[0], ids[2])
    assert [text_of(*pair) for pair in zip(ids, mask, strict=True)] == ["press\n", "open it\n", "press\n"]


def test_cleaning_strips_and_turns_underscores_and_line_ends_into_spaces():
    assert clean("  open_the\ndrawer ") == "open the drawer"
    assert clean("open  the\n drawer") == "open  the  drawer", "spaces are not merged: openpi does not"
    for empty in ("", " \n", "__"):
        with pytest.raises(ObservationError, match="must say something"):
            tokenizer()([empty], STATE)


def test_a_prompt_that_does_not_fit_is_an_error_and_one_that_just_fits_is_not():
    assert tokenizer(6)(["press"], STATE)[1].all()
    with pytest.raises(ObservationError, match=r"must fit into 6 tokens, found 7.*'presse\\n'"):
        tokenizer(6)(["presse"], STATE)


def test_a_prompt_of_a_megabyte_is_refused_before_it_is_tokenised():
    one = tokenizer(16)
    began = time.perf_counter()
    for prompt in ("p" * 1_000_000, "\u20ac" * one.max_bytes):
        with pytest.raises(ObservationError, match=r"must fit into 16 tokens, found \d+ bytes"):
            one([prompt], STATE)
    assert time.perf_counter() - began < 1
    assert one.max_bytes >= 16, "no prompt that fits is refused"


def test_pi05s_dialect_writes_the_state_into_the_prompt():
    state = np.array([[-1.0, 0.0, 0.999, -1.5, 3.0]], dtype=np.float32)
    ids, mask = tokenizer(80, with_state=True)(["press_it"], state)
    assert text_of(ids[0], mask[0]) == "Task: press it, State: 0 128 255 -1 255;\nAction: "


ODD = "pick_up\n it "


@pytest.mark.parametrize(
    ("dialect", "with_state", "expected"),
    [
        ("openpi", False, "pick up  it\n"),
        ("lerobot", False, "pick_up\n it \n"),
        ("openpi", True, "Task: pick up  it, State: 0 128;\nAction: "),
        ("lerobot", True, "Task: pick up  it, State: 0 128;\nAction: "),
        ("openpi_stateless", True, "pick up  it\n"),
    ],
)
def test_dialects_by_string(dialect, with_state, expected):
    asked = PromptTokenizer(load_tokenizer("byt5", 384), 80, with_state, dialect)
    state = np.array([-1.0, 0.0], dtype=np.float32)
    assert asked.text(ODD, state) == expected
    assert text_of(*(array[0] for array in asked([ODD], state[None]))) == expected


def test_lerobots_line_end_is_not_doubled():
    asked = PromptTokenizer(load_tokenizer("byt5", 384), 80, dialect="lerobot")
    assert asked.text("press\n", STATE[0]) == "press\n"


@pytest.mark.parametrize(
    ("dialect", "with_state", "words"), [("openpy", True, "did you mean 'openpi'"), ("openpi_stateless", False, "a separate token")]
)
def test_a_dialect_that_does_not_fit(dialect, with_state, words):
    with pytest.raises(ConfigError, match=words):
        PromptTokenizer(load_tokenizer("byt5", 384), 80, with_state, dialect)


def test_bins_are_256_equal_parts():
    edges = np.linspace(-1, 1, 257, dtype=np.float64)
    middles = ((edges[1:] + edges[:-1]) / 2).astype(np.float32)
    assert bins(middles).split() == [str(number) for number in range(256)]


def test_the_state_does_not_enter_pi0s_prompt():
    found = tokenizer()(["press"] * 2, np.array([[0, 0], [1, 1]], dtype=np.float32))[0]
    assert np.array_equal(found[0], found[1])


def test_unknown_tokenizer_and_too_small_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match="gated"):
        load_tokenizer(str(tmp_path), 384)
    with pytest.raises(ConfigError, match=r"model.vocab_size"):
        load_tokenizer("byt5", 256)
