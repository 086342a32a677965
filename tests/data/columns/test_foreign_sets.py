"""Tests of data sets of other tools: facts stored twice that differ are one line, or read right; each kind against the slow reader."""

import json
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from any_dataset import (
    CAMERA,
    change_info,
    change_table,
    data_file,
    episodes_file,
    png,
    read_slowly,
    seen,
    set_column,
    shade,
    take_out,
    video_file,
    with_column,
    write_set,
    write_tasks,
    write_video,
)
from PIL import Image

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import LeRobotSource, examine, open_source
from pi0fm.data.config import DatasetConfig, Selection
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.data.pictures.images import resize_with_padding
from pi0fm_client.errors import ConfigError, DatasetError, Pi0fmError

SIZE = 48
ANY = Embodiment()
NAMES = ("observation.state", "action")
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def opened(root: Path, embodiment: Embodiment = ANY, **options) -> tuple[LeRobotSource, np.ndarray]:
    config = DatasetConfig(root=root, cache_dir=root.parent / "cache", video_decoder="pyav", **options)
    source = open_source(config, embodiment)
    return source, open_cache(source, config, SIZE).gather(np.arange(len(source.state)))[:, 0]


def assert_as_the_slow_reader(
    root: Path, camera: str = CAMERA, names: tuple[str, str] = ("observation.state", "action"), **options
) -> None:
    embodiment = Embodiment(cameras={"base": camera}, state=names[0], action=names[1])
    source, pictures = opened(root, embodiment, **options)
    expected = read_slowly(root, camera, names)
    assert len(source.state) == len(expected)
    for row, item in enumerate(expected):
        np.testing.assert_array_equal(source.state[row], item["state"])
        np.testing.assert_array_equal(source.action[row], item["action"])
        assert source.tasks[source.task[row]] == item["sentence"]
        assert (source.episode[row], source.end[row] - row) == (item["episode"], item["left"])
        assert np.array_equal(pictures[row], resize_with_padding(item["picture"][None], SIZE)[0]), f"another picture in row {row}"


def refused(root: Path, **options) -> str:
    with pytest.raises(Pi0fmError) as caught:
        opened(root, **options)
    line = str(caught.value)
    assert "\n" not in line and ";" in line
    return line


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("files", ["one", "episode"])
def test_a_healthy_set(tmp_path, kind, files):
    assert_as_the_slow_reader(write_set(tmp_path / "set", (8, 5, 3), kind=kind, files=files))


# times


def test_rows_that_were_taken_out_keep_the_pictures_of_their_time(tmp_path):
    root = write_set(tmp_path / "set", kind="video")
    take_out(root, {(0, 0), (0, 1), (0, 2), (1, 4)})
    _, pictures = opened(root)
    assert [seen(picture) for picture in pictures] == [*((0, step) for step in range(3, 8)), *((1, step) for step in (0, 1, 2, 3, 5, 6, 7))]
    assert_as_the_slow_reader(root)


def spans(root: Path, begin: list[float], end: list[float]) -> None:
    set_column(episodes_file(root), f"videos/{CAMERA}/from_timestamp", begin)
    set_column(episodes_file(root), f"videos/{CAMERA}/to_timestamp", end)


@pytest.mark.parametrize("rate", [5, 7, 15, 30])
def test_a_video_of_another_rate_gives_the_nearest_picture(tmp_path, rate):
    root = write_set(tmp_path / "set", kind="video")
    count = int(1.6 * rate)
    film = [shade(int(number / rate >= 0.8), (number / rate % 0.8) * 10) for number in range(count)]
    write_video(video_file(root), film, rate)
    assert_as_the_slow_reader(root)


def test_a_gap_and_a_variable_rate_give_the_nearest_picture_or_a_line(tmp_path):
    root = write_set(tmp_path / "set", kind="video")
    times = [0, 0.11, 0.19, 0.31, 0.4, 0.6, 0.69, 0.71, 0.8, 0.9, 1.0, 1.05, 1.1, 1.3, 1.4, 1.5]
    write_video(video_file(root), [shade(int(time >= 0.8), time % 0.8 * 10) for time in times], 10, times)
    assert_as_the_slow_reader(root)
    times = [0, 0.1, 0.5, 0.6, 0.7, *[0.8 + 0.1 * k for k in range(8)]]
    write_video(video_file(root), [shade(int(time >= 0.8), time % 0.8 * 10) for time in times], 10, times)
    root.joinpath("meta/info.json").touch()
    line = refused(root, tolerance_s=0.12)
    assert (
        "row 3 of episode 0, at 0.300 s, within 0.120 s, found the nearest one at 0.100 s" in line and "--dataset.tolerance_s 0.201" in line
    )
    assert_as_the_slow_reader(root, tolerance_s=0.25)


