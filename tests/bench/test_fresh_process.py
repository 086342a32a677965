"""A function in a process of its own: its answer, its error, its death, its memory."""

import os

import pytest

from pi0fm.bench.fresh_process import in_fresh_process, peak_resident
from pi0fm.errors import ConfigError, Pi0fmError

LARGE = 300 * 2**20


def refuse(text: str) -> None:
    raise ConfigError(text)


def peaks() -> tuple[int, int, int]:
    """Process, peak at the start, peak after something large was there and went."""
    before = peak_resident()
    large = bytearray(b"x") * LARGE
    del large
    return os.getpid(), before, peak_resident()


def test_the_peak_is_that_of_the_new_process_and_remembers_what_was_freed():
    held = bytearray(b"x") * LARGE  # what this process holds is not the new one's
    process, before, after = in_fresh_process(peaks)
    assert process != os.getpid()
    assert before < LARGE
    assert 0.99 * LARGE < after - before < 1.1 * LARGE  # the kernel counts pages in lots
    assert len(held) == LARGE


def test_an_error_keeps_its_class_and_line():
    with pytest.raises(ConfigError, match="found 7"):
        in_fresh_process(refuse, "found 7")


def test_a_process_that_dies_is_one_line():
    with pytest.raises(Pi0fmError, match="must end by itself"):
        in_fresh_process(os._exit, 9)
