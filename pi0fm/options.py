"""From a YAML file and `--dotted.options` to one frozen dataclass; an option is honoured or refused.

Owns: reading, merging, naming the nearest known option for an unknown one, the help text. draccus does the typed decoding.
Does not know: what any option means; each component owns its dataclass and checks ranges in `__post_init__`.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import draccus
import yaml
from draccus.utils import DecodingError

from pi0fm_client.errors import ConfigError

Tree = dict[str, Any]


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default (a callable makes a fresh one) and the line that `--help` shows."""
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def required(text: str) -> Any:
    """A dataclass field that must be given."""
    return dataclasses.field(metadata={"help": text})


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file. Raises ConfigError that names the file, and the line of a syntax error."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}; the shipped ones are in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of options, found {type(tree).__name__}")
    return tree


def parse[T](
    cls: type[T],
    arguments: Sequence[str],
    aliases: Mapping[str, str] | None = None,
    base: Tree | None = None,
    positional: str | None = None,
) -> T:
    """Decode `[FILE.yaml] --dotted.option value ...` into `cls`; later options win over the file, the file over `base`.

    aliases: other words for an option (LeRobot's), each a dotted name to a dotted name.
    positional: the option whose value may stand first, in the place of the file.
    Raises ConfigError for an unknown option, a value of another type, or a missing required one.
    """
    remaining = list(arguments)
    tree = dict(base or {})
    if remaining and not remaining[0].startswith("--"):
        first = remaining.pop(0)
        tree = merge(tree, read_yaml(Path(first)) if positional is None else {positional: first})
    for name, text in _pairs(remaining, "configuration file" if positional is None else positional):
        path = (aliases or {}).get(name, name).split(".")
        tree = merge(tree, _nested(path, text if _is_text(cls, path) else _typed(text)))
    return decode(cls, tree)


def decode[T](cls: type[T], tree: Mapping[str, Any]) -> T:
    """Decode a mapping into the dataclass `cls`, strictly."""
    _refuse_unknown(cls, tree, "")
    try:
        return typing.cast(T, draccus.decode(cls, _split_lists(cls, tree)))
    except ConfigError:
        raise
    except (DecodingError, TypeError, ValueError) as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ConfigError):
            raise cause from None
        raise ConfigError(f"an option has a value that cannot be used: {' '.join(str(error).split())}; {_hint(cls)}") from None


def encode(config: Any) -> Tree:
    """The plain mapping that `decode` turns back into an equal dataclass."""
    return typing.cast(Tree, draccus.encode(config))


def merge(base: Tree, over: Mapping[str, Any]) -> Tree:
    """`base` with every leaf of `over` laid on it; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` and the known words, for the end of an error line."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    listed = ", ".join(sorted(known)[:60])
    return f"did you mean {close[0]!r}? known: {listed}" if close else f"known: {listed}"


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted option, default, help line) for every leaf of a configuration, in order."""
    rows: list[tuple[str, str, str]] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner, named = _dataclass_in(hints[field.name]), _named_in(hints[field.name])
        if inner is not None:
            rows.extend(describe(inner, f"{prefix}{field.name}."))
            continue
        if field.default is not dataclasses.MISSING:
            default = str(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = str(field.default_factory())
        else:
            default = "required"
        rows.append((f"--{prefix}{field.name}", default, field.metadata.get("help", "")))
        if named is not None:
            rows.extend(describe(named, f"{prefix}{field.name}.NAME."))
    return rows


def _pairs(arguments: Sequence[str], first: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"expected an option like --steps 100, found {word!r}; one {first} may stand first")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if position < len(arguments) and not arguments[position].startswith("--"):
                text = arguments[position]
                position += 1
            else:
                text = "true"
        pairs.append((name.replace("-", "_"), text))
    return pairs


def _typed(text: str) -> Any:
    """A word of the command line as YAML reads it: 3, true, null, [a, b]."""
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text


def _is_text(cls: type, path: Sequence[str]) -> bool:
    """Whether the option holds text or a path: then `0123`, `null` and `true` are those very letters."""
    hint: Any = cls
    for name in path:
        named = _named_in(hint)
        if named is not None:
            hint = named
            continue
        inner = _dataclass_in(hint)
        hints = typing.get_type_hints(inner) if inner is not None else {}
        if name not in hints:
            return False
        hint = hints[name]
    return set(_choices(hint)) - {type(None)} <= {str, Path}


def _nested(path: Sequence[str], value: Any) -> Tree:
    for name in reversed(path):
        value = {name: value}
    return typing.cast(Tree, value)


def _refuse_unknown(cls: type, tree: Mapping[str, Any], where: str) -> None:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key, value in tree.items():
        if key not in names:
            raise ConfigError(f"unknown option {where}{key}: {nearest(str(key), names)}")
        inner, named = _dataclass_in(hints[key]), _named_in(hints[key])
        if value is None or (inner is None and named is None):
            continue
        if not isinstance(value, Mapping):
            found = f"expected {where}{key}.NAME, found {value!r}" + (f"; {_hint(inner)}" if inner is not None else "")
            raise ConfigError(f"option {where}{key} is a group: {found}")
        if inner is not None:
            _refuse_unknown(inner, value, f"{where}{key}.")
        if named is not None:
            for name, group in value.items():
                if not isinstance(group, Mapping):
                    raise ConfigError(f"option {where}{key}.{name} is a group: expected options in it, found {group!r}; {_hint(named)}")
                _refuse_unknown(named, group, f"{where}{key}.{name}.")
    for field in dataclasses.fields(cls):
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and field.name not in tree:
            raise ConfigError(f"option {where}{field.name} is required: {field.metadata.get('help', 'no default')}")


def _split_lists(cls: type, tree: Mapping[str, Any]) -> Tree:
    """`a,b` for an option that holds several becomes [a, b]: draccus would take a text for the list of its letters."""
    hints = typing.get_type_hints(cls)
    split: Tree = {}
    for key, value in tree.items():
        inner, named = _dataclass_in(hints[key]), _named_in(hints[key])
        if inner is not None and isinstance(value, Mapping):
            value = _split_lists(inner, value)
        elif named is not None and isinstance(value, Mapping):
            value = {name: _split_lists(named, group) for name, group in value.items()}
        elif typing.get_origin(hints[key]) is tuple and isinstance(value, str | int | float):
            value = [word.strip() for word in str(value).split(",") if word.strip()]
        split[key] = value
    return split


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in `X` or `X | None`, else None."""
    found = [choice for choice in _choices(hint) if isinstance(choice, type) and dataclasses.is_dataclass(choice)]
    return found[0] if found else None


def _named_in(hint: Any) -> type | None:
    """The dataclass in `dict[str, X]`: groups under names that the user gives. Else None."""
    return _dataclass_in(typing.get_args(hint)[1]) if typing.get_origin(hint) is dict else None


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _hint(cls: type) -> str:
    return f"options here: {', '.join(field.name for field in dataclasses.fields(cls))}"
