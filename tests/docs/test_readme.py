"""Tests of README.md and the guides: the program decodes each command's options, each import exists."""

import ast
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from readme_blocks import PAGES, blocks, command_lines, pi0fm_words

from pi0fm.cli.main import COMMANDS, find, main

COMMAND_LINES = {tuple(command): page.name for page in PAGES for command in command_lines(page)}
OURS = sorted({tuple(words) for command in COMMAND_LINES if (words := pi0fm_words(command)) is not None})
# of other projects: that their options are right was seen once, by hand
FOREIGN = {"curl", "hf", "kill", "lerobot-eval", "lerobot-rollout", "lerobot-train", "sudo"}


def command_of(words: Sequence[str]) -> Any:
    """The command, a module or what stands for one, whose `run` the words call."""
    path = list(words[:1])
    while hasattr(command := find(path), "SUBCOMMANDS"):
        path = list(words[: len(path) + 1])
    return command.form(words) if hasattr(command, "form") else command


# Imported while tests are collected: the first import of torch and transformers may take longer than a test may.
FOUND = [command_of(words) for words in OURS]


@pytest.mark.parametrize(("words", "command"), zip(OURS, FOUND, strict=True), ids=[" ".join(words) for words in OURS])
def test_every_option_is_one_of_the_program(words: Sequence[str], command: Any, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
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
    others = {command: page for command, page in COMMAND_LINES.items() if pi0fm_words(command) is None}
    for command, page in others.items():
        match command:
            case ("git", "clone", address):
                assert address.endswith("/pi0fm")
            case ("cd", "pi0fm") | ("uv", "run", "pytest"):
                pass
            case ("make", target):
                assert target in targets
            case ("kubectl", "apply", "-k", folder):
                assert (repository / folder / "kustomization.yaml").is_file()
            case ("python" | "sbatch", program, *_):
                assert (repository / program).is_file()
            case ("pip", "install", folder):
                assert (repository / folder / "pyproject.toml").is_file()
            case ("ray", "start", "--head"):
                assert importlib.util.find_spec("ray") is not None
            case (program, *_) if program in FOREIGN:
                pass
            case _:
                pytest.fail(f"{page} shows a command that no test knows: {' '.join(command)}")
    assert set(others) >= {("make", "quickstart"), ("make", "test"), ("uv", "run", "pytest")}


def test_each_ratio_is_one_of_the_scoreboard_with_its_date_and_command(repository: Path) -> None:
    shown = table(repository / "README.md", "| measured | result | repeat it with | date |")
    known = table(repository / "docs" / "LOG.md", "| figure | best | command | machine | date |")
    assert len(shown) == 4
    for _, result, command, date in shown:
        words = command.strip("`").split()
        rows = [row for row in known if row[1] == result and row[4] == date]
        assert len(rows) == 1 and rows[0][2] == f"`{' '.join(words[:3])}`", f"docs/LOG.md's scoreboard has no {result} of {date}"
        decoded: list[object] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_of(words[1:]), "run", decoded.append)
            assert main(words[1:]) == 0
        assert len(decoded) == 1


def table(page: Path, head: str) -> list[list[str]]:
    """The rows below a table's head, cell by cell."""
    rows = page.read_text().split(f"{head}\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("text", [block.text for page in PAGES for block in blocks("python", page)])
def test_every_import_of_the_python_blocks_exists(text: str) -> None:
    """README's blocks run in tests/journeys/test_readme_journey.py, with a policy that its commands made."""
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
