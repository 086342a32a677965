"""Tests of the rule that one type name means one thing in the whole package. Sources are read, not imported."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "pi0fm", ROOT / "client" / "pi0fm_client", ROOT / "lerobot_plugin" / "lerobot_policy_pi0fm")


def named_twice(sources: Iterable[tuple[str, str]]) -> Mapping[str, list[str]]:
    """Return the places of each class name, private and nested ones included, that is defined more than once in (place, source)."""
    places = defaultdict(list)
    for place, source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{place}:{node.lineno}")
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_class_name_is_defined_twice() -> None:
    files = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    assert len(files) > 300
    assert named_twice((str(path.relative_to(ROOT)), path.read_text()) for path in files) == {}


def test_a_name_with_two_meanings_is_found() -> None:
    one = "class Video:\n    class _Frame: ...\n"
    other = "def f():\n    class _Frame: ...\n\nVideo = 1\nclass Clip: ...\n"
    assert named_twice([("one.py", one), ("other.py", other)]) == {"_Frame": ["one.py:2", "other.py:2"]}
    assert named_twice([("one.py", one), ("other.py", one)]).keys() == {"Video", "_Frame"}
