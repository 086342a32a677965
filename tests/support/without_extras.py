"""Run a program as after `pip install pi0fm` without extras: distributions that pi0fm does not require are not found.

python tests/support/without_extras.py PROGRAM WORDS ...     runs `pi0fm.cli.main.main(WORDS)` where PROGRAM is pi0fm, else PROGRAM
"""

import re
import runpy
import sys
import tomllib
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def plain(name: str) -> str:
    """A distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def brought() -> set[str]:
    """The distributions that the dependencies bring, and theirs, without any extra that is not asked for."""
    needs = [(need, "") for need in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    found: set[tuple[str, str]] = set()
    while needs:
        text, extra = needs.pop()
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *need.extras):
            key = (plain(need.name), wanted)
            if key not in found:
                found.add(key)
                try:
                    needs += [(text, wanted) for text in requires(need.name) or []]
                except PackageNotFoundError:  # of another platform
                    continue
    return {name for name, _ in found}


class Without:
    """The finder of modules on sys.path, without those of some distributions."""

    def __init__(self, hidden: set[str], kept: set[str]) -> None:
        self.hidden, self.kept = hidden, kept

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if path is None and name.split(".", maxsplit=1)[0] in self.hidden:
            return None
        return PathFinder.find_spec(name, path, target)  # type: ignore[arg-type]

    def find_distributions(self, context: DistributionFinder.Context) -> Iterable[Distribution]:
        return [found for found in PathFinder.find_distributions(context) if plain(found.name) in self.kept]


def hide() -> None:
    """Hide every module that no distribution of `brought` has, ours apart."""
    kept = brought() | {"pi0fm", "pi0fm-client"}
    hidden = {module for module, owners in packages_distributions().items() if not {plain(owner) for owner in owners} & kept}
    places = [place for place, finder in enumerate(sys.meta_path) if finder is PathFinder]
    for place in places:
        sys.meta_path[place] = Without(hidden, kept)  # type: ignore[call-overload]


if __name__ == "__main__":
    hide()
    program = sys.argv[1]
    if program == "pi0fm":
        from pi0fm.cli.main import main

        sys.exit(main(sys.argv[2:]))
    sys.argv = sys.argv[1:]
    runpy.run_path(program, run_name="__main__")
