"""Dispatch: exit codes, one-line errors on standard error, one JSON line on standard output."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pi0fm import options
from pi0fm.cli import main as command_line
from pi0fm.options import option
from pi0fm_client.errors import ConfigError, DatasetError, Pi0fmError


@dataclass(frozen=True)
class Options:
    steps: int = option(3, "how many")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Options], Any]], None]]:
    """Give the function that makes `pi0fm probe` run another function."""

    def install(run: Callable[[Options], Any]) -> None:
        module = ModuleType("pi0fm.cli.probe")
        module.__dict__.update(HELP="a command of this test", Options=Options, ALIASES={"count": "steps"}, run=run)
        monkeypatch.setitem(sys.modules, "pi0fm.cli.probe", module)
        monkeypatch.setitem(command_line.COMMANDS, "probe", module.HELP)

    yield install


@pytest.fixture
def group(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pi0fm group probe`: a command with one sub-command, which returns its options."""
    command(lambda options: {"steps": options.steps})
    module = ModuleType("pi0fm.cli.group")
    module.__dict__.update(HELP="commands of this test", SUBCOMMANDS={"probe": "a command of this test"})
    monkeypatch.setitem(sys.modules, "pi0fm.cli.group", module)
    monkeypatch.setitem(sys.modules, "pi0fm.cli.group_probe", sys.modules["pi0fm.cli.probe"])
    monkeypatch.setitem(command_line.COMMANDS, "group", module.HELP)


def fail_with(error: BaseException) -> Callable[[Options], None]:
    def run(_: Options) -> None:
        raise error

    return run


