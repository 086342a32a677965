"""A file system of a few kilobytes, for what must survive a full disk."""

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
