"""Tests of recordings in difficult folders: full, read-only, linked, mounted, damaged, locked."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from demos_help import config, submit

from pi0fm.demos.dataset import SETTINGS_FILE, Recording, published_episodes
from pi0fm.demos.record import record
from pi0fm_client.errors import DatasetError, OutputError


def recorded(root: Path, **changes: object) -> dict[str, object]:
    return record(config(root, **changes), submit, window=1)


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_full_disk_keeps_what_was_published_and_the_same_command_goes_on(tmp_path, small_disk):
    recorded(tmp_path / "whole", episodes=12)
    disk = small_disk("1m")
    root = disk / "set"
    recorded(root, episodes=5)
    before = files_of(root)
    used = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes((used.f_bavail - 3) * used.f_frsize))
    with pytest.raises(OutputError, match="No space left on device") as caught:
        recorded(root, episodes=12)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)
    assert files_of(root) == before and sorted(path.name for path in disk.iterdir()) == ["ballast", "set"]
    (disk / "ballast").unlink()
    assert recorded(root, episodes=12)["episodes"] == 24


def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_simulated(unwritable):
    with pytest.raises(OutputError) as caught:
        record(config(unwritable), lambda task, seed: pytest.fail("simulated in vain"), window=1)
    assert "\n" not in str(caught.value)


def test_the_data_set_behind_a_link_grows_and_the_link_stays(tmp_path):
    real, link = tmp_path / "disk/set", tmp_path / "here/set"
    real.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(real)
    assert recorded(link)["episodes"] == 6
    assert recorded(link, episodes=4)["episodes"] == 8
    assert link.is_symlink() and published_episodes(real) == 8
    assert [path.name for path in (*link.parent.iterdir(), *real.parent.iterdir())] == ["set", "set"]


def test_a_mount_point_is_refused_with_the_folder_to_type(tmp_path, small_disk):
    bound = tmp_path / "a volume"
    bound.mkdir()
    subprocess.run(["mount", "--bind", str(small_disk("1m")), str(bound)], check=True)
    try:
        with pytest.raises(OutputError, match=r"is a mount point.*type --dataset\.root .*/a volume/set"):
            recorded(bound)
        assert recorded(bound / "set")["episodes"] == 6
    finally:
        subprocess.run(["umount", str(bound)], check=True)


DAMAGES = {
    "a bit": lambda root: flip(root / "data/chunk-000/file-000.parquet"),
    "a bit of a video": lambda root: flip(root / "videos/observation.images.base/chunk-000/file-000.mp4"),
    "a video gone": lambda root: (root / "videos/observation.images.base/chunk-000/file-000.mp4").unlink(),
    "episodes cut": lambda root: os.truncate(root / "meta/episodes/chunk-000/file-000.parquet", 900),
    "info cut": lambda root: os.truncate(root / "meta/info.json", 100),
    "statistics gone": lambda root: (root / "meta/stats.json").unlink(),
    "another count": lambda root: (root / "meta/info.json").write_text(
        (root / "meta/info.json").read_text().replace('"total_episodes": 6', '"total_episodes": 5')
    ),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recording_does_not_go_on(tmp_path, damage):
    root = tmp_path / "set"
    recorded(root)
    DAMAGES[damage](root)
    before = files_of(root)
    with pytest.raises(DatasetError, match="damaged recording cannot continue") as caught:
        recorded(root, episodes=4)
    assert "\n" not in str(caught.value) and files_of(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("damage", ["a bit", "info cut"])
def test_a_recording_made_before_hashes_were_kept_goes_on_and_its_damage_is_seen(tmp_path, damage):
    root = tmp_path / "set"
    recorded(root)
    settings = json.loads((root / SETTINGS_FILE).read_text())
    assert set(settings.pop("files")) == {name for name in files_of(root) if not name.startswith("meta/") or "episodes" in name}
    (root / SETTINGS_FILE).write_text(json.dumps(settings))
    shutil.copytree(root, tmp_path / "other")
    assert recorded(root, episodes=4)["episodes"] == 8
    DAMAGES[damage](tmp_path / "other")
    with pytest.raises(DatasetError, match="damaged"):
        recorded(tmp_path / "other", episodes=4)


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    """A first process ends, and removes the file, between the second's opening and locking of it; a third then makes a new one."""
    from pi0fm import files

    root = tmp_path / "set"
    try_lock, third = files.try_lock, Recording(root, config(root))

    def ended_meanwhile(descriptor):
        monkeypatch.setattr(files, "try_lock", try_lock)
        shutil.rmtree(tmp_path / ".set.recording")
        third.__enter__()
        return try_lock(descriptor)

    monkeypatch.setattr(files, "try_lock", ended_meanwhile)
    with pytest.raises(OutputError, match="recorded by another process"), Recording(root, config(root)):
        pass
    third.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_modes_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        recorded(tmp_path / "set")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "set").rglob("*") if path.is_file()}
    assert modes == {0o640} and (tmp_path / "set").stat().st_mode & 0o777 == 0o750


def test_what_a_killed_recording_left_is_swept_by_the_next(tmp_path):
    import socket

    left = tmp_path / f".set.{socket.gethostname()}-0badc0de"
    (left / "data").mkdir(parents=True)
    recorded(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