def test_the_last_line_of_standard_output_is_the_result(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda options: {"steps": options.steps})
    assert command_line.main(["probe", "--count", "5"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == {"steps": 5}
    assert captured.err == ""


def test_a_command_without_a_result_prints_nothing(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _: None)
    assert command_line.main(["probe"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DatasetError("no camera\n  'wrist'"), 1, "pi0fm: no camera 'wrist'\n"),
        (Pi0fmError("something"), 1, "pi0fm: something\n"),
        (ConfigError("steps must be above 0"), 2, "pi0fm: steps must be above 0\n"),
        (KeyboardInterrupt(), 130, "pi0fm: interrupted; what was finished is kept\n"),
    ],
    ids=["dataset", "base", "config", "interrupt"],
)
def test_a_fault_is_one_line_and_an_exit_code(
    command: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    command(fail_with(error))
    assert command_line.main(["probe"]) == code
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_ours_is_not_hidden(command: Any) -> None:
    command(fail_with(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        command_line.main(["probe"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "pi0fm: unknown command 'trian': did you mean 'train'? pi0fm --help lists all"),
        (["probe", "--stpes", "3"], "pi0fm: unknown option stpes: did you mean 'steps'? known: count, steps"),
        (["probe", "--steps", "many"], "pi0fm: option steps must be a whole number, found 'many'"),
        (["group", "prob"], "pi0fm: unknown command 'group prob': did you mean 'probe'? known: probe\n"),
        (["group", "--steps", "3"], "pi0fm: unknown command 'group --steps': known: probe\n"),
        (["group_probe"], "pi0fm: unknown command 'group_probe': did you mean 'group' or 'probe'? pi0fm --help lists all"),
    ],
)
def test_wrong_words_exit_with_2(group: None, capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert command_line.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_the_lists_of_commands_and_sub_commands(group: None, capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> None:
    assert command_line.main(words) == code
    shown = capsys.readouterr().out
    assert all(f"pi0fm {name}" in shown for name in ("quickstart", "demos", "train", "eval", "serve", "bench"))
    assert command_line.main(["group", *words]) == code
    shown = capsys.readouterr().out
    assert shown.startswith("pi0fm group: commands of this test")
    assert "pi0fm group probe" in shown


def test_a_sub_command_is_found_by_two_words(group: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["group", "probe", "--count", "5"]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps": 5}
    assert command_line.main(["group", "probe", "--help"]) == 0
    assert capsys.readouterr().out.startswith("pi0fm group probe [FILE.yaml ...] [--option value ...]: a command of this test")


def test_help_of_a_command_names_options_defaults_and_aliases(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _: pytest.fail("help ran the command"))
    assert command_line.main(["probe", "--steps", "many", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "a command of this test" in shown
    assert ["--steps", "3", "how", "many"] in [line.split() for line in shown.splitlines()]
    assert "--count is another name for --steps" in shown


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("name", ["train", "plan", "profile", "chaos", "doctor"])
def test_help_shows_what_people_set_and_all_of_it_on_demand(
    name: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    every = {row[0] for row in options.describe(command_line.find((name,)).Options)}
    shown = {}
    for words in (["--help"], ["--help", "all"]):
        assert command_line.main([name, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(len(line) <= int(columns) for line in lines[1:])
        shown[len(words)] = {line.split()[0] for line in lines if line.startswith("--")}
    assert len(shown[1]) <= (40 if name in ("train", "doctor") else 48) and shown[1] < every, "no name is split"
    assert every <= shown[2]
    assert name == "doctor" or "--model.decoder.depth" in shown[2]


def test_help_is_a_word_too(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda _: pytest.fail("help ran the command"))
    assert command_line.main(["help", "probe"]) == 0
    assert "a command of this test" in capsys.readouterr().out


def test_a_command_may_take_one_option_without_its_name(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda options: {"steps": options.steps})
    sys.modules["pi0fm.cli.probe"].__dict__["POSITIONAL"] = "steps"
    for words in (["probe", "5"], ["probe", "--steps", "5"], ["probe", "4", "--count", "5"]):
        assert command_line.main(words) == 0
        assert json.loads(capsys.readouterr().out) == {"steps": 5}
    assert command_line.main(["probe", "--help"]) == 0
    assert capsys.readouterr().out.startswith("pi0fm probe STEPS [FILE.yaml ...] [--option value ...]: a command of this test")


SUBJECTS = ("log", "policy", "bundle", "source", "baseline", "data")
"""Names of the option that holds what a command works on."""


@pytest.mark.parametrize("name", sorted({*command_line.COMMANDS} - {"bench", "flow", "quickstart"}))
def test_what_a_command_works_on_may_stand_first(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (command_line.find((name,)), *vars(command_line.find((name,))).values()):
        fields = getattr(getattr(module, "Options", None), "__dataclass_fields__", {})
        subject = next((each for each in SUBJECTS if each in fields), None)
        if subject is not None and hasattr(module, "run"):
            assert getattr(module, "POSITIONAL", None) == subject
            assert command_line.main([name, "--help"]) == 0
            assert capsys.readouterr().out.startswith(f"pi0fm {name} {subject.upper()} [")


@pytest.mark.parametrize("name", ["eval", "serve", "verify", "calibrate", "doctor", "compare", "convert"])
def test_a_mistyped_path_names_the_one_that_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outputs/run/bundle").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    more = {"eval": ["--tasks", "reach-v3"], "compare": ["outputs/other"], "convert": ["--output_dir", "x"]}.get(name, [])
    assert command_line.main([name, "outputs/run/bunlde", *more]) in (1, 2)
    assert "did you mean outputs/run/bundle?" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["infer", "export"])
def test_a_command_of_another_program_names_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([name, "outputs/run/bundle"]) == 2
    assert f"unknown command '{name}': type pi0fm " in capsys.readouterr().err


@pytest.mark.parametrize(("given", "found"), [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_waiting_threads_spin_briefly_unless_told(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: str | None) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "") if name in given else monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command_line.main(["--help"])
    assert os.environ.get("GOMP_SPINCOUNT") == found
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is gone after the test


def test_the_installed_program_and_the_module_agree_and_start_without_torch() -> None:
    code = (
        "import sys; from pi0fm.cli.main import main; code = main(['nothing']); print({'torch', 'ray'} & set(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    module = subprocess.run([sys.executable, "-m", "pi0fm.cli.main", "nothing"], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert (module.returncode, module.stdout, module.stderr) == (2, "", done.stderr)


def test_the_package_says_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import pi0fm

    assert pi0fm.__version__ == importlib.metadata.version("pi0fm")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", missing)
        assert pi0fm.__version__ == "0+checkout", "a bundle is written from a checkout on PYTHONPATH too"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pi0fm.nothing  # noqa: B018
