"""YAML files and `--dotted.options` decoded into one frozen dataclass; an option is honoured or refused.

Owns: finding and merging files, typed decoding, the nearest known option for an unknown one, the help text. Does not know: the meaning
of any option; each component owns its dataclass and checks ranges in `__post_init__`.

    pi05.yaml  libero.yaml  lora.yaml  --steps 100     a row: later files override earlier ones, dotted options come last
"""

import dataclasses
import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml

from pi0fm.files import nearest_path
from pi0fm_client.errors import ConfigError

Tree = dict[str, Any]


class _Whole(dict[str, Any]):
    """A mapping that replaces the one before it, in place of being merged into it."""


@runtime_checkable
class Foreign(Protocol):
    """An option of another program that needs more than a new name."""

    def options(self, name: str, value: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translate it into our options by dotted name. given: every option of the command, by dotted name. Raises ConfigError."""


LONGEST_SPAN = 10**7  # most numbers in a range such as 0-49
FEW = 8  # most words that an error lists without a near one among them
NEAR, AS_NEAR = 0.55, 0.1  # least likeness of a word that an error names, and how much less than the nearest's it may be
WITH = "with"  # key of a file: NAME -> options that apply only where the file NAME is in the same row


def option(default: Any, text: str) -> Any:
    """Declare a dataclass field with a default (or a callable that makes it) and its line in `--help`."""
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def required(text: str) -> Any:
    """Declare a dataclass field that must be given."""
    return dataclasses.field(metadata={"help": text})


def refuse_below(config: Any, where: str = "", /, **least: float) -> None:
    """Raise ConfigError for the first field of a dataclass below its least value; None is not compared. where: prefix of the names."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"{where}{name} must be {bound} or more, found {value}; type --{where}{name} {bound} or leave it out")


def refuse_words(config: Any, **known: Collection[str | None]) -> None:
    """Raise ConfigError for the first field of a dataclass that is not one of its known words."""
    for name, words in known.items():
        found, listed = getattr(config, name), [word for word in words if word is not None]
        if found not in words:
            raise ConfigError(f"{name} must be one of {', '.join(listed)}, found {found!r}: {nearest(str(found), listed)}")


def shipped() -> dict[str, Path]:
    """Return pi0fm's configuration files by name: those of the installed package, or of a checkout's configs/."""
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_file(name: str) -> Path:
    """Return the file at the path `name`, else the shipped one of that name (`pi05`, `configs/pi05.yaml`). Raises ConfigError."""
    path, known = Path(name), shipped()
    if path.is_file():
        return path
    if path.suffix in ("", ".yaml") and path.parent in (Path(), Path("configs")) and path.stem in known:
        return known[path.stem]
    parts = path.stem.split("_")
    for mark, typed in (("meta/info.json", "--dataset.root"), ("manifest.json", "--pretrained")):
        if (path / mark).is_file():
            raise ConfigError(f"configuration files stand first, found the folder {name}; type {typed} {name}")
    row = f"; recipes are composed, type {' '.join(parts)}" if len(parts) > 1 and set(parts) <= known.keys() else ""
    near = nearest_path(path) if path.suffix in (".yaml", ".yml") and not row else None
    if near is not None and near.stem not in known:
        raise ConfigError(f"no configuration file at {name}: did you mean {near}?")
    raise ConfigError(f"no configuration file at {name}{row}; of the shipped ones, {nearest(path.stem, list(known))}")


def read_files(names: Sequence[str]) -> Tree:
    """Merge a row of files in order, with their options under `with` for other files of the row. Raises ConfigError."""
    tree = Tree()
    for part in _parts(names):
        tree = merge(tree, part)
    return tree


def _parts(names: Sequence[str]) -> list[Tree]:
    """List the options of a row of files in the order of merging: those of each file, then its options `with` other files of the row."""
    paths, parts = [find_file(name) for name in names], list[Tree]()
    row = {path.stem for path in paths}
    for path in paths:
        always = read_yaml(path)
        conditional = always.pop(WITH, {})
        if not isinstance(conditional, Mapping) or not all(isinstance(options, Mapping) for options in conditional.values()):
            raise ConfigError(f"{path} must have options under {WITH} NAME, found {conditional!r}; write {WITH}: {{pi05: {{steps: 100}}}}")
        unknown = [name for name in conditional if name not in {*row, *shipped()}]
        if unknown:
            raise ConfigError(
                f"{path} has options {WITH} {unknown[0]!r}, but no file has that name: {nearest(unknown[0], list(shipped()))}"
            )
        parts += [always, *(dict(options) for name, options in conditional.items() if name in row)]
    return parts


class _OnceLoader(yaml.SafeLoader):
    """YAML's safe loader, except that it refuses duplicate keys in a mapping instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = None if key_node.tag == "tag:yaml.org,2002:merge" else self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                continue
            line = key_node.start_mark.line + 1
            if key in lines:
                raise yaml.YAMLError(f"lines {lines[key]} and {line} both set {key!r}; remove one of them")
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Tree:
    """Return the mapping in a YAML file. Raises ConfigError that names the file, and the line of a syntax error or of a repeated key."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), _OnceLoader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of options, found {type(tree).__name__}")
    return tree


