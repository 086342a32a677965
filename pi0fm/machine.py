"""The machine, the versions and the command line behind a measurement.

Owns: queries to the operating system. Does not know: the reports.
"""

import contextlib
import functools
import itertools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_MEMORY = (  # files with limit, usage, and the statistics that hold the page cache; cgroup v2, then v1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
)
PACKAGES = ("pi0fm", "torch", "transformers", "ray", "lerobot", "numpy", "av")


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory and operating system."""
    return {
        "processor": _processor(),
        "cores": str(cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
    }


def describe_versions(*more: str) -> dict[str, str]:
    """Versions of Python, of PACKAGES, and of the packages named in `more`."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def release() -> str:
    """Return the version of the installed package; `0+checkout` for a checkout on PYTHONPATH, as on a bare GPU machine."""
    try:
        return metadata.version("pi0fm")
    except metadata.PackageNotFoundError:
        return "0+checkout"


@functools.cache
def version() -> str:
    """The package's version, and the commit of a checkout."""
    found, root = release(), Path(__file__).parents[1]
    if not (root / ".git").exists():
        return found
    asked = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return f"{found} ({asked.stdout.strip()})" if asked.returncode == 0 else found


def free_memory() -> int:
    """Return the bytes that this process can still allocate, within the memory of the machine and the limit of its container."""
    free = psutil.virtual_memory().available
    for folder, names in itertools.product(_cgroups("memory"), CGROUP_MEMORY):
        limit, used, statistics = (folder / name for name in names)
        try:
            bounds, lines = [int(path.read_text()) for path in (limit, used)], statistics.read_text().splitlines()
        except (OSError, ValueError):  # no such file, or no limit (`max`)
            continue
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = min(free, bounds[0] - bounds[1] + cached)
    return max(0, free)


def cores() -> int:
    """Return the number of processors that this process can use: those of its affinity, within the quota of its container.

    More threads than that are stopped together for the rest of each period (0.1 s) whose quota they have used up.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # version 2, then 1
            with contextlib.suppress(OSError, ValueError):  # no such file, or no quota (`max`)
                quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
                usable = min(usable, quota // period) if quota > 0 else usable
    return max(1, usable)


def throttled_seconds() -> float:
    """Return the time for which the container's processes were stopped since its start because their quota of processors was used up."""
    found = 0.0
    for folder, (word, unit) in itertools.product(_cgroups("cpu"), (("throttled_usec", 1e-6), ("throttled_time", 1e-9))):
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            found = max(found, unit * int(counts.get(word, 0)))
    return found


def command_line() -> str:
    """Return the command line as typed, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cgroups(kind: str) -> list[Path]:
    """Control groups that may bound this process's `kind`, from the innermost to the root; of version 2, then 1."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:  # no Linux
        return []
    inner = {name: Path(path.lstrip("/")) for _, names, path in lines for name in names.split(",")}
    mounts = ((CGROUPS, inner.get("", Path())), (CGROUPS / kind, inner.get(kind, Path())))
    return [mount / folder for mount, own in mounts for folder in (own, *own.parents)]
