"""Parquet files of any writer, as arrays of numbers.

Owns: reading columns of a file, every layout in which a number or a row of numbers may be stored, which rows are invalid.
Does not know: what a column means.

    one number per row   int*, uint*, float*, bool; a list of one     -> int64 [N] or float64 [N]
    W numbers per row    lists (plain, large, fixed) of those, also of lists; W = 1 also as plain numbers      -> float32 [N, W]
    bad [N]              True for a row that is null, has a null, or is of another width; its numbers are 0
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pi0fm_client.errors import DatasetError

_LIST_LEVELS = re.compile(r"(\.list\.(element|item))+$")  # how a footer names the numbers of a list


@dataclass(frozen=True)
class ColumnValues:
    """Values [N] or [N, W] of a column. bad [N]: rows without a valid value; found: description of the first of them."""

    values: NDArray[Any]
    bad: NDArray[np.bool_]
    found: str = ""

    def __getitem__(self, places: NDArray[Any]) -> "ColumnValues":
        return ColumnValues(self.values[places], self.bad[places], self.found)

    def filled(self, value: float) -> NDArray[Any]:
        """Values, with `value` in the bad rows."""
        return np.where(self.bad, value, self.values) if self.bad.any() else self.values


def concatenate(parts: Sequence[ColumnValues]) -> ColumnValues:
    """Concatenate."""
    found = next((part.found for part in parts if part.found), "")
    return ColumnValues(np.concatenate([part.values for part in parts]), np.concatenate([part.bad for part in parts]), found)


@contextmanager
def read_faults(path: Path) -> Iterator[None]:
    """Convert pyarrow's errors for a cut or damaged file to a DatasetError of one line."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} is cut or damaged ({reason:.120}); record or download the data set again") from None


def read_table(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """Read the named columns of a parquet file in this order, all for None; pages with checksums are verified.

    Raises DatasetError for a file that is missing, cut or damaged, lacks a column, or has numbers outside the bounds in its footer.
    """
    if not path.is_file():
        raise DatasetError(f"{path} is missing; download or record the data set again")
    with read_faults(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        present = file.schema_arrow.names
        lacking = [name for name in names or () if name not in present]
        if lacking:
            raise DatasetError(f"{path} lacks the column {lacking[0]!r}, found {', '.join(present):.300}; record or download it again")
        table = file.read(columns=None if names is None else list(dict.fromkeys(names)))
        table = table if names is None else table.select(list(names))
        _refuse_out_of_bounds(path, file.metadata, table)
    return table


def integers(column: pa.ChunkedArray | pa.Array) -> ColumnValues:
    """int64 [N]; a row that is no whole number is bad."""
    numbers = scalars(column)
    values = numbers.values
    if values.dtype == np.int64:
        return numbers
    whole = np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2**63)  # int64 holds no other
    bad = numbers.bad | ~whole
    found = numbers.found or (str(values[~whole][0]) if not whole.all() else "")
    return ColumnValues(np.where(bad, 0, values).astype(np.int64), bad, found)


def scalars(column: pa.ChunkedArray | pa.Array) -> ColumnValues:
    """[N] int64 for whole types, float64 for others; one number per row, plain or in a list of one."""
    flat = _flat(column, 1)
    fits = flat.values.dtype != np.uint64 or not len(flat.values) or int(flat.values.max()) < 2**63
    kind = np.int64 if flat.values.dtype.kind in "iub" and fits else np.float64
    return ColumnValues(flat.values.reshape(-1).astype(kind, copy=False), flat.bad, flat.found)


def matrix(column: pa.ChunkedArray | pa.Array, width: int) -> ColumnValues:
    """float32 [N, W]."""
    flat = _flat(column, width)
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, and is judged as such
        return ColumnValues(np.ascontiguousarray(flat.values, dtype=np.float32), flat.bad, flat.found)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, or bytes that may be text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
        )
    )


def texts(path: Path, column: pa.ChunkedArray) -> list[str | None]:
    """Decode a column of text, or of its bytes. Raises DatasetError for bytes that are not UTF-8."""
    with read_faults(path):
        return [each.decode() if isinstance(each, bytes) else each for each in column.to_pylist()]


def _flat(column: pa.ChunkedArray | pa.Array, width: int) -> ColumnValues:
    """[N, W] in the column's type of numbers."""
    array = _in_one(column)
    if isinstance(array, pa.ChunkedArray):  # too long for one chunk of 32-bit offsets
        return concatenate([_flat(chunk, width) for chunk in array.chunks])
    rows = len(array)
    plain = _plain(array, width)
    if plain is not None:
        return ColumnValues(plain, np.zeros(rows, dtype=bool))
    widths: NDArray[np.int64] = np.ones(rows, dtype=np.int64)
    null = np.zeros(rows, dtype=bool)
    listed = _is_list(array.type)
    while _is_list(array.type):
        here, array = _unlisted(array, widths, null)
        widths = here
    if not _is_number(array.type):
        return ColumnValues(np.zeros((rows, width), np.float32), np.ones(rows, dtype=bool), f"{column.type}")
    if not listed:
        null |= _nulls(array)
    bad = null | (widths != width)
    values = _values(array)
    if array.null_count and listed:
        owner = np.repeat(np.arange(rows), widths)
        bad[owner[_nulls(array)]] = True
    found = ""
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        found = "null" if null[row] else f"{widths[row]} numbers" if widths[row] != width else "a null among its numbers"
    if (widths == width).all():
        return ColumnValues(_zeroed(values.reshape(rows, width), bad), bad, found)
    dense = np.zeros((rows, width), dtype=values.dtype)
    starts = np.cumsum(widths) - widths
    good = np.flatnonzero(widths == width)
    dense[good] = values[starts[good][:, None] + np.arange(width)]
    return ColumnValues(_zeroed(dense, bad), bad, found)


