"""Tests that the import hook of tests/conftest.py is active and shapes are checked."""

import jaxtyping
import pytest

from pi0fm import options, progress


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="seconds"):
        progress.clock("a minute")  # type: ignore[arg-type]
    with pytest.raises(jaxtyping.TypeCheckError, match="word"):
        options.nearest(3, ["train"])  # type: ignore[arg-type]


def test_an_int_passes_for_a_float() -> None:
    assert progress.clock(60) == "01:00"