ALL_OPTIONS = "--help all lists every option"


def parse[T](
    cls: type[T],
    arguments: Sequence[str],
    aliases: Mapping[str, str | Foreign] | None = None,
    base: Tree | None = None,
    positional: str | None = None,
    named_by_row: str | None = None,
    others: str | None = None,
    defaults: Callable[[Tree], Tree] | None = None,
) -> T:
    """Decode `[FILE.yaml ...] --dotted.option value ...` into `cls`; later options override earlier ones, and files override `base`.

    aliases: dotted names of another program (LeRobot's), also in files -> our names, or a `Foreign` that translates name and value.
    positional: the option whose value may come first, before files; others: the option that takes the words after it, in place of files.
    named_by_row: the option of a folder that defaults to outputs/NAME_NAME for a row of two or more files.
    defaults: maps the merged options to default options, which they override.
    Raises ConfigError for an unknown option, a value of another type, or a missing required option.
    """
    count = next((index for index, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    first, remaining = arguments[:count], arguments[count:]
    names, place, rest = _row(first, positional, others)
    parts, remaining = [dict(base or {}), *_parts(names), place], [*rest, *remaining]
    where = "configuration files stand first" if positional is None else f"one {positional} may stand first"
    words = aliases or {}
    ours = {name: word if isinstance(word, str) else "" for name, word in words.items()}
    pairs = [(name, text if _is_text(cls, ours.get(name, name).split(".")) else _typed(text)) for name, text in _pairs(remaining, where)]
    given: Tree = {}
    for part in parts:
        given |= flat(part)
    given |= dict(pairs)
    tree = Tree()
    for part in parts:
        tree = merge(tree, _translated(_named(part, words), words, given))
    tree = merge(tree, _translated(pairs, words, given, cls))
    if positional is None and named_by_row and len(first) > 1:
        tree.setdefault(named_by_row, f"outputs/{'_'.join(Path(name).stem for name in first)}")
    return decode(cls, tree if defaults is None else merge(defaults(tree), tree), others=words, see=ALL_OPTIONS)


def _row(words: Sequence[str], positional: str | None, others: str | None) -> tuple[Sequence[str], Tree, Sequence[str]]:
    """Sort the words before the first option: configuration files, the options that take words without a name, and what is left over."""
    if positional is None:
        return words, {}, ()
    if others is not None:
        return (), {name: value for name, value in ((positional, words[0] if words else None), (others, list(words[1:]))) if value}, ()
    files, values = ([word for word in words if word.endswith((".yaml", ".yml")) is is_file] for is_file in (True, False))
    return files, dict(zip((positional,), values, strict=False)), values[1:]


def _named(tree: Tree, aliases: Mapping[str, str | Foreign], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten a file's options to (dotted name, value), stopping at names in `aliases`."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inside = name not in aliases and isinstance(value, dict) and value
        found += _named(value, aliases, f"{name}.") if inside else [(name, value)]
    return found


def _translated(
    given: Sequence[tuple[str, Any]], aliases: Mapping[str, str | Foreign], everything: Tree, typed: type | None = None
) -> Tree:
    """Translate the options of one file or of the command line into a tree of ours; the last of a repeated option counts.

    everything: the options of all files and of the command line; typed: the dataclass of a command line, whose mapping of plain values
    under names of the user's replaces the one before. Raises ConfigError for an option without a counterpart, and for two
    options that set one of ours to different values.
    """
    tree, set_by = Tree(), dict[str, tuple[str, Any]]()
    for name, value in given:
        parts = name.split(".")
        groups = (aliases.get(".".join(parts[:end])) for end in range(len(parts), 0, -1))
        word = aliases.get(name) or next((group for group in groups if group is not None and not isinstance(group, str)), name)
        pairs = {word: value} if isinstance(word, str) else word.options(name, value, everything)
        for dotted, each in pairs.items():
            other, before = set_by.setdefault(dotted, (name, each))
            if other != name and before != each:
                raise ConfigError(f"--{other} and --{name} both set {dotted}, found {before!r} and {each!r}; leave one of them out")
            set_by[dotted] = (name, each)
            each = _Whole(each) if typed is not None and isinstance(each, dict) and _is_named(typed, dotted.split(".")) else each
            for part in reversed(dotted.split(".")):
                each = {part: each}
            tree = merge(tree, each)
    return tree


def decode[T](cls: type[T], tree: Mapping[str, Any], where: str = "", others: Collection[str] = (), see: str = "") -> T:
    """Decode a mapping into the dataclass `cls`, strictly. Raises ConfigError that names the option.

    where: prefix of the options' names, with its dot. others: more names that an unknown option may mean; see: where all are shown.
    """
    return typing.cast(T, _group(cls, tree, where, _Names(cls, where, others, see)))


def encode(config: Any) -> Any:
    """Return mappings, lists and values from which `decode` makes an equal dataclass."""
    if dataclasses.is_dataclass(config):
        return {field.name: encode(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: encode(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [encode(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def merge(base: Tree, over: Mapping[str, Any]) -> Tree:
    """Return `base` overridden by every leaf of `over`; neither argument is changed."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        into = inner if isinstance(inner, dict) and not isinstance(value, _Whole) else None
        merged[key] = value if into is None or not isinstance(value, Mapping) else merge(into, value)
    return merged


def flat(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Flatten a tree of groups to values by dotted name."""
    found: Tree = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def nearest(word: str, known: Collection[str], see: str = "") -> str:
    """Format `did you mean 'X'?` for the end of an error line: the nearest words, three at most. Few known words are listed whole.

    see: where all are shown. Dotted names are also compared by their last words: `learning_rate` is near `optimizer.learning_rate`.
    """
    likeness = {each: _likeness(word, each) for each in known}
    best = max(likeness.values(), default=0.0)
    close = [each for each, found in likeness.items() if found >= max(NEAR, best - AS_NEAR)]
    close = sorted(close, key=lambda each: (-likeness[each], each))[:3]
    listed = sorted(known)
    shown = f"known: {', '.join(listed)}" if len(listed) <= FEW else see
    if close:
        return f"did you mean {_either([repr(each) for each in close])}?{' ' * bool(shown)}{shown}"
    return shown or f"known: {', '.join(listed[:FEW])} and {len(listed) - FEW} more"


def _likeness(word: str, other: str) -> float:
    """Likeness of two dotted names without the groups in front that they share, or of their last words, which counts a little less."""
    left, right = word.split("."), other.split(".")
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left[:-1], right[:-1], strict=False)))
    of_last = difflib.SequenceMatcher(None, right[-1], left[-1]).ratio()
    return max(difflib.SequenceMatcher(None, ".".join(right[shared:]), ".".join(left[shared:])).ratio(), of_last - 0.1)


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (dotted option, default, help line) of every leaf of a configuration, in order."""
    rows: list[tuple[str, str, str]] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = _dataclass_in(hint)
        named = _dataclass_in(typing.get_args(hint)[1]) if typing.get_origin(hint) is dict else None  # groups under the user's names
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
            cut = next((name for name, text in pairs[-1:] if text.startswith(("[", "{")) and not text.endswith(("]", "}"))), None)
            raise ConfigError(
                f"expected an option like --steps 100, found {word!r}; {first if cut is None else f'put the value of --{cut} in quotes'}"
            )
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
    """Parse a word of the command line as YAML: 3, true, null, [a, b]."""
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text


def _is_text(cls: type, path: Sequence[str]) -> bool:
    """Tell whether the option holds text or a path, so that `0123`, `null` and `true` stay text."""
    return set(_choices(_hint_at(cls, path))) - {type(None)} <= {str, Path}


def _is_named(cls: type, path: Sequence[str]) -> bool:
    """Tell whether the option holds plain values under names of the user's, such as `embodiment.cameras`."""
    hint = _hint_at(cls, path)
    return typing.get_origin(hint) is dict and typing.get_args(hint)[1] is not Any and _dataclass_in(typing.get_args(hint)[1]) is None


def _hint_at(cls: type, path: Sequence[str]) -> Any:
    """Return the annotated type of a dotted option; `object` where there is none."""
    hint: Any = cls
    for name in path:
        inner = _dataclass_in(hint)
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif inner is not None and name in (hints := typing.get_type_hints(inner)):
            hint = hints[name]
        else:
            return object
    return hint


@dataclasses.dataclass(frozen=True)
class _Names:
    """Every option that an unknown one may mean: those of the dataclass `cls` under `where`, and `others`."""

    cls: type
    where: str
    others: Collection[str]
    see: str

    def refusals(self, name: str, value: Any, siblings: type, where: str) -> Iterator[ConfigError]:
        """Yield the error of each unknown option below `name`; siblings: the dataclass, under `where`, that has no such field."""
        rows = (*describe(self.cls, self.where), *describe(siblings, where))
        known = {*self.others, *(row[0].removeprefix("--") for row in rows if ".NAME." not in row[0])}
        for leaf in flat({name: value}):
            yield ConfigError(f"unknown option {leaf}: {nearest(leaf, known, self.see)}")


def _group(cls: type, tree: Any, where: str, names: _Names) -> Any:
    """Decode the options of one dataclass. where: prefix of their dotted names, with its dot."""
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"option {where[:-1]} is a group: expected options in it, found {tree!r}; options here: {', '.join(fields)}")
    decoded, faults = {}, list[str]()
    for key, value in tree.items():
        if key not in fields:
            faults += map(str, names.refusals(f"{where}{key}", value, cls, where))
            continue
        try:
            decoded[key] = _value(hints[key], value, f"{where}{key}", names)
        except ConfigError as error:
            faults.append(str(error))
    for name, field in fields.items():
        if name not in tree and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append(f"option {where}{name} is required: {field.metadata.get('help', 'no default')}")
    if faults:
        raise ConfigError("; ".join(faults))
    return cls(**decoded)


def _value(hint: Any, value: Any, where: str, names: _Names) -> Any:
    """Decode one option to its annotated type. A number may be given as text, and a list as text with commas."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, where, names)
    if dataclasses.is_dataclass(hint):
        return _group(typing.cast(type, hint), value, f"{where}.", names)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"option {where} must be one of {', '.join(map(str, arguments))}, found {value!r}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"option {where} is a group: expected {where}.NAME, found {value!r}")
        return {str(key): _value(arguments[1], each, f"{where}.{key}", names) for key, each in value.items()}
    if origin in (tuple, list):
        words = value if isinstance(value, list | tuple) else _words(value)
        if arguments[1:] == (...,) and int in _choices(arguments[0]):
            words = [number for word in words for number in _span(word, where)]
        hints = [arguments[0]] * len(words) if origin is list or arguments[1:] == (...,) else list(arguments)
        if value is None or isinstance(value, Mapping) or len(words) != len(hints):
            many = "a list" if len(words) == len(hints) else f"{len(hints)} values"
            raise ConfigError(f"option {where} must be {many}, written [a, b] or a,b, found {value!r}")
        return origin(_value(inner, word, where, names) for inner, word in zip(hints, words, strict=True))
    return _plain(hint, value, where)


def _one_of(hints: Sequence[Any], value: Any, where: str, names: _Names) -> Any:
    """Decode to the first of several types that accepts the value."""
    if value is None and type(None) in hints:
        return None
    choices = [hint for hint in hints if hint is not type(None)]
    for hint in choices[:-1]:
        try:
            return _value(hint, value, where, names)
        except ConfigError:
            continue
    return _value(choices[-1], value, where, names)


def _plain(hint: Any, value: Any, where: str) -> Any:
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}
    text = value.strip() if isinstance(value, str) and hint not in (str, Path) else value
    try:
        if hint is bool and str(text).lower() in ("true", "false"):
            return str(text).lower() == "true"
        if hint in (int, float) and not isinstance(text, bool) and (hint is float or not isinstance(text, float)):
            number = hint(text)
            if math.isfinite(number):
                return number
        if hint in (str, Path) and isinstance(text, str | int | float | Path):
            path = Path(str(text)).expanduser()  # a shell leaves ~ as it is behind =
            return path if hint is Path else str(path) if str(text).startswith("~/") else str(text)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"option {where} must be {kinds.get(hint, hint)}, found {value!r}")


def _span(word: Any, where: str) -> Sequence[Any]:
    """Expand a range such as `3-7`, both ends included; return any other word unchanged in a list."""
    if not re.fullmatch(r"\d+-\d+", str(word)):
        return [word]
    first, last = map(int, str(word).split("-"))
    if not 0 <= last - first < LONGEST_SPAN:
        raise ConfigError(f"option {where} takes ranges like 0-49, the lower number first, found {word}; correct it")
    return range(first, last + 1)


def _words(value: Any) -> list[str]:
    return [word.strip() for word in str(value).split(",") if word.strip()]


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass in `X` or `X | None`, else None."""
    found = [choice for choice in _choices(hint) if isinstance(choice, type) and dataclasses.is_dataclass(choice)]
    return found[0] if found else None


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
