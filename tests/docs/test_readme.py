"""No line of README.md may rot: each command's options are decoded by the program itself, each import of its Python exists."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from readme_blocks import blocks, command_lines, pi0fm_words

from pi0fm.cli.main import COMMANDS, find, main

COMMAND_LINES = command_lines()
OURS = [words for command in COMMAND_LINES if (words := pi0fm_words(command)) is not None]


def command_of(words: list[str]) -> Any:
    """The command, a module or what stands for one, whose `run` the words call."""
    path = words[:1]
    while hasattr(command := find(path), "SUBCOMMANDS"):
        path = words[: len(path) + 1]
    return command.form(words) if hasattr(command, "form") else command


# Imported while tests are collected: the first import of torch and transformers may take longer than a test may.
FOUND = [command_of(words) for words in OURS]


@pytest.mark.parametrize(("words", "command"), zip(OURS, FOUND, strict=True), ids=[" ".join(words) for words in OURS])
def test_every_option_is_one_of_the_program(words: list[str], command: Any, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.chdir(repository)  # where configs/quickstart.yaml is found
    decoded: list[object] = []
    monkeypatch.setattr(command, "run", decoded.append)
    assert main(words) == 0
    assert len(decoded) == 1


def test_an_option_that_is_gone_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command_of(["train"]), "run", lambda options: None)
    assert main(["train", "--stepz", "3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_every_command_of_the_program_is_shown() -> None:
    assert {words[0] for words in OURS} == set(COMMANDS)


def test_every_other_command_exists_too(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    others = [command for command in COMMAND_LINES if pi0fm_words(command) is None]
    for command in others:
        match command:
            case ["git", "clone", str(address)]:
                assert address.endswith("/pi0fm")
            case ["cd", "pi0fm"] | ["uv", "run", "pytest"]:
                pass
            case ["make", str(target)]:
                assert target in targets
            case ["kubectl", "apply", "-k", str(folder)]:
                assert (repository / folder / "kustomization.yaml").is_file()
            case ["ray", "start", "--head"]:
                assert importlib.util.find_spec("ray") is not None
            case ["sudo", "apt-get", "install", *_]:
                pass
            case _:
                pytest.fail(f"README.md shows a command that no test knows: {' '.join(command)}")
    assert {tuple(command) for command in others} >= {("make", "quickstart"), ("make", "test"), ("uv", "run", "pytest")}


@pytest.mark.parametrize("text", [block.text for block in blocks("python")])
def test_every_import_of_the_python_blocks_exists(text: str) -> None:
    """The blocks themselves run in tests/journeys/test_readme_journey.py, with a policy that its commands made."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def test_the_packages_for_rendering_are_those_that_ci_installs(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    installed = re.search(r"packages=\((.*)\)", (repository / ".ci" / "run").read_text())
    assert installed is not None
    assert [package for package in installed[1].split() if package not in readme] == []
