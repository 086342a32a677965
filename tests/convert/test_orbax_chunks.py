"""Tests of arrays decoded as they are read: equal to tensorstore's for any chunks, compression, store and order."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pi0fm.convert.orbax_chunks import array_stream, find_in_files, find_in_tree

ml_dtypes = pytest.importorskip("ml_dtypes", reason="tensorstore, extra jax, is not installed")  # it comes with it
SHAPE = (4, 2, 10, 6)
ZSTD = {"id": "zstd", "level": 1}


def write(root: Path, values: np.ndarray, chunks: tuple[int, ...], *, tree: bool = True, driver: str = "zarr", **metadata):
    """`values` under the key `w`, and (tensorstore's array, the stream over it)."""
    import tensorstore

    base = {"driver": "file", "path": f"{root}/"}
    # small nodes, so that the tree has several levels, and no number within a node
    store = {"driver": "ocdbt", "base": base, "config": {"max_inline_value_bytes": 1, "max_decoded_node_bytes": 400}} if tree else base
    dtype = "bfloat16" if values.dtype == ml_dtypes.bfloat16 else values.dtype.str
    usual = {"compressor": ZSTD, "dtype": dtype, "chunks": chunks, "shape": values.shape}
    if driver == "zarr3":
        usual = {"data_type": "float32", "shape": values.shape}
    array = tensorstore.open(
        {"driver": driver, "kvstore": {**store, "path": f"{store.get('path', '')}w/"}, "metadata": usual | metadata},
        create=True,
        fill_value=None,
    ).result()
    array.write(values).result()
    if tree:
        files = tensorstore.KvStore.open(base).result()
        return array, array_stream(array, "w", find_in_tree(root, files, tensorstore.ocdbt.dump))
    return array, array_stream(array, "w", find_in_files(root))


def numbers(dtype: type = np.float32, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(SHAPE, id="whole"),
        pytest.param((1, 2, 10, 6), id="a layer"),
        pytest.param((3, 2, 10, 6), id="layers that do not divide"),
        pytest.param((4, 2, 4, 6), id="rows cut, the last chunk padded"),
        pytest.param((4, 2, 10, 4), id="columns cut, the last chunk padded"),
        pytest.param((2, 1, 3, 5), id="all cut"),
    ],
)
def test_every_entry_is_tensorstores(tmp_path, tree, dtype, packed, chunks):
    values = numbers(dtype)
    _, stream = write(tmp_path, values, chunks, tree=tree, compressor=ZSTD if packed else None)
    for layer in range(4):
        for half in range(2):
            assert np.array_equal(stream.read((layer, half)), values[layer, half])
    assert np.array_equal(stream.read(()), values)
    assert np.array_equal(stream.read((2,)), values[2])  # a step back
    assert np.array_equal(stream.read((3, 1)), values[3, 1])  # others passed over
    assert np.array_equal(stream.read((3, 1, 9)), values[3, 1, 9])
    assert stream.read((0, 1, 2, 3)) == values[0, 1, 2, 3]


@pytest.mark.parametrize(
    "metadata",
    [{"order": "F"}, {"dtype": ">f4"}, {"compressor": {"id": "gzip", "level": 1}}, {"driver": "zarr3"}],
    ids=["columns first", "big end first", "gzip", "zarr3"],
)
def test_what_only_tensorstore_can_read_is_left_to_it(tmp_path, metadata):
    assert write(tmp_path, numbers(), SHAPE, **metadata)[1] is None


def test_a_number_kept_inside_a_node_is_left_to_tensorstore(tmp_path):
    assert write(tmp_path, np.float32([[1.0]]), (1, 1), compressor=None)[1] is not None
    assert array_stream(write(tmp_path / "other", np.float32([[1.0]]), (1, 1))[0], "w", lambda _: None) is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [0, 30, 0.5, -1])
def test_a_chunk_that_is_cut(tmp_path, packed, keep):
    write(tmp_path, numbers(), SHAPE, tree=False, compressor=ZSTD if packed else None)
    content = (tmp_path / "w/0.0.0.0").read_bytes()
    (tmp_path / "w/0.0.0.0").write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    import tensorstore

    array = tensorstore.open({"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/w/"}}).result()
    stream = array_stream(array, "w", find_in_files(tmp_path))
    with pytest.raises((ValueError, OSError)):
        stream.read(())


def test_a_chunk_that_ends_early_does_not_go_on_in_the_next(tmp_path):
    """In one file of an OCDBT store the values lie behind each other."""
    import tensorstore

    array, _ = write(tmp_path, numbers(), (1, 2, 10, 6))
    find = find_in_tree(tmp_path, tensorstore.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result(), tensorstore.ocdbt.dump)
    short = array_stream(array, "w", lambda key: type(found)(found.file, found.start, found.length - 9) if (found := find(key)) else None)
    with pytest.raises((ValueError, OSError)):
        short.read((0,))


def test_a_tree_that_names_a_file_outside(tmp_path):
    class Dumped:
        def __init__(self, tree):
            self.tree = tree

        def result(self):
            return self.tree

    trees = {
        None: {"versions": [{"generation_number": 1, "root": {"location": "node"}}]},
        "node": {"entries": [{"key": b"w/0", "indirect_value": "value::..%2Fsecret:0:8"}]},
    }
    with pytest.raises(ValueError, match="names secret outside of it"):
        find_in_tree(tmp_path, None, lambda _store, node=None: Dumped(trees[node]))


def test_layers_are_unpacked_one_at_a_time(tmp_path):
    """Of a chunk of 64 layers, one layer and the buffers; tracemalloc sees numpy's arrays."""
    values = np.zeros((64, 1024, 256), np.float32)
    values[:, 0, 0] = np.arange(64)
    _, stream = write(tmp_path, values, values.shape)
    tracemalloc.start()
    for layer in range(64):
        assert stream.read((layer,))[0, 0] == layer
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values[0].nbytes <= peak < 4 * values[0].nbytes
