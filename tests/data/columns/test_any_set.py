"""Property: a data set written by a grammar of what others do is read as an independent slow reader reads it, or refused in one line.

A draw chooses a healthy set and then freedoms (which must read right) and slips (which may be refused); never is there another kind of
exception, and never a wrong number, sentence or picture.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from any_dataset import (
    change_info,
    change_table,
    episodes_file,
    one,
    read_slowly,
    shade,
    take_out,
    video_file,
    with_column,
    write_set,
    write_video,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig, Selection
from pi0fm.data.pictures.frame_cache import open_cache
from pi0fm.data.pictures.images import resize_with_padding
from pi0fm_client.errors import Pi0fmError

SIZE = 48
CAMERAS = ("observation.images.base", "observation/images/base", "image", "top view.rgb")
LAYOUTS = ("index", "columns", "numbers as index", "unnamed index")
FREEDOMS = (
    "float64",
    "fixed",
    "large",
    "listed index",
    "int32",
    "extra columns",
    "tasks",
    "rate",
    "taken out",
    "jitter",
    "no ends",
    "paths",
    "odd feature",
    "hidden files",
    "text as bytes",
    "said size",
)
SLIPS = (
    "bounds",
    "length",
    "swapped",
    "twice",
    "task",
    "null",
    "short",
    "nan",
    "span",
    "late",
    "time",
    "picture",
    "total",
    "index",
    "cut",
    "gone",
    "shape",
    "episode's rate",
    "shifted",
    "swapped spans",
    "size",
    "kind of a number",
)


@st.composite
def drawn_sets(draw):
    """(how to write it, which freedoms and slips, a seed for their details)."""
    lengths = tuple(draw(st.lists(st.integers(2, 6), min_size=1, max_size=4)))
    return {
        "lengths": lengths,
        "fps": draw(st.sampled_from([5, 10, 12.5])),
        "kind": draw(st.sampled_from(["image", "video"])),
        "camera": draw(st.sampled_from(CAMERAS)),
        "names": draw(st.sampled_from([("observation.state", "action"), ("state", "actions")])),
        "files": draw(st.sampled_from(["one", "episode"])),
        "keys": draw(st.sampled_from([(0, 1), (1, 2), (5, 3), (7, 700)])),
        "freedoms": draw(st.sets(st.sampled_from(FREEDOMS), max_size=4)),
        "slip": draw(st.none() | st.sampled_from(SLIPS)),
        "episodes": draw(st.none() | st.integers(0, len(lengths) - 1)),
        "seed": draw(st.integers(0, 10_000)),
    }


def written(root: Path, how: dict) -> Path:
    tasks = dict(zip(how["keys"], ("close the lid", "wipe the table"), strict=True))
    random = np.random.default_rng(how["seed"])
    chosen = {(e, s): how["keys"][int(random.integers(2))] for e, length in enumerate(how["lengths"]) for s in range(length)}
    write_set(
        root,
        how["lengths"],
        fps=how["fps"],
        cameras=(how["camera"],),
        kind=how["kind"],
        tasks=tasks,
        task_of=lambda e, s: chosen[e, s],
        names=how["names"],
        files=how["files"],
    )
    free(root, how, tasks, random)
    how["refused"] = slip(root, how, random) if how["slip"] else False
    return root


def free(root: Path, how: dict, tasks: dict, random: np.random.Generator) -> None:
    """Alter what may be altered."""
    freedoms, fps, action = how["freedoms"], how["fps"], how["names"][1]
    if "taken out" in freedoms and how["files"] == "one":
        rows = [(e, s) for e, length in enumerate(how["lengths"]) for s in range(length) if length > 2]
        if rows:
            take_out(root, {rows[int(random.integers(len(rows)))]})
    for path in sorted(root.glob("data/*/*.parquet")):
        table = pq.read_table(path)
        values = table[action].to_pylist()
        for word, kind in (
            ("float64", pa.list_(pa.float64())),
            ("fixed", pa.list_(pa.float32(), 3)),
            ("large", pa.large_list(pa.float32())),
        ):
            if word in freedoms and (how["files"] == "one" or random.integers(2)):
                table = with_column(table, action, pa.array(values, kind))
        if "listed index" in freedoms:
            table = with_column(table, "index", pa.array([[value] for value in table["index"].to_pylist()]))
        elif "int32" in freedoms:
            table = with_column(table, "index", table["index"].cast(pa.int32()))
        if "extra columns" in freedoms:
            table = with_column(with_column(table, "language", ["x"] * len(table)), "seed", [None] * len(table))
        if "jitter" in freedoms:
            late = np.asarray(table["timestamp"]) + random.uniform(0, 0.05 / fps, len(table))
            table = with_column(table, "timestamp", late.astype(np.float32))
        if "paths" in freedoms and how["kind"] == "image":
            stored = table[how["camera"]].to_pylist()
            for number, value in enumerate(stored):
                name = f"images/{path.stem}-{number}.png"
                (root / "images").mkdir(exist_ok=True)
                (root / name).write_bytes(value["bytes"])
                stored[number] = {"bytes": value["bytes"] if number % 2 else None, "path": name}
            table = with_column(table, how["camera"], pa.array(stored, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        pq.write_table(table, path)
    if "tasks" in freedoms:
        layout = LAYOUTS[int(random.integers(len(LAYOUTS)))]
        keys, texts = list(tasks), list(tasks.values())
        frame = {
            "index": pd.DataFrame({"task_index": keys}, index=pd.Index(texts, name="task")),
            "columns": pd.DataFrame({"task": texts[::-1], "task_index": keys[::-1], "note": 1.0}),
            "numbers as index": pd.DataFrame({"task": texts}, index=pd.Index(keys, name="task_index")),
            "unnamed index": pd.DataFrame({"task_index": keys}, index=texts),
        }[layout]
        frame.to_parquet(root / "meta/tasks.parquet")
        how["layout"] = layout
    if how["kind"] == "video" and "rate" in freedoms:
        rate = float(random.choice([0.7, 2, 3])) * fps
        for number in range(len(how["lengths"]) if how["files"] == "episode" else 1):
            lengths = how["lengths"][number : number + 1] if how["files"] == "episode" else how["lengths"]
            ends = np.cumsum(lengths) / fps
            times = np.arange(0, ends[-1] - 1e-6, 1 / rate)
            owner = np.searchsorted(ends, times + 1e-6, side="right")
            first = number if how["files"] == "episode" else 0
            begins = np.concatenate([[0], ends[:-1]])
            film = [shade(first + int(e), (time - begins[e]) * fps) for e, time in zip(owner, times, strict=True)]
            write_video(video_file(root, number, how["camera"]), film, rate, times.tolist())
    if "no ends" in freedoms and how["kind"] == "video" and how["files"] == "episode":
        change_table(episodes_file(root), lambda table: table.drop([f"videos/{how['camera']}/to_timestamp"]))
    if "hidden files" in freedoms:
        for visible in (path, episodes_file(root), root / "meta/info.json"):
            visible.with_name(f"._{visible.name}").write_bytes(b"\0\5\x16\7")
        (root / "data/.trash").mkdir()
        shutil.copy(path, root / "data/.trash/file-000.parquet")
    if "text as bytes" in freedoms:
        kind = (pa.binary(), pa.large_binary(), pa.string_view(), pa.large_string())[int(random.integers(4))]
        keys = pa.array(list(tasks))
        pq.write_table(pa.table({"task_index": keys, "task": pa.array(list(tasks.values()), kind)}), root / "meta/tasks.parquet")
    if "said size" in freedoms:
        said = [
            {"shape": [3, 32, 48], "names": ["channels", "height", "width"]},
            {"shape": [48, 32, 3], "names": ["width", "height", "channel"]},
            {"shape": [32, 48], "names": None},
            {"shape": None, "info": {"video.height": 32, "video.width": 48}},
        ][int(random.integers(4))]
        change_info(root, lambda info: info["features"][how["camera"]].update(said))
    if "odd feature" in freedoms:
        change_info(root, lambda info: info["features"].update(note={"dtype": "string", "shape": None}))


def slip(root: Path, how: dict, random: np.random.Generator) -> bool:
    """One fault, in a place that is drawn; whether it must be refused, since the slow reader would not see it."""
    kind, camera = how["slip"], how["camera"]
    episodes = pq.read_table(episodes_file(root))
    count = len(episodes)
    path = sorted(root.glob("data/*/*.parquet"))[-1]
    rows = pq.read_table(path)
    row, place = int(random.integers(len(rows))), int(random.integers(count))

    def bend(table_path: Path, name: str, change, kind_=None) -> None:
        table = pq.read_table(table_path)
        if name in table.column_names:
            values = table[name].to_pylist()
            change(values)
            pq.write_table(with_column(table, name, pa.array(values, kind_ or table[name].type)), table_path)

    def at(where: int, value):
        return lambda values: values.__setitem__(where, value(values[where]))

    def shifted(value):
        return [value[0] + 1] if isinstance(value, list) else value + 1

    lists = pa.list_(pa.float32())
    if kind in ("bounds", "length"):
        bend(
            episodes_file(root),
            {"bounds": "dataset_to_index", "length": "length"}[kind],
            at(place, lambda value: value + int(random.choice([-1, 1, 5]))),
        )
    elif kind == "swapped":
        for name in ("dataset_from_index", "dataset_to_index"):
            bend(episodes_file(root), name, lambda values: values.reverse())
    elif kind == "twice":
        episodes_file(root).with_name("file-001.parquet").write_bytes(episodes_file(root).read_bytes())
    elif kind == "task":
        bend(path, "task_index", at(row, lambda value: int(random.choice([-1, 4, 99]))))
    elif kind in ("null", "short", "nan"):
        new = {"null": lambda value: None, "short": lambda value: value[:2], "nan": lambda value: [*value[:2], float("nan")]}[kind]
        bend(path, how["names"][1], at(row, new), lists)
    elif kind == "span":
        bend(episodes_file(root), f"videos/{camera}/from_timestamp", at(place, lambda value: value + float(random.choice([-0.3, 0.3, 50]))))
    elif kind == "late" and how["kind"] == "video":
        frames = sum(how["lengths"])
        write_video(video_file(root, 0, camera), [shade(0, 0)] * frames, how["fps"], [0.3 + k / how["fps"] for k in range(frames)])
    elif kind == "time":
        bend(path, "timestamp", at(row, lambda value: float(random.choice([-1.0, 0.0, 30.0]))))
    elif kind == "picture" and how["kind"] == "image":
        bend(path, camera, at(row, lambda value: [None, {"bytes": b"x", "path": None}][int(random.integers(2))]))
    elif kind == "total":
        change_info(root, lambda info: info.update({str(random.choice(["total_frames", "total_episodes"])): 99}))
    elif kind == "index":
        bend(path, "index", at(row, shifted))
    elif kind == "cut":
        victim = [path, episodes_file(root), root / "meta/tasks.parquet"][int(random.integers(3))]
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    elif kind == "gone":
        path.unlink()
    elif kind == "shape":
        change_info(root, lambda info: info["features"][how["names"][0]].update(shape=[int(random.integers(1, 4))]))
    elif kind == "size":
        change_info(root, lambda info: info["features"][camera].update(shape=[33, 48, 3], names=None))
        return True
    elif kind == "kind of a number":
        name, value = str(random.choice(["total_frames", "total_episodes", "fps"])), random.choice(["half", "text", "list"])
        change_info(root, lambda info: info.update({name: {"half": -2.5, "text": str(info[name]), "list": [info[name]]}[str(value)]}))
        return True
    elif kind in ("episode's rate", "shifted"):
        episode = np.asarray([one(value) for value in rows["episode_index"].to_pylist()])
        own = episode == episode[row]
        factor, late = (float(random.choice([0.4, 2, 1000])), 0) if kind == "episode's rate" else (1, 0.7 / how["fps"])
        times = np.asarray(rows["timestamp"], np.float64)
        pq.write_table(with_column(rows, "timestamp", np.where(own, times * factor + late, times).astype(np.float32)), path)
        seen = how["episodes"] in (None, int(episode[row])) and times[own][-1] > 0
        return seen and (kind == "episode's rate" or (how["kind"] == "video" and "no ends" not in how["freedoms"]))
    elif kind == "swapped spans" and how["kind"] == "video" and count > 1:
        other = (place + 1) % count
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            bend(
                episodes_file(root),
                f"videos/{camera}/{name}",
                lambda values: values.__setitem__(slice(None), [values[{place: other, other: place}.get(k, k)] for k in range(count)]),
            )
        return how["episodes"] is None
    return False


def hold(how: dict) -> bool:
    """Whether the set was read; every row of it is then right."""
    folder = Path(tempfile.mkdtemp(prefix="pi0fm-any-set-"))
    try:
        root = written(folder / "set", how)
        config = DatasetConfig(root=root, cache_dir=folder / "cache", video_decoder="pyav")
        embodiment = Embodiment(state=how["names"][0], action=how["names"][1])
        selection = Selection() if how["episodes"] is None else Selection(episodes=(how["episodes"],))
        try:
            source = open_source(config, embodiment, selection)
            pictures = open_cache(source, config, SIZE).gather(np.arange(len(source.state)))[:, 0]
        except Pi0fmError as error:
            assert "\n" not in str(error) and ";" in str(error), str(error)
            return False
        assert not how["refused"], "what is said in two ways is believed"
        expected = read_slowly(root, how["camera"], how["names"], how["episodes"])
        assert len(expected) == len(source.state)
        for row, item in enumerate(expected):
            assert np.array_equal(source.state[row], item["state"]) and np.array_equal(source.action[row], item["action"])
            assert source.tasks[source.task[row]] == item["sentence"]
            assert (source.episode[row], source.end[row] - row) == (item["episode"], item["left"])
            assert np.array_equal(pictures[row], resize_with_padding(item["picture"][None], SIZE)[0]), f"another picture in row {row}"
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=30, derandomize=True, database=None, **QUIET)
@given(how=drawn_sets())
def test_a_sample_of_sets(how):
    read = hold(how)
    assert read or how["slip"] is not None, f"a healthy set is refused: {how}"


@pytest.mark.long
@pytest.mark.timeout(600)
@settings(max_examples=1500, database=None, **QUIET)
@given(how=drawn_sets())
def test_many_sets(how):
    read = hold(how)
    assert read or how["slip"] is not None, f"a healthy set is refused: {how}"
