"""Checks of arguments: each returns the value in one type, or raises ConfigError with the rule, the value found, and what to type.

Owns: those checks. Does not know: the use of the values. No bool passes as a number, and no text as a list of its letters.
"""

import math
import numbers
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0fm_client.errors import ConfigError

LONGEST_SECONDS = 86_400


def shown(value: object) -> str:
    """Return a value as an error shows it, shortened; one that cannot be shown by its type."""
    try:
        return " ".join(repr(value).split())[:80]
    except Exception:  # noqa: BLE001 - a foreign __repr__ may raise anything
        return f"a {type(value).__name__}"


def number(name: str, value: Any, usual: str, above: float = -math.inf, most: float = math.inf) -> float:
    """Return a finite real number in (above, most]."""
    found = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:  # an int beyond float64
            found = math.inf
    if not (math.isfinite(found) and above < found <= most):
        bounds = [*([f"above {above:g}"] if above > -math.inf else []), *([f"at most {most:g}"] if most < math.inf else [])]
        raise ConfigError(f"{name} must be a number {' and '.join(bounds)}, found {shown(value)}: type {usual}")
    return found


def seconds(name: str, value: Any) -> float:
    """Return a time-out in seconds, above 0 and at most a day."""
    return number(name, value, "2", 0.0, LONGEST_SECONDS)


def whole(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Return a whole number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        bounds = f">= {least}" if most == math.inf else f"in {least} .. {most:g}"
        raise ConfigError(f"{name} must be a whole number {bounds}, found {shown(value)}: type {least}")
    return int(value)


def word(name: str, value: Any, words: Sequence[str]) -> str:
    """Return one of `words`."""
    if not isinstance(value, str) or value not in words:
        raise ConfigError(f"{name} must be one of {', '.join(words)}, found {shown(value)}: type {words[0]}")
    return value


def switch(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, found {shown(value)}: type {name}=True")
    return value


def call(name: str, value: Any) -> Callable[..., Any]:
    """Return a function."""
    if not callable(value):
        raise ConfigError(f"{name} must be a function, found {shown(value)}: give one, or leave it out")
    return value  # type: ignore[no-any-return]


def texts(name: str, value: Any) -> list[str]:
    """Return a list of texts."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{name} must be a list of names, found {shown(value)}: type {name}=['base']")
    return list(value)


def dimensions(name: str, value: Any, width: int) -> list[int]:
    """Return distinct dimensions, each in 0 .. width - 1."""
    listed = value.tolist() if isinstance(value, np.ndarray) else value
    good = isinstance(listed, Sequence) and not isinstance(listed, str | bytes)
    whole_ones = [int(each) for each in listed if isinstance(each, numbers.Integral) and not isinstance(each, bool)] if good else []
    if not good or len(whole_ones) != len(listed) or len(set(whole_ones)) != len(whole_ones) or not set(whole_ones) <= set(range(width)):
        raise ConfigError(f"{name} must be dimensions below {width}, whole numbers, each once, found {shown(value)}: type [0, 1], or []")
    return whole_ones


def vector(name: str, value: Any, width: int | None = None) -> NDArray[np.float64]:
    """Return finite numbers [width], or of any width above 0."""
    try:
        found = np.asarray(value)
        found = found.astype(np.float64) if found.dtype.kind in "fiu" else np.zeros((0, 0))
    except (TypeError, ValueError, OverflowError):  # a list of lists of several lengths, objects
        found = np.zeros((0, 0))
    if found.ndim != 1 or not found.size or (width is not None and found.size != width) or not np.isfinite(found).all():
        raise ConfigError(f"{name} must be {width or 'a list of'} finite numbers, found {shown(value)}: type [{'0.0, ' * 2}...]")
    return found


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """Return a map whose keys are texts."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must be a map with text as keys, found {shown(value)}: give a policy of pi0fm, or its server's client")
    return value


def token(value: Any) -> str | None:
    """Return a server's key, or None; it is not shown."""
    if value is not None and not (isinstance(value, str) and value.isascii() and value.isprintable()):
        raise ConfigError("token must be printable ASCII, as the server's is: copy it again, or leave it out")
    return value  # type: ignore[no-any-return,unused-ignore]


def encryption(value: Any, url: str) -> ssl.SSLContext | None:
    """Return the context of a wss:// address, or None."""
    if value is not None and not isinstance(value, ssl.SSLContext):
        raise ConfigError(f"tls= must be an ssl.SSLContext, found {shown(value)}: type tls=ssl.create_default_context(cafile='c.pem')")
    if value is not None and not url.startswith("wss://"):
        raise ConfigError(f"tls= is for a wss:// address, found {shown(url)}: write wss://, or leave it out")
    return value
