"""Tests that progress lines show the share done and the remaining time, only on standard error."""

import pytest

from pi0fm import progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (59.4, "00:59"), (59.6, "01:00"), (3599, "59:59"), (3600, "1:00:00"), (36_061, "10:01:01"), (-5, "00:00")],
)
def test_clock(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text


def test_time_left_is_the_rate_so_far_times_the_rest() -> None:
    bar = progress.Step("recording", 40, 0, None)
    bar.advance(10)
    assert bar.line(bar._began + 20.0, "2/s") == "recording 10/40 (25%), 00:20 so far, 01:00 left, 2/s"


def test_a_resumed_step_takes_its_rate_from_this_run_only() -> None:
    bar = progress.Step("training", 100, 80, None)
    bar.advance(10)
    assert bar.line(bar._began + 30.0) == "training 90/100 (90%), 00:30 so far, 00:30 left"


def test_before_the_first_item_the_time_left_is_unknown() -> None:
    bar = progress.Step("training", 100, 80, None)
    assert bar.line(bar._began) == "training 80/100 (80%), 00:00 so far, ? left"


def test_nothing_to_do_is_all_done() -> None:
    bar = progress.Step("copying", 0, 0, None)
    assert "0/0 (100%)" in bar.line(bar._began)


def test_without_a_terminal_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.step("evaluating", 2) as bar:
        bar.advance()
        bar.advance(note="2 of 2 succeeded")
    progress.say("done")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-2:] == ["evaluating 2/2 (100%), 00:00 so far, 00:00 left, 2 of 2 succeeded", "done"]


def test_what_is_said_is_passed_on_during_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    with progress.passed_to(heard.append):
        progress.say("the disk is full")
    progress.say("not any more")
    assert heard == ["the disk is full"]
    assert capsys.readouterr().err == "the disk is full\nnot any more\n"
