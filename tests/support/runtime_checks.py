"""Checks of every annotated shape and type of pi0fm at every call under test.

    import pi0fm.x  ->  jaxtyping's finder  ->  its rewritten source  ->  compiled here, then run as any module is

Owns: the checker, and the finder that conftest.py installs. Does not know: what is tested.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import install_import_hook

# An int passes for a float, as in PEP 484. `Self` is not checked: functions are decorated one by one, without their class.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: Any})))


def install() -> None:
    """Check what is imported of pi0fm from now on."""
    install_import_hook("pi0fm", f"{__name__}.check")
    sys.meta_path[0] = _Finder(sys.meta_path[0])


class _Finder(importlib.abc.MetaPathFinder):
    """jaxtyping's finder with its loader restricted to pi0fm.

    The original loader renames the cache of compiled code while a module of pi0fm runs, so that torch and transformers, imported by it,
    are compiled again: 15 s per session.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec: ModuleSpec | None = self._inner.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, inner: SourceFileLoader) -> None:
        super().__init__(inner.name, inner.path)
        self._inner = inner

    def get_code(self, fullname: str) -> CodeType:
        return self._inner.source_to_code(self.get_data(self.path), self.path)
