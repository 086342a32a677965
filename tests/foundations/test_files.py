"""Tests that a reader sees the old contents or the new, never a part, at any interruption of the writer."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pi0fm import files
from pi0fm_client.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_write_bytes_makes_parents_and_replaces(tmp_path: Path, umask: None) -> None:
    target = tmp_path / "a" / "b" / "weights"
    files.write_bytes(target, b"old")
    files.write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["weights"]
    assert target.stat().st_mode & 0o777 == 0o640, "the umask's mode"


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


def test_new_directory_appears_whole(tmp_path: Path, umask: None) -> None:
    target = tmp_path / "runs" / "bundle"
    with files.new_directory(target) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "weights").write_bytes(b"12")
        assert not target.exists()
        assert aside.parent == target.parent  # another file system could not rename it in one step
    assert (target / "inner" / "weights").read_bytes() == b"12"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode & 0o777 == 0o750


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


@pytest.mark.parametrize("exchange", [True, False])
def test_the_older_directory_keeps_its_name_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    target, older = tmp_path / "bundle", tmp_path / "bundle-2"
    if not exchange:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    for content in ("one", "two"):
        with files.new_directory(target, older) as aside:
            (aside / "weights").write_text(content)
            assert content == "one" or (target / "weights").read_text() == "one"
    assert (target / "weights").read_text() == "two"
    assert (older / "weights").read_text() == "one"
    assert names(tmp_path) == ["bundle", "bundle-2"]


KILLED = """
import sys, time
from pathlib import Path
from pi0fm import files
with files.new_directory(Path(sys.argv[1])) as aside:
    (aside / "weights").write_text("half")
    print(aside, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_is_swept_by_the_next_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    left = Path(writer.stdout.readline().strip())
    with files.new_directory(tmp_path / "bundle") as aside:
        assert (left / "weights").read_text() == "half", "its writer lives"
        aside.joinpath("weights").write_text("whole")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert left.exists()
    files.write_bytes(tmp_path / "bundle.json", b"another name")
    assert left.exists()
    with pytest.raises(KeyboardInterrupt), files.new_directory(target):
        assert not left.exists()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["bundle", "bundle.json"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "that this user may write to"),
        (errno.ENOTDIR, "a part of that name is a file"),
        (errno.EIO, "that disk is damaged or gone"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_with_its_remedy(tmp_path: Path, code: int, remedy: str) -> None:
    with pytest.raises(OutputError, match=remedy) as caught, files.write_faults(tmp_path / "out"):
        raise OSError(code, os.strerror(code), "out/model")
    assert "out/model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("thesis")
    with pytest.raises(OutputError, match="a part of that name is a file"), files.write_faults(tmp_path / "file/out"):
        files.write_bytes(tmp_path / "file/out/run.json", b"")
    assert (tmp_path / "file").read_text() == "thesis"


@pytest.mark.parametrize(("name", "rule"), [("a" * 300, "choose another name"), ("a\0b", "must not hold the character 0")])
def test_a_name_that_no_folder_can_have(tmp_path: Path, name: str, rule: str) -> None:
    for use in (files.make_folder, files.refuse_name):
        with pytest.raises(OutputError, match=rule):
            use(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize("place", ["/proc/out", "/proc/self", "/proc/self/fd/out", "/sys/out", "/dev/null/out"])
def test_a_place_that_takes_no_folder_or_no_file(place: str) -> None:
    with pytest.raises(OutputError, match=r"must be writable, found .*; .*(choose another|choose a folder)"):
        files.make_folder(Path(place))


def test_hidden_files_and_what_is_in_hidden_folders_are_not_listed(tmp_path: Path) -> None:
    for name in ("a/b.txt", "a/._b.txt", ".trash/c.txt", "a/.trash/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files.visible(tmp_path, "**/*.txt") == [tmp_path / "a/b.txt"]
    assert files.visible(tmp_path / "a/.trash") == [tmp_path / "a/.trash/c.txt"]