def _plain(array: pa.Array, width: int) -> NDArray[Any] | None:
    """[N, W] of a column without nulls, of numbers or of lists of `width` numbers; None for any other."""
    if not _is_list(array.type):
        healthy = width == 1 and _is_number(array.type) and not array.null_count
        return _values(array).reshape(-1, 1) if healthy else None
    if array.null_count or not _is_number(array.type.value_type):
        return None
    if pa.types.is_fixed_size_list(array.type):
        equal = array.type.list_size == width
    else:
        offsets = np.asarray(array.offsets)
        equal = bool((offsets[1:] - offsets[:-1] == width).all())
    inner = array.flatten() if equal else None
    return None if inner is None or inner.null_count else _values(inner).reshape(-1, width)


def _unlisted(array: pa.Array, widths: NDArray[np.int64], null: NDArray[np.bool_]) -> tuple[NDArray[np.int64], pa.Array]:
    """(count of each row's values one list level deeper, these values); a row with a null list is marked in `null` and has none."""
    missing = _nulls(array)
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.where(missing, 0, array.type.list_size)
    else:
        offsets = np.asarray(array.offsets, dtype=np.int64)
        lengths = np.where(missing, 0, np.diff(offsets))
    owner = np.repeat(np.arange(len(widths)), widths)
    null[owner[missing]] = True
    return np.bincount(owner, weights=lengths, minlength=len(widths)).astype(np.int64), array.flatten()


def _zeroed(values: NDArray[Any], bad: NDArray[np.bool_]) -> NDArray[Any]:
    if bad.any():
        values = values.copy()
        values[bad] = 0
    return values


def _values(array: pa.Array) -> NDArray[Any]:
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if array.null_count:
        array = array.fill_null(0)
    return array.to_numpy(zero_copy_only=False)


def _nulls(array: pa.Array) -> NDArray[np.bool_]:
    if not array.null_count:
        return np.zeros(len(array), dtype=bool)
    return np.asarray(array.is_null().to_numpy(zero_copy_only=False), dtype=bool)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _refuse_out_of_bounds(path: Path, footer: Any, table: pa.Table) -> None:
    """Raise DatasetError for a number outside the minimum and maximum in the file's footer: its pages have changed."""
    for name in table.column_names:
        if len(table) == 0 or not pa.types.is_floating(_innermost(table.schema.field(name).type)):  # integers are compared anyway
            continue
        bounds = _bounds(footer, name)
        if bounds is None:
            continue
        found = [pc.min_max(_leaves(chunk)).as_py() for chunk in table[name].chunks]
        least, greatest = (
            min((each["min"] for each in found if each["min"] is not None), default=bounds[0]),
            max((each["max"] for each in found if each["max"] is not None), default=bounds[1]),
        )
        low, high = bounds
        if least < low or greatest > high:
            wrong = least if least < low else greatest
            raise DatasetError(
                f"{path} is damaged: its footer says that {name!r} lies in {low:g}..{high:g}, found {wrong:g}; download the file again"
            )


def _bounds(footer: Any, name: str) -> tuple[float, float] | None:
    """Minimum and maximum of a column over all row groups; None where a group has no statistics, or only nulls."""
    lows, highs = [], []
    for group in range(footer.num_row_groups):
        rows = footer.row_group(group)
        for place in range(rows.num_columns):
            column = rows.column(place)
            if _LIST_LEVELS.sub("", column.path_in_schema) == name:
                stats = column.statistics
                if stats is None or not stats.has_min_max or isinstance(stats.min, bytes | str):
                    return None
                lows.append(float(stats.min))
                highs.append(float(stats.max))
    return (min(lows), max(highs)) if lows else None


def may_be_null(footer: Any, name: str) -> list[int]:
    """Row groups in which a column of bytes and paths may have a row with neither, by the groups' counts of nulls."""
    found = []
    for group in range(footer.num_row_groups):
        rows = footer.row_group(group)
        columns = [rows.column(place) for place in range(rows.num_columns)]
        leaves = [each.statistics for each in columns if each.path_in_schema in (name, f"{name}.bytes", f"{name}.path")]
        if leaves and all(each is None or not each.has_null_count or each.null_count for each in leaves):
            found.append(group)
    return found


def _innermost(kind: pa.DataType) -> pa.DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _leaves(array: pa.Array) -> pa.Array:
    while _is_list(array.type):
        array = array.flatten()
    return array


def _in_one(column: pa.ChunkedArray | pa.Array) -> pa.Array | pa.ChunkedArray:
    """Combine a column's chunks into one where it fits; a single chunk is not copied."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
