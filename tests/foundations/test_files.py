"""A reader sees the old content or the new one, never a part, whatever stops the writer."""

import json
import os
from pathlib import Path

import pytest

from pi0fm import files


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_bytes_makes_parents_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "weights"
    files.write_bytes(target, b"old")
    files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["weights"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("stopped_at", ["fsync", "replace"])
@pytest.mark.parametrize("reason", [OSError("no space left"), KeyboardInterrupt()])
def test_a_stopped_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: str, reason: BaseException
) -> None:
    target = tmp_path / "config.json"
    files.write_json(target, {"step": 1})

    def stop(*_: object) -> None:
        raise reason

    with monkeypatch.context() as patch:
        patch.setattr(os, stopped_at, stop)
        with pytest.raises(type(reason)):
            files.write_json(target, {"step": 2})
    assert json.loads(target.read_text()) == {"step": 1}
    assert names(tmp_path) == ["config.json"]


def test_json_refuses_numbers_that_json_has_not(tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(target, {"loss": float("nan")})
    assert names(tmp_path) == []


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    files.write_text(tmp_path / "prompt", "öffne die Schublade")
    assert (tmp_path / "prompt").read_bytes() == "öffne die Schublade".encode()


def test_new_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "bundle"
    with files.new_directory(target) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "weights").write_bytes(b"12")
        assert not target.exists()
        assert aside.parent == target.parent  # another file system could not rename it in one step
    assert (target / "inner" / "weights").read_bytes() == b"12"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("reason", [ValueError("bad weights"), KeyboardInterrupt()])
def test_a_stopped_new_directory_leaves_nothing(tmp_path: Path, reason: BaseException) -> None:
    with pytest.raises(type(reason)), files.new_directory(tmp_path / "bundle") as aside:
        (aside / "weights").write_bytes(b"1")
        raise reason
    assert names(tmp_path) == []


def test_new_directory_never_replaces_one_that_holds_something(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "theirs").write_bytes(b"1")
    with pytest.raises(OSError, match="bundle"), files.new_directory(target) as aside:
        (aside / "ours").write_bytes(b"2")
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["bundle"]