def test_the_last_rows_never_see_the_next_episode(tmp_path):
    """The first episode's video ends one picture early: the picture before it is nearer than the neighbour's, and is allowed."""
    root = write_set(tmp_path / "set", kind="video")
    film = [shade(0, step) for step in range(7)] + [shade(1, step) for step in range(9)]
    write_video(video_file(root), film, 10, [0.1 * k for k in range(7)] + [0.8 + 0.1 * k for k in range(9)])
    _, pictures = opened(root)
    assert [seen(picture) for picture in pictures[6:9]] == [(0, 6), (0, 6), (1, 0)]


def test_a_video_that_starts_late_is_a_line_with_its_first_picture(tmp_path):
    root = write_set(tmp_path / "set", kind="video")
    film = [shade(number // 8, number % 8) for number in range(16)]
    write_video(video_file(root), film, 10, [0.2 + number / 10 for number in range(16)])
    assert "row 0 of episode 0, at 0.000 s, within 0.100 s, found the nearest one at 0.200 s" in refused(root)


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        ([0.0, 0.4], [0.8, 1.2], "episode 1 begins at 0.4 s of .*, where episode 0 lasts until 0.8 s"),
        ([0.8, 0.0], [0.8, 0.8], "episode 0 goes from 0.8 to 0.8 s of .*, which is no span"),
        ([0.0, 0.8], [0.4, 1.6], "episode 0 lasts 0.4 s, but its last row is at 0.7 s"),
        ([0.0, 8.0], [0.8, 8.8], "row 8 of episode 1, at 8.000 s, within 0.100 s, found no picture in its span"),
        ([-1.0, 0.8], [0.8, 1.6], "which is no span"),
        ([0.0, None], [0.8, None], "must give videos/.*/from_timestamp of every episode, found null for episode 1"),
    ],
)
def test_spans_of_videos_that_overlap_run_over_or_are_missing(tmp_path, begin, end, words):
    root = write_set(tmp_path / "set", kind="video")
    spans(root, begin, end)
    with pytest.raises(DatasetError, match=words):
        opened(root)


def test_a_set_without_ends_of_spans_is_read_by_its_rows(tmp_path):
    root = write_set(tmp_path / "set", kind="video")
    expected = opened(root)[1]
    change_table(episodes_file(root), lambda table: table.drop([f"videos/{CAMERA}/to_timestamp"]))
    assert np.array_equal(opened(root)[1], expected)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (
            "timestamp",
            [0.1 * k for k in range(8)] + [0.0] * 8,
            "row 9 of episode 1 .* timestamp above that of the row before it",
        ),
        ("timestamp", [0.2 * k for k in range(8)] * 2, "says 10 rows a second, but the column 'timestamp' has 5"),
        ("timestamp", [0.1 * k for k in range(7)] + [None] + [0.1 * k for k in range(8)], "row 7 of episode 0 .* timestamp above .* nan"),
        ("timestamp", [100 + 0.1 * k for k in range(8)] * 2, "row 0 of episode 0 .* has timestamp 100 s, but frame_index 0 .* is 0 s"),
        (
            "timestamp",
            [0.04 * k for k in range(8)] + [0.1 * k for k in range(8)],
            r"row 1 of episode 0 .* timestamp 0\.04 s, but frame_index 1 at 10 rows a second \(the episode has 25\) is 0\.1 s",
        ),
        ("timestamp", [0.1 * k for k in range(8)] + [0.07 + 0.1 * k for k in range(8)], "row 8 of episode 1 .* has timestamp 0.07 s"),
        ("timestamp", [0.1 * k for k in range(1, 9)] + [0.1 * k for k in range(8)], "row 0 of episode 0 .* has timestamp 0.1 s"),
        ("timestamp", [0.1 * k for k in range(3)] + [0.36] + [0.1 * k for k in (4, 5, 6, 7, *range(8))], "row 3 .* timestamp 0.36 s"),
        ("timestamp", [100.0 * k for k in range(8)] * 2, "says 10 rows a second, but the column 'timestamp' has 0.01"),
        ("index", [*range(15), 1e300], "'index' of .* whole numbers, found 1e\\+300 in row 15"),
        ("index", [*range(15), 2**64 - 5], "'index' of .* whole numbers, found 1.8446744073709552e\\+19 in row 15"),
        ("frame_index", [0, 1, 2, 2, *range(4, 8), *range(8)], "row 3 of episode 0 .* frame_index above"),
        ("index", [*range(8), *range(9, 17)], "but the column 'index' has 9 where 8 is due"),
        ("index", [*range(8), 3, *range(9, 16)], "episode 1 has 8 rows, 8 to 15, but the column 'index' has 3"),
        ("episode_index", [0] * 9 + [1] * 7, "episode 0 has 8 rows, 0 to 7, but 9 rows name it"),
        ("episode_index", [0] * 8 + [4] * 8, "row 8 of .* is of episode 4, which .* does not list"),
        ("episode_index", [0] * 8 + [None] * 8, "'episode_index' of .* whole numbers, found null in row 8"),
        ("task_index", [0] * 15 + [None], "row 15 of episode 1 .* has task_index null"),
        ("task_index", [0] * 15 + [0.5], "row 15 of episode 1 .* has task_index null or no whole number"),
    ],
)
def test_columns_that_contradict_each_other(tmp_path, name, values, words):
    root = write_set(tmp_path / "set", kind="video")
    kind = pa.float32() if name == "timestamp" else pa.uint64() if 2**64 - 5 in values else None
    set_column(data_file(root), name, pa.array(values, kind))
    with pytest.raises(DatasetError, match=words):
        opened(root)


