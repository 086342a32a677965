"""docs/structure.md names every module of pi0fm and its client, and every function that it draws exists. Sources are read, not imported."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pi0fm"
CLIENT = ROOT / "client" / "pi0fm_client"
STRUCTURE = (ROOT / "docs" / "structure.md").read_text()
LOG = (ROOT / "docs" / "LOG.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "deploy" / "README.md"])
DECISIONS = sorted((ROOT / "docs" / "adr").glob("*.md"))
ONE_PAGE = 60  # lines

ROW = re.compile(r"^\| `((?:\w+/)*\w+\.py)` +\| ", re.MULTILINE)
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def modules() -> set[str]:
    """Every module with content: relative to pi0fm/, the client's with their package's name in front."""
    roots = {PACKAGE: PACKAGE, CLIENT: CLIENT.parent}
    return {str(path.relative_to(root)) for package, root in roots.items() for path in package.rglob("*.py") if path.stat().st_size}


@cache
def names_in(module: Path) -> dict[str, ast.stmt]:
    """What a module defines at its top: functions, classes, assignments. What it imports is not its own."""
    return defined(ast.parse(module.read_text()).body)


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = statement
        elif isinstance(statement, ast.Assign):
            found.update({target.id: statement for target in statement.targets if isinstance(target, ast.Name)})
    return found


def resolves(dotted: str) -> bool:
    """Whether `layer.module.function` or `layer.module.Class.method` is defined in that module."""
    words = dotted.split(".")
    root = CLIENT.parent if words[0] == CLIENT.name else PACKAGE
    module = next((length for length in (3, 2, 1) if root.joinpath(*words[:length]).with_suffix(".py").is_file()), None)
    if module is None:
        return False
    names = names_in(root.joinpath(*words[:module]).with_suffix(".py"))
    for word in words[module:]:
        if word not in names:
            return False
        statement = names[word]
        names = defined(statement.body) if isinstance(statement, ast.ClassDef) else {}
    return True


def drawn_names() -> list[str]:
    """The dotted names of our modules inside fenced drawings."""
    layers = "|".join(sorted({name.split("/")[0].removesuffix(".py") for name in modules()}))
    dotted = re.compile(rf"(?<![\w./-])(?:{layers})(?:\.\w+)+(?![\w/])")
    found = {name for block in BLOCK.findall(STRUCTURE) for name in dotted.findall(block)}
    return sorted(name for name in found if not name.endswith((".py", ".json", ".jsonl", ".md")))


def test_every_module_has_one_row_and_every_row_a_module() -> None:
    rows = ROW.findall(STRUCTURE)
    assert sorted(rows) == sorted(set(rows)), "a module is listed twice"
    assert set(rows) == modules()


@pytest.mark.parametrize("name", drawn_names())
def test_what_is_drawn_exists(name: str) -> None:
    assert resolves(name), f"docs/structure.md draws {name}, which pi0fm does not define"


def test_the_three_journeys_are_drawn_with_names() -> None:
    for heading, least in (("### A training batch", 12), ("### An inference request", 8), ("### An evaluation episode", 8)):
        section = STRUCTURE.split(heading)[1].split("\n#")[0]
        assert sum(name in section for name in drawn_names()) >= least, heading


@pytest.mark.parametrize(
    "name",
    [
        "train.loop.no_such_function",
        "pi0fm_client.client.PolicyClient.no_such_method",
        "flow.path.CondOT.no_such_method",
        "flow.no_such_module.f",
        "train.loop.Path",
        "data.order.counter.gone",
    ],
)
def test_a_name_that_is_gone_is_found_out(name: str) -> None:
    assert not resolves(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_lines_fit(page: Path) -> None:
    text = page.read_text()
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert missing == []
    too_wide = [line for line in text.splitlines() if len(line) > 140 and "http" not in line]
    assert page.parent.name == "deploy" or too_wide == []


def test_decisions_are_numbered_without_gap_in_structure() -> None:
    """Every number has a row: a link to its page, or the word that it is withdrawn and where its text went."""
    rows = re.findall(r"^\| (?:\[(\d+)\]\(adr/(\d+)-[\w-]+\.md\) \| |(\d+) \| withdrawn\b.*; see \S)", STRUCTURE, re.MULTILINE)
    assert [int(number or withdrawn) for number, _, withdrawn in rows] == list(range(1, len(rows) + 1))
    assert [page.name[:4] for page in DECISIONS] == [file for _, file, _ in rows if file], "a page without a row, or a row without a page"
    assert all(int(number) == int(file) for number, file, _ in rows if file)


def test_the_log_opens_with_a_scoreboard_whose_commands_exist_and_whose_dates_have_entries() -> None:
    headings = re.findall(r"^## (.*)$", LOG, re.MULTILINE)
    assert headings[0] == "Scoreboard"
    machines = set(re.findall(r"^Machine (\w+): ", LOG, re.MULTILINE))
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", LOG.split("\n## ")[1], re.MULTILINE)]
    assert rows[0] == ["figure", "best", "command", "machine", "date"]
    assert len(rows) > 10
    for figure, best, commands, machine, date in rows[2:]:
        assert figure and best
        assert machine in machines
        assert any(heading.startswith(date) for heading in headings), f"no entry of {date}"
        for words in (each.split() for each in re.findall(r"`([^`]+)`", commands)):
            path = [word for word in words[1:3] if not word.startswith("-")]
            question = f"bench/{path[-1]}"
            folders = ("", "judging/", "training/")
            typed = [f"cli/{folder}{'_'.join(path)}" for folder in folders]
            places = (*typed, question, f"{question}/run", f"bench/{'_'.join(path)}")  # a command, or a group's
            known = any((PACKAGE / f"{place}.py").is_file() for place in places)
            assert (known and words[0] == "pi0fm") or words[0] == "make", words


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_is_one_page_with_a_status_and_its_four_parts(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(lines) <= ONE_PAGE
    assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Weighed", "## Consequences"]
    status = re.fullmatch(r"Status: (accepted|superseded by (\d+))", lines[2])
    assert status is not None, f"the third line of {page.name} must be `Status: accepted` or `Status: superseded by N`, found {lines[2]!r}"
    assert status[2] is None or any(int(status[2]) == int(other.name[:4]) > int(page.name[:4]) for other in DECISIONS)
