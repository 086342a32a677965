"""`pi0fm COMMAND [FILE.yaml ...] [--option value ...]`: find the command, decode its options, print its result.

Owns: dispatch, help, exit codes, the last line of JSON. Does not know: what any command does.
Each command is a module of pi0fm/cli or of its folder that FOLDERS names, imported when it is called, with `HELP`, `Options`, `ALIASES`
and `run(options) -> result`, or with `SUBCOMMANDS`, name -> help line: modules COMMAND_NAME, or the results of its `subcommand(name)`.
A command of several forms has `form(words)`, which returns an object with these names. Optional names:

    POSITIONAL      the option that may stand first without its name, before or behind configuration files
    OTHERS          the option that takes the words after that, in the place of files
    NAMED_BY_ROW    the option of a folder that defaults to outputs/NAME_NAME for a row of several files
    DEFAULTS        function from the options given to default options
    OFTEN           of more than SHOWN options, those that --help shows; --help all shows the rest
    NETWORK         the dataclass whose fields are --model.FIELD
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm import options
from pi0fm_client.errors import ConfigError, Pi0fmError

SHOWN = 40  # most options that --help shows before it leaves out the rarely set ones
COMMANDS = {
    "quickstart": "record, train, evaluate, serve and evaluate over the network, with one command",
    "demos": "record scripted experts into a LeRobot data set",
    "doctor": "check a data set, configuration, bundle or server before training or serving",
    "train": "train a policy on a LeRobot data set",
    "plan": "estimate step time, memory and cost of a run on any number of cards",
    "runs": "list training runs with state, step and loss curve; compare several on one page",
    "eval": "evaluate a policy in simulation, or on recorded episodes",
    "compare": "compare evaluations on the same tasks and seeds",
    "convert": "convert openpi's and LeRobot's weights to a bundle, and back",
    "calibrate": "set a bundle's alarm threshold from held-out episodes",
    "verify": "check that a bundle computes here what it computed in training",
    "serve": "answer robots over the openpi WebSocket protocol",
    "replay": "repeat a server's request log, and compare two bundles on it",
    "flow": "show and measure the flows that policies are made of",
    "profile": "measure where the time of a run's steps goes",
    "chaos": "kill parts of a training run, and check that its weights stay the same",
    "bench": "measure pi0fm and its peers on this machine",
}
ELSEWHERE = {"infer": "pi0fm serve BUNDLE, or pi0fm.load(BUNDLE).infer in Python", "export": "pi0fm convert BUNDLE --to lerobot"}

FOLDERS = {
    **dict.fromkeys(("train", "plan", "runs", "profile", "chaos"), "training"),
    **dict.fromkeys(("doctor", "eval", "compare", "calibrate", "verify"), "judging"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code 0; 1 for a fault the user can correct; 2 for a wrong option; 130 on SIGINT, 143 on SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "OMP_WAIT_POLICY" not in os.environ:  # waiting threads spin for milliseconds, which stalls a busy machine (docs/LOG.md)
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        return _dispatch((), COMMANDS, words)
    except Pi0fmError as error:
        print(f"pi0fm: {' '.join(str(error).split())}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2 if isinstance(error, ConfigError) else 1))
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        extra = extra_with(library)
        if extra is None:
            raise
        print(f"pi0fm: this needs {library}, found none; type pip install 'pi0fm[{extra}]', or pi0fm[all]", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pi0fm: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def extra_with(library: str) -> str | None:
    """Return the extra of the installed package that includes a library: `train` if it does, never `all`; None if none does."""
    try:
        needs = metadata.requires("pi0fm") or []
    except metadata.PackageNotFoundError:
        return None
    found = [match for need in needs if (match := re.match(r"([\w-]+).*extra == .([\w-]+).", need))]
    extras = {match[2] for match in found if match[1].replace("-", "_") == library} - {"all"}
    return min(extras, key=lambda extra: (extra != "train", extra), default=None)


def _dispatch(path: tuple[str, ...], commands: Mapping[str, str], words: Sequence[str]) -> int:
    """Run the command that the first word names; if it has sub-commands, the one that the next word names."""
    if words == ["--version"] and not path:
        from pi0fm import machine  # imports psutil, which not every command needs

        print(f"pi0fm {machine.version()}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        _print_commands(path, commands)
        return 0 if words else 2
    name, rest = " ".join((*path, words[0])), words[1:]
    if words[0] == "help" and rest:
        return _dispatch(path, commands, [*rest, "--help"])
    if words[0] not in commands:
        if name in ELSEWHERE:
            raise ConfigError(f"unknown command {name!r}: type {ELSEWHERE[name]}")
        raise ConfigError(
            f"unknown command {name!r}: {options.nearest(words[0], commands, f'{" ".join(("pi0fm", *path))} --help lists all')}"
        )
    path = (*path, words[0])
    command = find(path)
    if hasattr(command, "SUBCOMMANDS"):
        return _dispatch(path, command.SUBCOMMANDS, rest)
    if hasattr(command, "form"):
        command = command.form(rest)
    if "-h" in rest or "--help" in rest:
        _print_options(name, command, everything="all" in rest)
        return 0
    words_first: dict[str, Any] = {name.lower(): _constant(command, name) for name in ("POSITIONAL", "OTHERS", "NAMED_BY_ROW", "DEFAULTS")}
    result = command.run(options.parse(command.Options, rest, command.ALIASES, **words_first))
    if result is not None:
        # one write: torchrun's workers share an unbuffered pipe, where print's newline may follow another worker's text
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return 0


def find(path: Sequence[str]) -> Any:
    """Return a command's module, or the result of its group's `subcommand(name)`."""
    group = importlib.import_module(f"pi0fm.cli.{path[0]}") if len(path) > 1 else None
    if group is not None and hasattr(group, "subcommand"):
        return group.subcommand(path[1])
    folder = f"{FOLDERS[path[0]]}." if path[0] in FOLDERS else ""
    return importlib.import_module(f"pi0fm.cli.{folder}{'_'.join(path)}")


def _constant(command: Any, name: str) -> Any:
    return getattr(command, name, None)


def _print_commands(path: tuple[str, ...], commands: Mapping[str, str]) -> None:
    command = " ".join(("pi0fm", *path))
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, text in commands.items():
        table.add_row(f"{command} {name}", text)
    console = Console()
    heading = f"{command}: {COMMANDS[path[0]]}" if path else "pi0fm: train, serve and evaluate pi0-style robot policies"
    console.print(f"{heading}\n", highlight=False)
    console.print(table)
    console.print(f"\n`{command} {'NAME' if path else 'COMMAND'} --help` lists the options of a command.", highlight=False)


def _print_options(name: str, command: Any, everything: bool) -> None:
    """Print the options by component; of many, the ones most often set."""
    rows = options.describe(command.Options)
    network = _constant(command, "NETWORK")
    if network is not None and everything:
        rows += options.describe(network, "model.")
    often = _constant(command, "OFTEN")
    few = everything or len(rows) <= SHOWN or often is None
    shown = [row for row in rows if few or {row[0][2:], row[0][2:].partition(".")[0]} & often]
    console = Console(width=max(80, int(os.environ.get("COLUMNS", "120"))), markup=False)
    console.print(f"pi0fm {name} {_first(command)} [--option value ...]: {command.HELP}\n", highlight=False)
    console.print(_table(sorted(shown, key=_component)))
    if len(shown) < len(rows):
        console.print(f"\n{len(rows) - len(shown)} more: pi0fm {name} --help all", highlight=False)
        return
    same = {other: meaning for other, meaning in command.ALIASES.items() if isinstance(meaning, str)}
    for other, meaning in same.items():
        console.print(f"  --{other} is another name for --{meaning}", highlight=False)
    if len(same) < len(command.ALIASES):
        console.print("  LeRobot's other options: docs/from_lerobot.md", highlight=False)


def _first(command: Any) -> str:
    """Return the words that a command takes before its options, as they are written in its help."""
    first, others = (_constant(command, name) for name in ("POSITIONAL", "OTHERS"))
    return " ".join([*([first.upper()] if first else []), f"[{others.upper()} ...]" if others else "[FILE.yaml ...]"])


def _component(row: tuple[str, str, str]) -> tuple[bool, str]:
    """Return the sort key of an option: required options first, then those of no component, then by component."""
    group, dot, _ = row[0].partition(".")
    return row[1] != "required", group if dot else ""


def _table(rows: Sequence[tuple[str, str, str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column("option", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=18)
    table.add_column("meaning", overflow="fold")
    for number, row in enumerate(rows):
        if number and _component(row) != _component(rows[number - 1]):
            table.add_row()
        table.add_row(*row)
    return table


if __name__ == "__main__":
    sys.exit(main())
