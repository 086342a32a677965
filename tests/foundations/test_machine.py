"""Tests of the memory and processors that the operating system reports, also in a container."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from pi0fm import machine
from pi0fm.policy import device

GIB = 2**30
INNER = "kubepods/pod7"


def group_of(version: int, kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a process's control group as the kernel lays it out; version: 0 for the newer, 1 for the older hierarchy."""
    monkeypatch.setattr(machine, "CGROUPS", root)
    monkeypatch.setattr(machine, "OWN_CGROUPS", root / "of_self")
    (root / "of_self").write_text(f"0::/{INNER}\n" if version == 0 else f"3:cpuset:/\n2:{kind},{kind}acct:/{INNER}\n0::/\n")
    group = root / INNER if version == 0 else root / kind / INNER
    group.mkdir(parents=True)
    return group


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"), [("max", 0, 0, None), (4 * GIB, GIB, 0, 3 * GIB), (4 * GIB, 4 * GIB, GIB, GIB)]
)
def test_a_container_s_limit_bounds_what_is_free(
    version: int, limit: object, used: int, cached: int, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached files are given back when memory is short, so they count as free."""
    group = group_of(version, "memory", tmp_path, monkeypatch)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    for name, content in zip(machine.CGROUP_MEMORY[version], (limit, used, f"anon 5\ninactive_file {cached}"), strict=True):
        (group / name).write_text(f"{content}\n")
    assert machine.free_memory() == (64 * GIB if free is None else free)


def test_a_machine_without_containers_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    assert machine.cores() == len(os.sched_getaffinity(0)) and machine.throttled_seconds() == 0
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize("where", ["own", "outer", "root of a container"])
@pytest.mark.parametrize(
    ("quota", "usable"),
    [(None, 64), (400_000, 4), (1_650_000, 16), (30_000, 1), (99_999_999, 64)],
    ids=["none", "4", "16.5", "0.3", "more"],
)
@pytest.mark.parametrize("version", [0, 1])
def test_processors_are_those_of_the_affinity_within_the_container_s_quota(
    version: int, quota: int | None, usable: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch, which knows no quota, would start a thread for each of the host's; all of them are then stopped together."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    own = group_of(version, "cpu", tmp_path, monkeypatch)
    group = {"own": own, "outer": own.parent, "root of a container": own.parents[1]}[where]
    if version == 0:
        (group / "cpu.max").write_text(f"{'max' if quota is None else quota} 100000\n")
        (group / "cpu.stat").write_text("usage_usec 9\nnr_throttled 3\nthrottled_usec 2500000\n")
    else:
        (group / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
        (group / "cpu.stat").write_text("nr_throttled 3\nthrottled_time 2500000000\n")
    assert machine.cores() == usable and machine.describe_machine()["cores"] == str(usable)
    assert machine.throttled_seconds() == pytest.approx(2.5)


@pytest.mark.parametrize(("given", "expected"), [(None, 1), (2, 2)])
def test_torch_keeps_within_the_quota_unless_told(given: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "cores", lambda: 1)
    try:
        torch.set_num_threads(3)
        device.set_threads(given)
        assert torch.get_num_threads() == expected
        monkeypatch.setattr(device, "cores", lambda: 8)
        device.set_threads(None)
        assert torch.get_num_threads() == expected, "fewer threads than processors, as Ray and torchrun give their workers"
    finally:
        torch.set_num_threads(before)
