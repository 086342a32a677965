"""The machine, the versions and the command line behind a measurement.

Owns: queries to the operating system. Does not know: the reports.
"""

import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_MEMORY = (  # files with limit, usage, and the statistics that hold the page cache; cgroup v2, then v1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
PACKAGES = ("pi0fm", "torch", "transformers", "ray", "lerobot", "numpy", "av")


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory and operating system."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
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
    for limit, used, statistics in CGROUP_MEMORY:
        try:
            bounds = [int((CGROUPS / name).read_text()) for name in (limit, used)]
            lines = (CGROUPS / statistics).read_text().splitlines()
        except (OSError, ValueError):  # no such file, or no limit (`max`)
            continue
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = min(free, bounds[0] - bounds[1] + cached)
    return max(0, free)


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