def test_times_that_differ_from_the_frame_index_and_are_right(tmp_path):
    """Rows that were removed and renumbered; a clock that runs 5 % slow in rows and video; times from the recording's start."""
    root = write_set(tmp_path / "taken out", kind="video")
    take_out(root, {(0, 0), (0, 1), (1, 4)})
    set_column(data_file(root), "frame_index", [*range(6), *range(7)])
    assert [seen(picture)[1] for picture in opened(root)[1]] == [*range(2, 8), 0, 1, 2, 3, 5, 6, 7]
    root = write_set(tmp_path / "slow", (20,), kind="video")
    times = [k * 0.095 for k in range(20)]
    set_column(data_file(root), "timestamp", pa.array(times, pa.float32()))
    set_column(episodes_file(root), f"videos/{CAMERA}/to_timestamp", [1.9])
    write_video(video_file(root), [shade(0, k) for k in range(20)], 10, times)
    assert [seen(picture)[1] for picture in opened(root)[1]] == list(range(20))
    root = write_set(tmp_path / "pictures in rows")
    set_column(data_file(root), "timestamp", pa.array([70 + 0.1 * k for k in range(16)], pa.float32()))
    assert_as_the_slow_reader(root)


def swapped(root: Path, *names: str) -> None:
    for name in names:
        values = pq.read_table(episodes_file(root))[f"videos/{CAMERA}/{name}"].to_pylist()
        set_column(episodes_file(root), f"videos/{CAMERA}/{name}", [values[0], values[2], values[1]])


@pytest.mark.parametrize(("files", "names"), [("one", ("from_timestamp", "to_timestamp")), ("episode", ("file_index",))])
def test_videos_in_another_order_than_their_episodes(tmp_path, files, names):
    root = write_set(tmp_path / "set", (8, 8, 8), kind="video", files=files)
    swapped(root, *names)
    line = refused(root)
    assert f"in the order of their episodes, found {CAMERA!r} of episode 2 where 1 is due" in line and "(1 more" in line
    assert seen(opened(root, any_video_order=True)[1][8])[0] == 2
    if files == "episode":  # where rows lie in that order too, nothing is swapped
        for name, values in {"dataset_from_index": [0, 16, 8], "dataset_to_index": [8, 24, 16]}.items():
            set_column(episodes_file(root), name, values)
        for number, first in ((1, 16), (2, 8)):
            set_column(data_file(root, number), "index", np.arange(first, first + 8))
        assert sorted({seen(picture)[0] for picture in opened(root)[1][8:16]}) == [1]


def test_a_set_without_timestamps_is_shown_by_its_frame_index_or_its_order(tmp_path):
    root = write_set(tmp_path / "set", kind="video")
    expected = opened(root)[1]
    for name in ("timestamp", "frame_index"):
        change_table(data_file(root), lambda table, name=name: table.drop([name]))
        change_info(root, lambda info, name=name: info["features"].pop(name))
        assert np.array_equal(opened(root)[1], expected)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"dataset_to_index": [16, 16]}, "episode 0 has 8 rows, 0 to 15, which are 16"),
        ({"dataset_to_index": [8, 8]}, "episode 1 has 8 rows, 8 to 7, which are 0"),
        ({"dataset_from_index": [8, 0], "dataset_to_index": [16, 8]}, "episode 0 has 8 rows, 8 to 15, but the column 'index' has 0"),
        ({"length": [5, 8]}, "episode 0 has 5 rows, 0 to 7, which are 8"),
        ({"length": [8, None]}, "must give length of every episode, found null for episode 1"),
        ({"episode_index": [0, 0]}, "episode 0 is listed twice"),
        ({"episode_index": [0, None]}, "episode_index of .* must be whole numbers, found null"),
        ({"data/file_index": [0, 7]}, "file-007.parquet is missing"),
    ],
)
def test_bounds_of_episodes_that_are_wrong(tmp_path, columns, words):
    root = write_set(tmp_path / "set")
    for name, values in columns.items():
        set_column(episodes_file(root), name, values)
    with pytest.raises(DatasetError, match=words):
        opened(root)


def test_an_episodes_file_that_is_there_twice_and_a_data_file_of_nobody(tmp_path):
    root = write_set(tmp_path / "set")
    twin = episodes_file(root).with_name("file-001.parquet")
    twin.write_bytes(episodes_file(root).read_bytes())
    assert f"episode 0 is listed twice, in {episodes_file(root)} and {twin}; remove" in refused(root)
    twin.unlink()
    data_file(root, 9).write_bytes(data_file(root).read_bytes())
    assert f"{data_file(root, 9)} holds rows of no episode" in refused(root)
    change_table(episodes_file(root), lambda table: table.slice(0, 1))
    assert "promises 2 episodes, but" in refused(root)


