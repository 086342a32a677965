"""Tests of openpi's encoding, byte by byte, and of hostile frames."""

from types import MappingProxyType
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pi0fm_client import wire
from pi0fm_client.errors import ObservationError

NUMBERS = ["?", "i1", "<i2", ">i4", "<i8", "u1", ">u2", "<u4", ">u8", "<f2", ">f4", "<f8"]


def array_map(**changes: Any) -> dict[bytes, Any]:
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [1, 2]} | changes
    return {key.encode(): value for key, value in fields.items() if value is not None}


def frame_of(value: Any) -> bytes:
    return msgpack.packb({"x": value})


def test_an_array_is_written_as_openpi_writes_it() -> None:
    array = np.array([1, 2], np.float32)
    marker = "84 c4 0b 5f5f6e6461727261795f5f c3 c4 04 64617461 c4 08 0000803f00000040 c4 05 6474797065 a3 3c6634 c4 05 7368617065 91 02"
    expected = bytes.fromhex("81 a1 78" + marker)
    assert wire.pack({"x": array}) == expected
    assert np.array_equal(wire.unpack(expected)["x"], array)


def test_a_scalar_is_written_as_openpi_writes_it() -> None:
    expected = b"\x81\xa1x\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\x07\xc4\x05dtype\xa3<i4"
    assert wire.pack({"x": np.int32(7)}) == expected
    found = wire.unpack(expected)["x"]
    assert found == 7 and found.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NUMBERS).flatmap(
        lambda kind: hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    )
)
def test_an_array_survives_the_way(array: np.ndarray) -> None:
    found = wire.unpack(wire.pack({"x": array}))["x"]
    assert found.shape == array.shape and found.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")
    assert found.flags.writeable and found.dtype.isnative


def test_layout_does_not_matter_to_the_receiver() -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for view in (array.T, array[:, ::-1], np.asfortranarray(array)):
        assert np.array_equal(wire.unpack(wire.pack({"x": view}))["x"], view)


def test_plain_data_passes() -> None:
    message = {"prompt": "öffne", "n": -(2**63), "list": [1, 2.5, None, True], "map": {"a": {"b": b"c"}}}
    assert wire.unpack(wire.pack(message)) == message
    assert wire.unpack(wire.pack({"m": MappingProxyType({"a": (1, 2)})})) == {"m": {"a": [1, 2]}}


def test_marker_keys_may_be_text() -> None:
    textual = {key.decode(): value for key, value in array_map().items()}
    assert np.array_equal(wire.unpack(frame_of(textual))["x"], np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["text"]),
        np.zeros(2, np.complex64),
        np.zeros(2, "f4,i4"),
        np.longdouble(1),
        np.datetime64("2026-01-01"),
    ],
)
def test_only_numbers_are_packed(value: Any) -> None:
    with pytest.raises(ObservationError, match="dtype"):
        wire.pack({"x": value})


@pytest.mark.parametrize("message", [{"x": object()}, {"x": 2**64}, {"x": {1, 2}}, {1: "x"}, {b"x": 1}])
def test_what_is_no_plain_data_is_not_packed(message: dict[Any, Any]) -> None:
    with pytest.raises(ObservationError):
        wire.pack(message)


@pytest.mark.parametrize(
    "dtype", ["|O", "O", "<f16", "<c8", "|V8", "<U2", "<M8", "f4", "<f3", "<i16", "f4,f4", "(2,)f4", "<f4" * 1000, 4, b"<f4", None]
)
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ObservationError):
        wire.unpack(frame_of(array_map(dtype=dtype)))


def test_a_text_in_an_array_is_told_to_be_a_str() -> None:
    with pytest.raises(ObservationError, match="found dtype '<U21': send a text as str"):
        wire.unpack(frame_of(array_map(dtype="<U21")))


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ([-1, -2], "whole numbers >= 0"),
        ([1, 2, True], "whole numbers >= 0"),
        ([1, 2.0], "whole numbers >= 0"),
        ([3], "needs 12 bytes, found 8"),
        ([1], "needs 4 bytes, found 8"),
        ([2**40, 2**40], "may hold"),
        ([0, 2**62, 2**62], "may hold"),
        ([1] * 9, "at most 8"),
        (2, "must be a list"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: Any, line: str) -> None:
    with pytest.raises(ObservationError, match=line):
        wire.unpack(frame_of(array_map(shape=shape)))


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "text"},
        {"data": [0] * 8},
        {"data": None},
        {"shape": None},
        {"__ndarray__": False},
        {"__ndarray__": 1},
        {"more": 1},
        {"__npgeneric__": True},
    ],
)
def test_a_wrong_marker_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ObservationError):
        wire.unpack(frame_of(array_map(**changes)))


