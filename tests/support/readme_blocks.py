"""Parser of README.md and the guides: their fenced blocks and the command lines in them."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs" / "guides").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks(language: str, page: Path = README) -> list[Block]:
    """The blocks of one language, from top to bottom."""
    return [Block(*found) for found in FENCE.findall(page.read_text()) if found[0] == language]


def command_lines(page: Path = README) -> list[list[str]]:
    """Every command of the shell blocks as words: continuation lines joined, comments dropped, `a && b` taken apart."""
    lines = "\n".join(block.text for block in blocks("bash", page)).replace("\\\n", " ").splitlines()
    commands: list[list[str]] = []
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                commands.append(words)
                words = []
    return commands


def pi0fm_words(command: Sequence[str]) -> list[str] | None:
    """What stands behind `pi0fm`, however it is started; None for another program."""
    words = list(command[2:] if tuple(command[:2]) == ("uv", "run") else command)
    if words[0] == "pi0fm":
        return words[1:]
    if words[0] == "torchrun" and "-m" in words and words[words.index("-m") + 1] == "pi0fm.cli.main":
        return words[words.index("-m") + 2 :]
    return None
