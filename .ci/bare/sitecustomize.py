"""Let this Python find only what a bare GPU machine has: `.ci/gpu --dry` puts this folder on PYTHONPATH, and child processes inherit it.

    torch, transformers, ... (PRESENT) and what they require    found as ever
    every other installed distribution                          not found, unless PYTHONPATH holds it: the unpacked wheels

Nothing is uninstalled.
"""

import importlib.metadata
import os
import re
import sys
from importlib.machinery import PathFinder

PRESENT = (
    *("torch", "transformers", "accelerate", "peft", "safetensors", "pyarrow", "numpy", "msgpack", "torchdiffeq", "jaxtyping", "jinja2"),
    *("rich", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "prometheus-client", "psutil", "matplotlib", "pyyaml"),
    *("tensorboard", "pillow", "pandas", "pip", "setuptools"),
)


def plain(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def present() -> set[str]:
    """The distributions of PRESENT and what they require, without extras."""
    waiting, found = [plain(name) for name in PRESENT], set()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [plain(re.match(r"[\w.-]+", line)[0]) for line in required if "extra ==" not in line]
    return found


def absent() -> set[str]:
    """The top-level modules that no present distribution brings."""
    there = present()
    brought = importlib.metadata.packages_distributions().items()
    return {module for module, names in brought if not any(plain(name) in there for name in names)}


class Bare:
    """Path entries without the absent modules; those of PYTHONPATH are searched for everything."""

    absent = absent()
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]  # noqa: RUF012

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in cls.absent:
            return PathFinder.find_spec(name, cls.places, target)
        return PathFinder.find_spec(name, path, target)

    @staticmethod
    def invalidate_caches():
        PathFinder.invalidate_caches()

    @staticmethod
    def find_distributions(*args, **kwargs):
        return PathFinder.find_distributions(*args, **kwargs)


Bare.__name__ = PathFinder.__name__  # by which jaxtyping finds it
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