# tasks

LAYOUTS = {
    "index": lambda tasks: pd.DataFrame({"task_index": list(tasks)}, index=pd.Index(list(tasks.values()), name="task")),
    "unnamed index": lambda tasks: pd.DataFrame({"task_index": list(tasks)}, index=list(tasks.values())),
    "columns": lambda tasks: pd.DataFrame({"task_index": list(tasks), "task": list(tasks.values())}),
    "columns, shuffled": lambda tasks: pd.DataFrame({"task": list(tasks.values())[::-1], "task_index": list(tasks)[::-1]}),
    "numbers as index": lambda tasks: pd.DataFrame({"task": list(tasks.values())}, index=pd.Index(list(tasks), name="task_index")),
    "unnamed numbers": lambda tasks: pd.DataFrame({"task": list(tasks.values())}, index=list(tasks)),
    "int32 and more columns": lambda tasks: pd.DataFrame(
        {"n": 1.0, "task_index": np.array(list(tasks), np.int32), "task": list(tasks.values()), "language": "en"}
    ),
    "categories": lambda tasks: pd.DataFrame({"task_index": list(tasks), "task": pd.Categorical(list(tasks.values()))}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", [(0, 1), (2, 5), (1, 2), (7, 3)])
def test_a_tasks_number_is_a_key_in_every_layout(tmp_path, layout, keys):
    tasks = dict(zip(keys, ("close the lid", "wipe the table"), strict=True))
    root = write_set(tmp_path / "set", (3, 3), tasks=tasks)
    LAYOUTS[layout](tasks).to_parquet(root / "meta/tasks.parquet")
    source = open_source(DatasetConfig(root=root), Embodiment())
    assert [source.tasks[task] for task in source.task] == ["close the lid"] * 3 + ["wipe the table"] * 3


def test_numbers_that_are_the_places_of_pandas(tmp_path):
    root = write_set(tmp_path / "set", (3, 3))
    pd.DataFrame({"task": ["a", "b"]}).to_parquet(root / "meta/tasks.parquet")
    source = open_source(DatasetConfig(root=root), Embodiment())
    assert [source.tasks[task] for task in source.task] == ["a"] * 3 + ["b"] * 3


@pytest.mark.parametrize("used", [5, -1])
def test_a_row_of_a_task_that_is_not_there(tmp_path, used):
    root = write_set(tmp_path / "set")
    set_column(data_file(root), "task_index", [0] * 15 + [used])
    assert f"row 15 of episode 1 in {data_file(root)} has task_index {used}, but meta/tasks.parquet has 0, 1" in refused(root)


def test_two_sentences_of_one_number_and_two_numbers_of_one_sentence(tmp_path):
    root = write_set(tmp_path / "set", (3, 3, 3), task_of=lambda episode, step: episode % 2)
    pd.DataFrame({"task_index": [0, 0, 1], "task": ["a", "b", "c"]}).to_parquet(root / "meta/tasks.parquet")
    assert "gives task 0 two sentences, 'a' and 'b'" in refused(root)
    write_tasks(root, {0: "fold it", 1: "fold it", 2: "press it"})
    source = open_source(DatasetConfig(root=root), Embodiment(), Selection(tasks=("fold it",)))
    assert source.tasks == ("fold it", "press it") and len(source.frames) == 9


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary(), pa.large_binary(), pa.large_string()])
def test_sentences_of_every_type(tmp_path, kind):
    root = write_set(tmp_path / "set", (3, 3))
    column = pa.array(["öffne", "press"]).cast(pa.binary()).cast(kind) if kind == pa.large_binary() else pa.array(["öffne", "press"], kind)
    pq.write_table(pa.table({"task_index": [0, 1], "task": column}), root / "meta/tasks.parquet")
    assert open_source(DatasetConfig(root=root), Embodiment()).tasks == ("öffne", "press")
    pq.write_table(pa.table({"task_index": [0, 1], "task": [b"\xff", b"b"]}), root / "meta/tasks.parquet")
    assert "tasks.parquet is cut or damaged" in refused(root)


def test_several_tasks_in_an_episode(tmp_path):
    root = write_set(tmp_path / "set", (6, 3), task_of=lambda episode, step: int(step >= 3 and episode == 0))
    source = open_source(DatasetConfig(root=root), Embodiment(), Selection(tasks=("open the drawer",)))
    assert source.frames.tolist() == [3, 4, 5] and len(source.state) == 6  # a chunk may go on in rows of another task
    assert source.norm_stats(4).num_frames == 3


# columns