@pytest.mark.parametrize(
    ("dtype", "data"), [("<u1", 256), ("<u1", -1), ("<i4", 2**40), ("<i4", 1.5), ("<f4", "1"), ("<i4", True), ("|b1", 1), ("<f4", [1])]
)
def test_a_scalar_that_does_not_fit_is_refused(dtype: str, data: Any) -> None:
    with pytest.raises(ObservationError, match="scalar"):
        wire.unpack(frame_of({b"__npgeneric__": True, b"data": data, b"dtype": dtype}))


def test_a_bool_array_holds_bools_only() -> None:
    found = wire.unpack(frame_of(array_map(data=b"\x00\x07", dtype="|b1", shape=[2])))["x"]
    assert found.view(np.uint8).tolist() == [0, 1]


def test_every_cut_of_a_frame_is_refused_by_name() -> None:
    frame = wire.pack({"image": np.zeros((4, 4, 3), np.uint8), "state": np.zeros(3), "prompt": "pick", "n": 70_000, "t": 0.5})
    for end in range(len(frame)):
        with pytest.raises(ObservationError, match="whole"):
            wire.unpack(frame[:end])
    with pytest.raises(ObservationError, match="one message"):
        wire.unpack(frame + b"\xc0")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_give_a_map_or_an_observation_error(frame: bytes) -> None:
    try:
        assert isinstance(wire.unpack(frame), dict)
    except ObservationError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_frame_gives_a_map_or_an_observation_error(data: st.DataObject) -> None:
    frame = bytearray(wire.pack({"image": np.zeros((2, 2, 3), np.uint8), "state": np.zeros(3, np.float32), "prompt": "pick"}))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(wire.unpack(bytes(frame)), dict)
    except ObservationError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        (b"\xdf\xff\xff\xff\xff", "items"),
        (b"\xdd\xff\xff\xff\xff", "items"),
        (b"\x81\xa1x\xc6\xff\xff\xff\xff", "whole"),
        (b"\x81\xa1x\xdb\xff\xff\xff\xff", "whole"),
        (b"\x91" * 50 + b"\xc0", "nest"),
        (b"\x81\xa1x\xdc\x3f\xff" + b"\x80" * 0x3FFF, "items"),
        (b"\x81\xa1x\xd4\x01\x00", "extension"),
        (b"\x81\xa1x\xc1", "0xc1"),
        (b"\x93\x01\x02\x03", "map of keys"),
        (b"\x81\x01\x02", "text or bin keys"),
        (b"\x81\x80\x02", "text or bin keys"),
        (b"\x81\xc4\x01x\x02", "must be text"),
        (b"\x81\xa1\xff\x02", "msgpack"),
        (b"", "whole"),
    ],
)
def test_hostile_frames_are_refused_by_name(frame: bytes, line: str) -> None:
    with pytest.raises(ObservationError, match=line):
        wire.unpack(frame)


def test_the_deepest_allowed_message_passes_and_one_more_level_does_not() -> None:
    def nested(levels: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(levels):
            value = {"x": value}
        return value

    assert wire.unpack(msgpack.packb(nested(wire.MAX_DEPTH))) == nested(wire.MAX_DEPTH)
    with pytest.raises(ObservationError, match="nest"):
        wire.unpack(msgpack.packb(nested(wire.MAX_DEPTH + 1)))


def test_a_large_frame_is_refused_before_it_is_read() -> None:
    frame = wire.pack({"x": np.zeros(100, np.uint8)})
    with pytest.raises(ObservationError, match="send smaller images"):
        wire.unpack(frame, max_bytes=99)
