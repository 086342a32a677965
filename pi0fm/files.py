"""Atomic files and folders: write under a temporary name, fsync, rename.

Owns: atomic files and directories, locks, the exchange of two names, the error for an unwritable path, the path that a mistyped one may
mean. Does not know: their contents.

    .NAME.HOST-RANDOM   being written, under its writer's flock. The next writer of NAME on this host removes the unlocked ones.
"""

import ctypes
import difflib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pi0fm_client.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)
_REMEDIES = {
    code: remedy
    for remedy, codes in {
        "make room on that disk": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "choose a folder that this user may write to": (errno.EROFS, errno.EACCES, errno.EPERM),
        "a part of that name is a file: choose another folder": (errno.ENOTDIR, errno.EEXIST),
        "that disk is damaged or gone: choose another": (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
        "no file can have that name: choose another name": (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    }.items()
    for code in codes
}


@contextmanager
def write_faults(path: Path) -> Iterator[None]:
    """Raise a one-line OutputError where the block meets a full, read-only or damaged disk, or an impossible file name."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    remedy = _REMEDIES.get(error.errno or 0, "no folder or file can be made there: choose another folder")
    return OutputError(f"{path} must be writable, found {error.filename or path}: {error.strerror}; {remedy}")


def nearest_path(path: Path, likeness: float = 0.6) -> Path | None:
    """Return the existing path whose names are nearest to those of `path`, name by name; None where a name has none near it."""
    found = Path(path.anchor)
    for name in path.parts[len(found.parts) :]:
        if not (found / name).exists():
            try:
                near = difflib.get_close_matches(name, os.listdir(found), n=1, cutoff=likeness)
            except OSError:  # not a folder, or one that may not be read
                return None
            if not near:
                return None
            name = near[0]
        found /= name
    return found


def is_hub_name(word: str) -> bool:
    """Tell whether a word has the form OWNER/NAME of Hugging Face's hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", word, re.ASCII) is not None


def missing(path: Path) -> str:
    """Format `PATH does not exist: did you mean OTHER?` for the end of an error line, without the question where no name is near."""
    near = nearest_path(path)
    return f"{path} does not exist" + ("" if near is None else f": did you mean {near}?")


def visible(folder: Path, pattern: str = "**/*") -> list[Path]:
    """List the entries below a folder in order, without hidden ones and those in hidden folders, which file managers and downloads make."""
    found = [path for path in folder.glob(pattern) if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(found)


def make_folder(path: Path) -> None:
    """Make a writable folder and its parents. Raises OutputError as `refuse_name` does, and for any error of the file system."""
    refuse_name(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:  # of any code: /proc, /sys and network drives each have their own
        raise _unwritable(path, error) from error


def refuse_name(path: Path) -> None:
    """Raise OutputError for a name that is not UTF-8, is too long or contains NUL, and for a dangling link."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OutputError(f"a folder's name must be UTF-8, found {os.fsencode(path)!r}; choose another folder") from None
    if "\0" in str(path):
        raise OutputError(f"a folder's name must not hold the character 0, found {str(path)!r}; choose another folder")
    with write_faults(path):
        dangling = path.is_symlink() and not path.exists()
    if dangling:
        raise OutputError(f"{path} is a link to {os.readlink(path)}, which does not exist; make that folder, or choose another")


def fsync_directory(path: Path) -> None:
    """Flush a directory's entries, or a file's bytes, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file in pieces; at the end it replaces `path`. A reader sees the old file or the new one, never a part."""
    with _locked_aside(path, directory=False) as (aside, descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            yield file
        os.fsync(descriptor)
        os.replace(aside, path)
    fsync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes to a file atomically, as `new_file` does."""
    with new_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write text to a file atomically, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON document to a file atomically; a non-finite number is an error."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_directory(path: Path, older: Path | None = None) -> Iterator[Path]:
    """Fill a directory under a temporary name, then rename it to `path`; an error leaves nothing.

    An existing `path` must be an empty directory, unless `older`, an unused name, is given: it is then renamed to `older`. Where the file
    system can exchange two names, a reader or a kill always finds a directory at `path`; elsewhere `path` is missing for an instant.
    """
    with _locked_aside(path, directory=True) as (aside, descriptor):
        yield aside
        for file in sorted(aside.rglob("*")):
            if file.is_file():
                fsync_directory(file)
        os.fsync(descriptor)
        if older is not None and path.exists():
            aside.rename(older)
            if not exchange(older, path):
                older.rename(aside)
                path.rename(older)
                aside.rename(path)
        else:
            aside.rename(path)
    fsync_directory(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot. Raises OSError for any other reason."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def _locked_aside(path: Path, directory: bool) -> Iterator[tuple[Path, int]]:
    """Yield a new locked file or directory next to `path`, and its descriptor; its mode follows the umask. An error removes it."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    prefix = f".{path.name}.{socket.gethostname()}-"
    _sweep(path.parent, prefix)
    while True:
        aside = path.parent / f"{prefix}{secrets.token_hex(4)}"
        if directory:
            aside.mkdir()
        try:
            descriptor = os.open(aside, os.O_RDONLY if directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if directory:
                continue  # another writer swept it before it was locked
            raise
        if try_lock(descriptor) is not False and aside.exists():
            break
        os.close(descriptor)
    try:
        yield aside, descriptor
    except BaseException:
        _remove(aside)
        raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path, prefix: str) -> None:
    """Remove the remains of killed writers: entries with this prefix that no process has locked. Without file locks they stay."""
    for left in [entry for entry in folder.iterdir() if entry.name.startswith(prefix)]:
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                if try_lock(descriptor):
                    _remove(left)
            finally:
                os.close(descriptor)


def lock_file(path: Path) -> int | None:
    """Open `path` for reading and writing, make it and its folder if needed, and lock it; None when another process holds the lock.

    Another process that ends may remove the file before it is locked: then it is made again.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed since
        if try_lock(descriptor) is False:
            os.close(descriptor)
            return None
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process; False when another holds it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