STORED = {
    "float64 lists": lambda rows: pa.array(rows, pa.list_(pa.float64())),
    "float16 lists": lambda rows: pa.array([np.array(row, np.float16) for row in rows], pa.list_(pa.float16())),
    "large lists": lambda rows: pa.array(rows, pa.large_list(pa.float32())),
    "fixed lists": lambda rows: pa.array(rows, pa.list_(pa.float32(), 3)),
    "ints": lambda rows: pa.array([[int(value) for value in row] for row in rows], pa.list_(pa.int64())),
    "lists of lists": lambda rows: pa.array([[[value] for value in row] for row in rows], pa.list_(pa.list_(pa.float32()))),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_rows_of_numbers_in_every_type(tmp_path, stored, kind):
    root = write_set(tmp_path / "set", kind=kind)
    table = pq.read_table(data_file(root))
    set_column(data_file(root), "action", STORED[stored](table["action"].to_pylist()))
    rows = pq.read_table(data_file(root))["action"].to_pylist()
    expected = np.array([np.asarray(row, np.float32).reshape(-1) for row in rows], np.float32)
    assert np.array_equal(opened(root)[0].action, expected)


@pytest.mark.parametrize("shape", [[], [1]])
@pytest.mark.parametrize("listed", [False, True])
def test_a_state_of_one_number(tmp_path, shape, listed):
    root = write_set(tmp_path / "set")
    values = np.linspace(0, 1, 16, dtype=np.float32)
    set_column(data_file(root), "observation.state", pa.array([[v] for v in values] if listed else values))
    change_info(root, lambda info: info["features"]["observation.state"].update(shape=shape))
    assert np.array_equal(opened(root)[0].state, values[:, None])


@pytest.mark.parametrize("name", ["index", "episode_index", "task_index", "timestamp", "frame_index"])
def test_bookkeeping_in_lists_of_one_and_as_other_types(tmp_path, name):
    root = write_set(tmp_path / "set", kind="video")
    values = pq.read_table(data_file(root))[name].to_pylist()
    set_column(data_file(root), name, pa.array([[value] for value in values]))
    assert_as_the_slow_reader(root)
    set_column(data_file(root), name, pa.array([float(value) for value in values], pa.float64()))
    assert_as_the_slow_reader(root)


def test_files_of_one_set_with_other_schemas(tmp_path):
    root = write_set(tmp_path / "set", (4, 4), files="episode", kind="video")
    change_table(data_file(root, 1), lambda table: with_column(table, "language", ["x"] * 4).select(list(reversed(table.column_names))))
    set_column(data_file(root, 1), "action", STORED["float64 lists"](pq.read_table(data_file(root, 1))["action"].to_pylist()))
    set_column(data_file(root, 1), "index", pa.array([4, 5, 6, 7], pa.int32()))
    assert_as_the_slow_reader(root)
    change_table(data_file(root, 1), lambda table: table.drop(["action"]))
    assert f"{data_file(root, 1)} lacks the column 'action'" in refused(root)


def short(rows):
    rows[3] = rows[3][:2]


def short_and_long(rows):
    rows[3], rows[9] = rows[3][:2], [*rows[9], 7.0]


def null(rows):
    rows[3] = None


def null_inside(rows):
    rows[3] = [1.0, None, 2.0]


def infinite(rows):
    rows[3] = [1.0, float("inf"), 2.0]


def not_a_number(rows):
    rows[3] = [1.0, float("nan"), 2.0]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (short, "must have 3 numbers in 'action', .*found 2 numbers"),
        (short_and_long, "must have 3 numbers in 'action', .*found 2 numbers"),
        (null, "found null"),
        (null_inside, "found a null among its numbers"),
        (infinite, r"must have finite numbers in 'action', found \[1.0, inf, 2.0\]"),
        (not_a_number, r"must have finite numbers in 'action', found \[1.0, nan, 2.0\]"),
    ],
)
def test_rows_that_are_not_as_wide_or_not_numbers(tmp_path, edit, words):
    root = write_set(tmp_path / "set")
    rows = pq.read_table(data_file(root))["action"].to_pylist()
    good = np.array(rows, np.float32)
    edit(rows)
    set_column(data_file(root), "action", pa.array(rows, pa.list_(pa.float32())))
    with pytest.raises(DatasetError, match=f"row 3 of episode 0 in {data_file(root)} .*{words}.*--dataset.skip_bad true"):
        opened(root)
    if edit is not short_and_long:
        source, _ = opened(root, skip_bad=True)
        assert np.array_equal(source.action, good[8:]) and source.episode.tolist() == [1] * 8
        assert [fault.episode for fault in source.left_out] == [0]


def test_a_width_in_the_description_that_no_row_has(tmp_path):
    root = write_set(tmp_path / "set")
    change_info(root, lambda info: info["features"]["action"].update(shape=[6]))
    assert "must have 6 numbers in 'action', as meta/info.json says, found 3 numbers" in refused(root)


@pytest.mark.parametrize("values", [[f"s{k}" for k in range(16)], [0.5] * 16, [None] * 16, [[1, 2]] * 16])
def test_a_foreign_column_named_like_one_of_ours(tmp_path, values):
    root = write_set(tmp_path / "set")
    set_column(data_file(root), "seed", values)
    change_info(root, lambda info: info["features"].update(seed={"dtype": "string", "shape": [1], "names": None}))
    assert opened(root)[0].demonstration_seeds == {}


