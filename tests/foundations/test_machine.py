"""Tests of the memory that the operating system reports, also in a container."""

from pathlib import Path

import psutil
import pytest

from pi0fm import machine

GIB = 2**30


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"), [("max", 0, 0, None), (4 * GIB, GIB, 0, 3 * GIB), (4 * GIB, 4 * GIB, GIB, GIB)]
)
def test_a_container_s_limit_bounds_what_is_free(
    version: int, limit: object, used: int, cached: int, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached files are given back when memory is short, so they count as free."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    for name, content in zip(machine.CGROUP_MEMORY[version], (limit, used, f"anon 5\ninactive_file {cached}"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert machine.free_memory() == (64 * GIB if free is None else free)


def test_a_machine_without_containers_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "none")
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total
