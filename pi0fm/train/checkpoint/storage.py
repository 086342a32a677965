"""Storage of checkpoints: a folder that all workers see, or a bucket with the S3 protocol.

Owns: `Store`, byte strings by name, each written whole or not at all; which checkpoints are whole, judged by names only. Does not know:
the contents of a checkpoint.

    /disk/run/checkpoints       written under a temporary name, fsynced, renamed, the folder fsynced
    s3://bucket/prefix          one PUT or one multipart upload per name; endpoint and keys from AWS's variables (AWS_ENDPOINT_URL, ...)
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from pi0fm import files
from pi0fm_client.errors import ConfigError, OutputError

SCHEME = "s3://"
COMMIT = "COMMIT"  # the file written last, which makes a checkpoint whole


class Store(ABC):
    """Byte strings by name below one place. Names are separated by `/`. Every failure is an OSError."""

    where: str

    @abstractmethod
    def write(self, name: str, parts: Sequence[memoryview]) -> None:
        """Write the parts, concatenated, under `name`, replacing an earlier value; durable on return."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read bytes start .. stop - 1 of `name`, to its end without `stop`; fewer if it is shorter. Raises FileNotFoundError."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return every name and its number of bytes; none where the place does not exist."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove names, in this order; a missing name is not an error."""


def open_store(place: Path | str) -> Store:
    """Open the store at a folder or an `s3://` address. Raises ConfigError for an address without a bucket, or without boto3."""
    return Bucket(str(place)) if str(place).startswith(SCHEME) else Folder(Path(place))


@final
class Folder(Store):
    """Store in a directory."""

    def __init__(self, path: Path) -> None:
        self._path, self.where = path, str(path)

    def write(self, name: str, parts: Sequence[memoryview]) -> None:
        """Write under a temporary name, fsync, rename, fsync the folder; a failed write leaves nothing."""
        with files.new_file(self._path / name) as file:
            for part in parts:
                _write_all(file.fileno(), part)
        files.fsync_directory(self._path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read with one seek and one read."""
        with (self._path / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = bytearray(max(0, min(size, size if stop is None else stop) - start))
            file.seek(start)
            read = file.readinto(content)
        return content[:read]

    def sizes(self) -> dict[str, int]:
        """Return the size of every file, except those removed meanwhile."""
        found = {}
        for folder, _, names in os.walk(self._path):
            for name in names:
                path = Path(folder) / name
                try:
                    found[path.relative_to(self._path).as_posix()] = path.stat().st_size
                except FileNotFoundError:
                    continue
        return found

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, and folders that become empty, except the store's root."""
        folders = set()
        for name in names:
            path = self._path / name
            path.unlink(missing_ok=True)
            folders.add(path.parent)
        for folder in folders - {self._path}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@final
class Bucket(Store):
    """Store of objects below a prefix. boto3 reads endpoint, keys and region where every AWS tool does."""

    def __init__(self, address: str) -> None:
        self._bucket, _, prefix = address.removeprefix(SCHEME).partition("/")
        if not self._bucket:
            raise ConfigError(f"an S3 address is s3://BUCKET/PREFIX, found {address!r}")
        self._prefix, self.where = prefix.strip("/") + "/" if prefix.strip("/") else "", address.rstrip("/")
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise ConfigError(f"{address} needs boto3, which is not installed; type: pip install 'pi0fm[s3]'") from error
        # every checkpoint holds CRC-32 sums; older S3-compatible stores refuse the newer checksums of the protocol
        sums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        self._client: Any = boto3.client("s3", config=Config(retries={"max_attempts": 5, "mode": "standard"}, **sums))

    def write(self, name: str, parts: Sequence[memoryview]) -> None:
        """Upload an object, which exists once the upload is complete; boto3 aborts a failed multipart upload."""
        with self._named(name):
            self._client.upload_fileobj(_Joined(parts), self._bucket, self._prefix + name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read with one ranged GET."""
        if stop is not None and stop <= start:
            return bytearray()
        with self._named(name):
            span = f"bytes={start}-{'' if stop is None else stop - 1}"
            part = {} if start == 0 and stop is None else {"Range": span}
            return bytearray(self._client.get_object(Bucket=self._bucket, Key=self._prefix + name, **part)["Body"].read())

    def sizes(self) -> dict[str, int]:
        """List sizes, a thousand objects per request."""
        with self._named(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            return {found["Key"].removeprefix(self._prefix): int(found["Size"]) for page in pages for found in page.get("Contents", [])}

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects one by one: the order matters, and not every store supports the request for many."""
        for name in names:
            with self._named(name):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None
            kind = FileNotFoundError if code in ("NoSuchKey", "404") else OSError
            raise kind(f"{self.where}/{name}: {' '.join(str(error).split())}") from error


def _write_all(descriptor: int, part: memoryview) -> None:
    """Write all bytes: os.write takes at most 2 GiB at once, and may write fewer bytes than given."""
    rest = part.cast("B")
    while len(rest):
        rest = rest[os.write(descriptor, rest[: 1 << 26]) :]


@final
class _Joined:
    """File-like object over parts, read once, so that no part is copied before it is sent."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = [part.cast("B") for part in parts if part.nbytes]

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, all that remain without `size`; none at the end."""
        taken: list[memoryview] = []
        wanted = sum(part.nbytes for part in self._parts) if size is None or size < 0 else size
        while wanted and self._parts:
            first = self._parts.pop(0)
            if len(first) > wanted:
                self._parts.insert(0, first[wanted:])
                first = first[:wanted]
            taken.append(first)
            wanted -= len(first)
        return b"".join(taken)


def folder(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"step-{step:09d}"


def whole(place: Path | str) -> list[int]:
    """List the steps of the committed checkpoints at a place, oldest first. Raises OutputError where it cannot be listed."""
    store = open_store(place)
    try:
        names = store.sizes()
    except OSError as error:
        raise OutputError(unlisted(store, error)) from error
    return sorted(step for step in steps_in(names) if f"{folder(step)}/{COMMIT}" in names)


def steps_in(names: Iterable[str]) -> set[int]:
    """Return the steps with any file, whole or not."""
    heads = {name.partition("/")[0] for name in names}
    return {int(head.removeprefix("step-")) for head in heads if head.startswith("step-") and head.removeprefix("step-").isdecimal()}


def unlisted(store: Store, why: OSError | str) -> str:
    """Format the error of a place that cannot be listed."""
    return f"checkpoints in {store.where} cannot be listed ({' '.join(str(why).split())}); correct checkpoint_dir, or its access"
