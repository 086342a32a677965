"""Full disks, and folders that cannot be written."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MountSmallDisk = Callable[[str], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[MountSmallDisk]:
    """`small_disk("64k")`: a new folder on a tmpfs of that size. Only root can mount one; other users skip the test."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("a small file system needs root's mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(params=["below a file", "link to nothing", "no UTF-8", "read-only"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path, small_disk: MountSmallDisk) -> Path:
    """A folder that cannot be made."""
    if request.param == "read-only":
        disk = small_disk("64k")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return disk / "out"
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    no_utf8 = Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    return {"below a file": tmp_path / "file/out", "link to nothing": tmp_path / "link", "no UTF-8": no_utf8}[request.param]
