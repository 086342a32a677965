"""Tests of the folder of a quickstart: places that cannot be written, and interrupted evaluations."""

import pytest

from pi0fm.cli import quickstart
from pi0fm.cli.main import main


@pytest.mark.parametrize("name", ["file", "file/below", "link"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert main(["quickstart", "--output_dir", str(tmp_path / name)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_evaluation_goes_on_where_it_was_interrupted_and_is_not_overwritten_where_it_ended(tmp_path):
    assert quickstart._fresh(tmp_path / "eval") == tmp_path / "eval"
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/episodes.jsonl").write_text("{}\n")
    assert quickstart._fresh(tmp_path / "eval") == tmp_path / "eval"
    (tmp_path / "eval/episodes.jsonl").unlink()
    assert quickstart._fresh(tmp_path / "eval") == tmp_path / "eval-2"
