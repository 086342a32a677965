"""Tests of the site of docs/: every page is in the menu, links are valid, quoted error lines are the program's, examples run."""

import ast
import importlib.util
import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny_dataset
import yaml

ROOT = Path(__file__).resolve().parents[2]
TROUBLES = ROOT / "docs" / "guides" / "troubleshooting.md"
HOLE = "\0"  # what an f-string fills in


class _Loader(yaml.SafeLoader):
    """YAML loader for the custom tags of mkdocs.yml."""


_Loader.add_constructor("!ENV", lambda loader, node: None)
MENU = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"]


def listed(menu: Any) -> set[str]:
    """The pages of a menu of mkdocs."""
    if isinstance(menu, str):
        return {menu}
    return set().union(*(listed(item) for item in (menu.values() if isinstance(menu, dict) else menu)))


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / ".ci" / "site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_menu(hook: Any) -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "adr"}
    assert listed(MENU) == pages | set(hook.MOVED.values())


@pytest.mark.parametrize(
    ("text", "source", "found"),
    [
        ("[log](docs/LOG.md)", "README.md", "[log](LOG.md)"),
        ("[robot](docs/guides/serving.md#watching)", "README.md", "[robot](guides/serving.md#watching)"),
        ("![a](docs/quickstart.png)", "README.md", "![a](quickstart.png)"),
        ("[start](../../README.md)", "docs/guides/serving.md", "[start](../index.md)"),
        ("[safe](../../SECURITY.md)", "docs/guides/serving.md", "[safe](../SECURITY.md)"),
        ("[50 Hz](robot_at_50hz.md)", "docs/guides/serving.md", "[50 Hz](robot_at_50hz.md)"),
        ("[step](pi0fm/train/step.py)", "README.md", "[step](https://HOST/x/blob/main/pi0fm/train/step.py)"),
        ("[pages](docs/adr)", "README.md", "[pages](https://HOST/x/tree/main/docs/adr)"),
        ("[out](https://example.org) [here](#there)", "README.md", "[out](https://example.org) [here](#there)"),
    ],
)
def test_a_link_leads_to_the_page_or_to_the_source(hook: Any, text: str, source: str, found: str) -> None:
    assert hook.relinked(text, source, hook.MOVED, "https://HOST/x/") == found


def test_without_an_address_a_source_is_named_by_its_path(hook: Any) -> None:
    assert hook.relinked("[step](pi0fm/train/step.py)", "README.md", hook.MOVED, "") == "step (`pi0fm/train/step.py`)"
    assert hook.relinked("[pi0fm/train/step.py](pi0fm/train/step.py)", "README.md", hook.MOVED, "") == "pi0fm/train/step.py"


def strings() -> list[str]:
    """Every string of the program, what is filled in as HOLE."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else HOLE

    sources = [*(ROOT / "pi0fm").rglob("*.py"), *(ROOT / "client" / "pi0fm_client").rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source.read_text()))]
    return [text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]


def test_a_quoted_error_line_is_one_of_the_program() -> None:
    rows = re.findall(r"^- (`.*):$", TROUBLES.read_text(), re.MULTILINE)
    quoted = [line for row in rows for line in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 10
    known = strings()
    for line in quoted:
        pattern = re.compile(".+".join(f"(?:{re.escape(part)})" for part in line.split("...") if part.strip()), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"no error of the program reads {line!r}"


@pytest.fixture(scope="module")
def own_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/02_own_loop.py writes after two steps."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run(patch, "02_own_loop.py", tiny_dataset.written(tmp_path_factory), folder / "bundle", 2)
    return folder / "bundle"


def run(patch: pytest.MonkeyPatch, name: str, *words: object) -> None:
    program = str(ROOT / "examples" / name)
    patch.setattr(sys, "argv", [program, *map(str, words)])
    runpy.run_path(program, run_name="__main__")


def test_a_loop_of_ones_own_ends_in_a_bundle_that_answers(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (own_bundle / "reference.safetensors").is_file()
    run(monkeypatch, "01_infer.py", own_bundle)
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_network_of_ones_own_finds_the_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "03_own_network.py", 400)
    near = re.search(r"(\d+)% are within", capsys.readouterr().out)
    assert near is not None and int(near[1]) >= 60


def test_arrays_of_ones_own_end_in_a_bundle_in_robot_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "04_own_data.py", tmp_path / "bundle", 2)
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    assert capsys.readouterr().out.count("ends at") == 2


def test_a_policy_of_ones_own_is_served(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "05_own_policy.py", 400)
    ends = [[float(number) for number in re.findall(r"-?\d+\.\d*", line)] for line in capsys.readouterr().out.splitlines()]
    assert len(ends) == 2
    for first, second, first_goal, second_goal in ends:
        assert abs(first - first_goal) < 0.5 and abs(second - second_goal) < 0.5


def test_a_policy_of_ones_own_is_evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gym_pusht")
    run(monkeypatch, "06_own_evaluation.py", 2, 16)
    assert capsys.readouterr().out.splitlines()[0] == "standing still: 0 of 2, 95 % interval 0% to 66%"


def test_the_citation_has_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_a_workflow_types_commands_that_exist(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = workflow.read_text()
    assert set(re.findall(r"\bmake (\w+)", text)) <= targets
    assert all((ROOT / script).is_file() for script in re.findall(r"bash (\.ci/\w+)", text))
    assert all(job["timeout-minutes"] <= 120 for job in yaml.safe_load(text)["jobs"].values())
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
