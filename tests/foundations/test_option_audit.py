"""Tests that every option of every command is honoured or refused: it is read by code that acts, and a value out of range is refused.

The first is told by the types of the code (option_reads), the second by parsing each option with values that no option may have.
"""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from option_reads import read_code

from pi0fm import options
from pi0fm.cli import main as command_line
from pi0fm_client.errors import ConfigError

READ_OTHERWISE = {
    "output_dir": "pi0fm bench reads it of any measurement's options (cli/bench)",
    "tracker_project": "a tracker reads it from the run's encoded options (train/watch/trackers)",
    "path": "of the demo: FLOW_ONLY names it (cli/flow_demo)",
    "prediction": "of the demo, as path",
    "loss_weighting": "of the demo, as path",
}
ANY_NUMBER = {"flow.logit_normal_mu": "the logit of a time"}
PLAN_IGNORES = "plan num_workers"  # replaced by --gpus, as its help says
TEXTS = {
    "a place, a name or an address, looked for when the command runs": (
        *("dataset.repo_id", "dataset.root", "data", "policy", "server", "ray_address", "checkpoint_dir", "output_dir", "metrics", "host"),
        *("tokenizer", "tokenizer_name", "robot", "token", "tracker_project", "embodiment.name", "bundle", "root"),
    ),
    "a column, compared with the data set's": ("embodiment.state", "embodiment.action", "weight_column"),
    "a word that is compared when its table is read": ("tasks", "cameras", "suite", "gpu", "task"),
}
FREE_TEXT = {name for names in TEXTS.values() for name in names}
NEEDED = {"tasks": "reach-v3"}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command, sub-command and form by name."""
    for name, text in command_line.COMMANDS.items():
        found = command_line.find((name,))
        assert text
        if hasattr(found, "SUBCOMMANDS"):
            yield from ((f"{name} {each}", command_line.find((name, each))) for each in found.SUBCOMMANDS)
            continue
        yield name, found
        yield from ((f"{name} {key}", form) for key, form in vars(found).items() if key.isupper() and hasattr(form, "Options"))


COMMANDS = dict(commands())


def groups(cls: type, found: dict[type, None]) -> None:
    """Collect a dataclass of options, and those in its fields."""
    if cls not in found:
        found[cls] = None
        for hint in typing.get_type_hints(cls).values():
            for each in (hint, *typing.get_args(hint)):
                inner = each if isinstance(each, type) and dataclasses.is_dataclass(each) else None
                if inner is not None:
                    groups(inner, found)


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, "dataclasses.Field[Any]"]]:
    """Dotted name, type and field of every option; an entry of a group under the user's names is called `one`."""
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        hint = hints[each.name]
        group = options._dataclass_in(hint)
        named = options._dataclass_in(typing.get_args(hint)[1]) if typing.get_origin(hint) is dict else None
        if group is not None or named is not None:
            yield from leaves(group or named, f"{prefix}{each.name}.{'' if group else 'one.'}")
        else:
            yield f"{prefix}{each.name}", hint, each


def unread(classes: list[type], code: Any) -> list[str]:
    """Fields that no typed expression reads."""
    found = []
    for cls in classes:
        family = [f"{each.__module__}:{each.__qualname__}" for each in cls.__mro__]
        names = [each.name for each in dataclasses.fields(cls)]
        found += [f"{cls.__qualname__}.{name}" for name in names if not any(name in code.reads.get(each, ()) for each in family)]
    return found


def test_every_option_is_read_by_code_that_acts(repository: Path) -> None:
    found: dict[type, None] = {}
    for command in COMMANDS.values():
        groups(command.Options, found)
        if hasattr(command, "NETWORK"):
            groups(command.NETWORK, found)
    assert len(found) > 45 and sum(len(dataclasses.fields(cls)) for cls in found) > 600
    code = read_code((repository / "pi0fm", "pi0fm"), (repository / "client/pi0fm_client", "pi0fm_client"))
    assert [name for name in unread(list(found), code) if name.rpartition(".")[2] not in READ_OTHERWISE] == []


def test_an_option_that_is_only_checked_would_be_found(tmp_path: Path) -> None:
    """A field that is validated, one that another class has too, and five ways to read one."""
    (tmp_path / "options.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Deep:\n    far: int = 1\n    idle: int = 1\n"
        "@dataclass\nclass Base:\n    deep: Deep = Deep()\n    named: 'dict[str, Deep] | None' = None\n"
        "    alike: int = 1\n    checked: int = 1\n    looked: int = 1\n"
        "    def __post_init__(self):\n        assert self.checked and self.alike\n"
        "@dataclass\nclass Other:\n    alike: int = 1\n"
    )
    (tmp_path / "use.py").write_text(
        "from package.options import Base, Other\ndef act(given: Base | None, other: Other):\n    run = given\n"
        "    total = run.deep.far + other.alike\n    for name in ('looked',):\n        total += getattr(run, name)\n"
        "    return [each.idle for each in (run.named or {}).values()], total\n"
    )
    reads = read_code((tmp_path, "package")).reads
    assert reads["package.options:Base"] == {"deep", "named", "looked"}
    assert reads["package.options:Deep"] - {"values"} == {"far", "idle"} and reads["package.options:Other"] == {"alike"}


def accepted(command: Any, name: str, value: str) -> bool:
    """Whether an option takes a value, beside those that the command and its groups require."""
    required = {
        each: NEEDED.get(each, "x")
        for each, _, field in leaves(command.Options)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and ".one." not in each
    }
    if ".one." in name:
        required[f"{name.partition('.one.')[0]}.one.dataset.repo_id"] = "a/b"
    words = [f"--{each}={text}" for each, text in {**required, name: value}.items()]
    try:
        options.parse(command.Options, words, command.ALIASES)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", COMMANDS)
def test_a_value_out_of_range_is_refused(name: str) -> None:
    command, taken = COMMANDS[name], []
    for option, hint, _ in leaves(command.Options):
        kinds, plain = set(options._choices(hint)), option.rpartition("one.")[2]
        wrong = [*(["-1000000000"] if kinds & {int, float} else []), *([".nan", ".inf", "-.inf"] if float in kinds else [])]
        if str in kinds and not {plain, plain.rpartition(".")[2]} & FREE_TEXT:
            wrong.append("no-such-word")
        if f"{name} {option}" == PLAN_IGNORES or option in ANY_NUMBER:
            wrong = [each for each in wrong if not each.startswith("-1") and not each.startswith("no")]
        taken += [f"--{option} {value}" for value in wrong if accepted(command, option, value)]
    assert taken == []


@pytest.mark.parametrize("name", ["train"])
def test_a_network_of_impossible_sizes_is_refused(name: str) -> None:
    network = COMMANDS[name].NETWORK
    numbers = [option for option, hint, _ in leaves(network, "model.") if set(options._choices(hint)) & {int, float}]
    assert len(numbers) > 12
    assert [option for option in numbers for value in ("-1", ".nan") if accepted(COMMANDS[name], option, value)] == []