def test_a_changed_page_is_told_by_the_files_own_bounds_and_sums(tmp_path):
    root = write_set(tmp_path / "set")
    path = data_file(root)
    table = pq.read_table(path)
    for sums, words in ((True, "cut or damaged"), (False, "is damaged: its footer says that 'action' lies in")):
        pq.write_table(table, path, use_dictionary=False, compression="none", write_page_checksum=sums)
        content = bytearray(path.read_bytes())
        wanted = np.asarray(table["action"].to_pylist()[5], np.float32).tobytes()
        place = content.index(wanted)
        content[place + 7] ^= 0x20  # of an exponent: 5 becomes 9e19
        path.write_bytes(bytes(content))
        with pytest.raises(DatasetError, match=words):
            opened(root)


# pictures


def gray(mode: str, value: int = 200) -> bytes:
    file = BytesIO()
    Image.new(mode, (48, 32), value).save(file, "TIFF" if mode in ("F", "I") else "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["bytes", "path", "both", "plain path", "plain bytes"])
def test_pictures_as_bytes_and_as_files(tmp_path, form):
    root = write_set(tmp_path / "set", (3, 3))
    stored = []
    for number in range(6):
        content = png(shade(number // 3, number % 3))
        name = f"images/{number}.png"
        (root / "images").mkdir(exist_ok=True)
        if "path" in form:
            (root / name).write_bytes(content)
        stored.append(
            {
                "bytes": {"bytes": content, "path": None},
                "path": {"bytes": None, "path": name},
                "both": {"bytes": content, "path": "elsewhere.png"},
                "plain path": name,
                "plain bytes": content,
            }[form]
        )
    kind = {"plain path": pa.string(), "plain bytes": pa.binary()}.get(form, PICTURE)
    set_column(data_file(root), CAMERA, pa.array(stored, kind))
    assert_as_the_slow_reader(root)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "found null"),
        ({"bytes": None, "path": None}, "found neither bytes nor a path"),
        ({"bytes": b"", "path": None}, "found neither bytes nor a path"),
        ({"bytes": b"no picture", "path": None}, r"cannot be decoded \(of no known format\)"),
        ({"bytes": png(shade(0, 0))[:80], "path": None}, "cannot be decoded"),
        ({"bytes": None, "path": "gone.png"}, "names the file gone.png, which is not in"),
        ({"bytes": gray("I;16"), "path": None}, "found mode 'I;16', a depth map"),
        ({"bytes": gray("F"), "path": None}, "found mode 'F', a depth map"),
        ({"bytes": gray("I"), "path": None}, "found mode 'I', a depth map"),
    ],
)
def test_pictures_that_are_missing_broken_or_no_colour(tmp_path, value, words):
    root = write_set(tmp_path / "set", (3, 3))
    stored = pq.read_table(data_file(root))[CAMERA].to_pylist()
    stored[4] = value
    set_column(data_file(root), CAMERA, pa.array(stored, PICTURE))
    with pytest.raises(DatasetError, match=f"'{CAMERA}' in row 4 of episode 1 of .*{words}"):
        opened(root)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "said", [{"shape": [32, 64, 3]}, {"shape": [48, 32, 3]}, {"shape": [3, 48, 32]}, {"info": {"video.height": 30, "video.width": 48}}]
)
def test_pictures_of_another_size_than_is_said(tmp_path, kind, said):
    root = write_set(tmp_path / "set", (3, 3), kind=kind)
    change_info(root, lambda info: info["features"][CAMERA].update(said))
    assert "is 32 pixels high and 48 wide, but meta/info.json says" in refused(root)
    for right in ({"shape": [3, 32, 48], "names": None, "info": {}}, {"shape": [48, 32, 3], "names": ["width", "height", "rgb"]}):
        change_info(root, lambda info, right=right: info["features"][CAMERA].update(right))
        assert_as_the_slow_reader(root)


def test_hidden_files_are_nobodys(tmp_path):
    root = write_set(tmp_path / "set", kind="video")
    fingerprint = opened(root)[0].fingerprint
    for path in (data_file(root), episodes_file(root), video_file(root)):
        path.with_name(f"._{path.name}").write_bytes(b"of a file manager")
    (root / "data/.trash").mkdir()
    (root / "data/.trash/file-000.parquet").write_bytes(b"x")
    assert_as_the_slow_reader(root)
    assert opened(root)[0].fingerprint == fingerprint


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P"])
def test_gray_and_transparent_pictures_are_what_they_show(tmp_path, mode):
    root = write_set(tmp_path / "set", (3, 3))
    file = BytesIO()
    plain = Image.new("RGB", (48, 32), (90, 90, 90))
    (plain.quantize() if mode == "P" else plain.convert(mode)).save(file, "PNG")
    set_column(
        data_file(root),
        CAMERA,
        pa.array([{"bytes": file.getvalue(), "path": None}] * 6, PICTURE),
    )
    assert (np.abs(opened(root)[1][:, 8:40].astype(int) - 90) <= 3).all()


def test_depth_maps_are_left_out_or_refused_by_name(tmp_path):
    root = write_set(tmp_path / "set", (3, 3), cameras=(CAMERA, "observation.images.depth"), kind="video")
    change_info(root, lambda info: info["features"]["observation.images.depth"].update(info={"video.is_depth_map": True}))
    assert list(opened(root)[0].embodiment.cameras) == ["base"]
    with pytest.raises(ConfigError, match=r"'observation\.images\.depth' of .*, a depth map; pi0fm reads colour pictures"):
        opened(root, Embodiment(cameras={"depth": "observation.images.depth"}))
    with av.open(str(video_file(root)), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "gray16le"
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48), 3000, np.uint16), format="gray16le")))
        container.mux(stream.encode(None))
    assert "is a depth map (gray16le), not colour of 8 bits" in refused(root)


# names


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (("observation/images/base", "observation.images.wrist"), ["base", "wrist"]),
        (("observation.images.left.rgb", "observation.images.right.rgb"), ["left_rgb", "right_rgb"]),
        (("image", "wrist_image"), ["image", "wrist_image"]),
        (("observation.images.left cam", "observation.images.right cam"), ["left_cam", "right_cam"]),
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_cameras_have_names_of_their_own_and_are_asked_for_by_their_columns(tmp_path, columns, names, kind):
    root = write_set(tmp_path / "set", (3, 3), cameras=columns, kind=kind)
    source, _ = opened(root)
    assert list(source.embodiment.cameras) == names
    sent = {column: shade(0, 1) for column in columns}
    seen_ = source.embodiment.observation({**sent, "observation.state": np.zeros(4, np.float32), "prompt": "go"})
    assert list(seen_.images) == names


def test_two_columns_that_a_client_cannot_tell_apart(tmp_path):
    root = write_set(tmp_path / "set", (3, 3), cameras=("observation/images/base", "observation.images.base"))
    assert "are one key to a client; type --embodiment.cameras.NAME COLUMN" in refused(root)


def test_names_of_openpi_and_matrices_are_told_with_what_to_type(tmp_path):
    root = write_set(tmp_path / "set", (3, 3), cameras=("image",), names=("state", "actions"))
    assert refused(root).endswith("found no such column; type --embodiment.state state")
    with pytest.raises(ConfigError, match=r"type --embodiment\.action actions$"):
        opened(root, Embodiment(state="state"))
    assert_as_the_slow_reader(root, "image", ("state", "actions"))
    change_info(root, lambda info: info["features"]["actions"].update(shape=[3, 1]))
    with pytest.raises(ConfigError, match=r"column 'actions' of .* must be one-dimensional, found shape \[3, 1\]"):
        opened(root, Embodiment(state="state", action="actions"))


# metadata


@pytest.mark.parametrize(
    "note", [{"dtype": "string", "shape": None}, {"dtype": "string"}, {"dtype": None, "shape": [1]}, {}, {"dtype": "language", "shape": []}]
)
def test_features_that_are_not_used_may_be_odd(tmp_path, note):
    root = write_set(tmp_path / "set", (3, 3))
    change_info(root, lambda info: info["features"].update(note=note))
    assert_as_the_slow_reader(root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": None}, "lacks fps"),
        ({"fps": 0}, "fps of .* must be a number above 0, found 0"),
        ({"fps": float("nan")}, "fps of .* must be a number above 0, found nan"),
        ({"fps": "ten"}, "fps of .* must be a number above 0, found 'ten'"),
        ({"features": []}, "features of .* must be an object"),
        ({"features": {"action": 3}}, "features of .* must be an object"),
        ({"total_frames": "16"}, "total_frames of .* must be a whole number, found '16'"),
        ({"total_episodes": 2.5}, "total_episodes of .* must be a whole number, found 2.5"),
        ({"total_episodes": True}, "total_episodes of .* must be a whole number, found True"),
        ({"video_path": None}, "must give video_path"),
        ({"video_path": "videos/{camera}.mp4"}, "video_path of .* names an unknown field"),
        ({"data_path": None}, "must give data_path"),
        ({"data_path": "data/{chunk_index[0]}.parquet"}, "data_path of .* names an unknown field"),
        ({"video_path": "videos/{video_key.name}.mp4"}, "video_path of .* names an unknown field"),
        ({"fps": 10**400}, "fps of .* must be a number above 0"),
        ({"total_frames": 10**400}, "total_frames of .* must be a whole number"),
        ({"total_frames": 17}, "promises 17 frames, but the parquet files hold 16"),
        ({"total_episodes": 3}, "promises 3 episodes, but .* lists 2"),
    ],
)
def test_descriptions_of_another_form(tmp_path, change, words):
    root = write_set(tmp_path / "set", kind="video")
    change_info(root, lambda info: info.update(change))
    with pytest.raises(DatasetError, match=words):
        opened(root)


@pytest.mark.parametrize(
    "name", ["length", "dataset_to_index", f"videos/{CAMERA}/from_timestamp", f"videos/{CAMERA}/file_index", "episode_index"]
)
def test_a_column_of_the_episodes_that_is_not_there(tmp_path, name):
    root = write_set(tmp_path / "set", kind="video")
    change_table(episodes_file(root), lambda table: table.drop([name]))
    assert f"{episodes_file(root)} lacks the column {name!r}" in refused(root)


def test_no_rows_at_all(tmp_path):
    root = write_set(tmp_path / "set")
    for path in (data_file(root), episodes_file(root)):
        change_table(path, lambda table: table.slice(0, 0))
    change_info(root, lambda info: info.update(total_frames=0, total_episodes=0))
    assert "holds no episodes" in refused(root)


@pytest.mark.parametrize("shape", [[-3], [True], [10**12]])
def test_a_shape_that_no_array_has_is_no_shape(tmp_path, shape):
    root = write_set(tmp_path / "set")
    change_info(root, lambda info: info["features"]["action"].update(shape=shape))
    assert "action" in refused(root)


def test_a_description_nested_without_end(tmp_path):
    root = write_set(tmp_path / "set")
    (root / "meta" / "info.json").write_text("[" * 200_000)
    assert "info.json is not readable" in refused(root)


def test_chosen_episodes_without_rows_in_their_file(tmp_path):
    root = write_set(tmp_path / "set")
    change_table(data_file(root), lambda table: table.slice(0, 8))
    assert refused(root, episodes=(1,))


@pytest.mark.parametrize("kind", [pa.string(), pa.duration("us")])
def test_times_that_are_no_numbers(tmp_path, kind):
    root = write_set(tmp_path / "set")
    values = [str(row) if kind == pa.string() else row for row in range(16)]
    set_column(data_file(root), "timestamp", pa.array(values, kind))
    assert "'timestamp' must hold seconds as numbers" in refused(root)


# what is left out


def damaged(root: Path, number: int) -> None:
    """Episode `number` is bad in every way: no rows, no video, bounds of another."""
    data_file(root, number).unlink()
    video_file(root, number).unlink()
    table = pq.read_table(episodes_file(root))
    for name in ("length", f"videos/{CAMERA}/from_timestamp"):
        values = table[name].to_pylist()
        values[number] = None
        set_column(episodes_file(root), name, values)


@pytest.mark.parametrize(
    "selection", [Selection(episodes=(0, 2)), Selection(exclude=(1,)), Selection(tasks=("pick up the cube",)), Selection(min_frames=4)]
)
def test_what_a_choice_leaves_out_is_neither_read_nor_decoded(tmp_path, selection):
    """A partial download: the files of the chosen episodes are enough."""
    root = write_set(tmp_path / "set", (5, 3, 6), kind="video", files="episode")
    whole = read_slowly(root)
    damaged(root, 1)
    config = DatasetConfig(root=root, cache_dir=tmp_path / "cache", video_decoder="pyav")
    source = open_source(config, Embodiment(), selection)
    assert source.episode.tolist() == [0] * 5 + [2] * 6 and source.rows.tolist() == [*range(5), *range(8, 14)]
    assert source.end.tolist() == [5] * 5 + [11] * 6
    pictures = open_cache(source, config, SIZE).gather(np.arange(11))[:, 0]
    expected = [item for item in whole if item["episode"] != 1]
    for row, item in enumerate(expected):
        assert np.array_equal(source.action[row], item["action"])
        assert np.array_equal(pictures[row], resize_with_padding(item["picture"][None], SIZE)[0])


def test_skip_bad_leaves_out_what_is_named_and_says_it(tmp_path, capsys):
    root = write_set(tmp_path / "set", (5, 3, 6), kind="video", files="episode")
    damaged(root, 1)
    config = DatasetConfig(root=root, skip_bad=True)
    source = open_source(config, Embodiment())
    assert source.episode.tolist() == [0] * 5 + [2] * 6
    assert {fault.episode for fault in source.left_out} == {1}
    assert "left out 1 of 3 episodes: 1" in capsys.readouterr().err
    _, faults = examine(config, Embodiment())
    assert {fault.kind for fault in faults} == {"file"}
    for number in (0, 2):
        damaged(root, number)
    assert "is missing" in refused(root, skip_bad=True)


def test_a_file_that_holds_good_and_bad_episodes_is_read_for_the_good(tmp_path):
    root = write_set(tmp_path / "set", (4, 4))
    rows = pq.read_table(data_file(root))["action"].to_pylist()
    rows[1] = None
    set_column(data_file(root), "action", pa.array(rows, pa.list_(pa.float32())))
    source, _ = opened(root, episodes=(1,))
    assert source.action.tolist() == rows[4:] and source.end.tolist() == [4] * 4


def test_a_recording_note_of_another_form_is_nobodys(tmp_path):
    root = write_set(tmp_path / "set", (3, 3))
    (root / "meta/pi0fm_recording.json").write_text(json.dumps({"prompts": ["x"], "cameras": {"a": 1}}))
    assert opened(root)[0].camera_sources == {}
