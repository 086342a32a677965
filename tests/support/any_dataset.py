"""Small LeRobot data sets (v3.0) written without LeRobot, in every way that others write them, and a slow reader of them.

`write_set` writes a healthy one; `change_info`, `change_table` and `with_column` alter it. A picture tells the episode and the step that it
was taken at, so that a wrong one is seen. `read_slowly` follows the format's rules row by row, with pandas and one decoder per video.
"""

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CAMERA = "observation.images.base"
TASKS = {0: "pick up the cube", 1: "open the drawer"}


def shade(episode: int, step: float, height: int = 32, width: int = 48) -> np.ndarray:
    """Left half: the episode; right half: the step."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2] = min(255, 20 + 50 * episode)
    picture[:, width // 2 :] = min(255, int(10 + 12 * step))
    return picture


def seen(picture: np.ndarray) -> tuple[int, int]:
    """(episode, step) that a picture of `shade` tells, in a square with black bands or without."""
    middle, width = picture[picture.shape[0] // 2], picture.shape[1]
    left, right = float(middle[2 : width // 2 - 2].mean()), float(middle[width // 2 + 2 : width - 2].mean())
    return round((left - 20) / 50), round((right - 10) / 12)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def write_video(path: Path, pictures: list[np.ndarray], fps: float, times: list[float] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        stream.options = {"crf": "12", "g": "4", "bf": "0"}
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 90000)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 90000), Fraction(1, 90000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_set(
    root: Path,
    lengths: tuple[int, ...] = (8, 8),
    *,
    fps: float = 10,
    cameras: tuple[str, ...] = (CAMERA,),
    kind: str = "image",
    tasks: dict[int, str] = TASKS,
    task_of: Callable[[int, int], int] | None = None,
    names: tuple[str, str] = ("observation.state", "action"),
    files: str = "one",
    picture: Callable[[int, int], np.ndarray] = shade,
) -> Path:
    """A healthy data set. files: `one` of each kind, or one an `episode`; names: of state and action."""
    keys = list(tasks)
    random = np.random.default_rng(0)
    rows, described, films, first = [], [], {}, 0
    for episode, length in enumerate(lengths):
        number = episode if files == "episode" else 0
        for step in range(length):
            entry = {
                names[0]: random.normal(size=4).astype(np.float32).tolist(),
                names[1]: np.array([episode, step, random.normal()], np.float32).tolist(),
                "timestamp": np.float32(step / fps),
                "frame_index": step,
                "episode_index": episode,
                "index": first + step,
                "task_index": task_of(episode, step) if task_of else keys[episode % len(keys)],
                "file": number,
            }
            for camera in cameras:
                if kind == "image":
                    entry[camera] = {"bytes": png(picture(episode, step)), "path": None}
                else:
                    films.setdefault((camera, number), []).append(picture(episode, step))
            rows.append(entry)
        line = {"episode_index": episode, "tasks": [tasks[rows[-1]["task_index"]]], "length": length}
        line |= {"dataset_from_index": first, "dataset_to_index": first + length, "data/chunk_index": 0, "data/file_index": number}
        begin = 0 if files == "episode" else first / fps
        for camera in cameras if kind == "video" else ():
            place = f"videos/{camera}/"
            line |= {place + "chunk_index": 0, place + "file_index": number}
            line |= {place + "from_timestamp": begin, place + "to_timestamp": begin + length / fps}
        described.append(line)
        first += length
    schema = {names[0]: pa.list_(pa.float32()), names[1]: pa.list_(pa.float32()), "timestamp": pa.float32()}
    schema |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), pa.int64())
    if kind == "image":
        schema |= dict.fromkeys(cameras, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for number in sorted({entry["file"] for entry in rows}):
        part = [entry for entry in rows if entry["file"] == number]
        path = root / f"data/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({name: pa.array([entry[name] for entry in part], type_) for name, type_ in schema.items()}), path)
    for (camera, number), film in films.items():
        write_video(root / f"videos/{camera}/chunk-000/file-{number:03d}.mp4", film, fps)
    episodes_file(root).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(described), episodes_file(root))
    write_tasks(root, tasks)
    features = {name: {"dtype": "float32", "shape": [width], "names": None} for name, width in zip(names, (4, 3), strict=True)}
    features |= {
        name: {"dtype": str(kind_), "shape": [1], "names": None} for name, kind_ in schema.items() if not pa.types.is_nested(kind_)
    }
    height, width = picture(0, 0).shape[:2]
    features |= {name: {"dtype": kind, "shape": [height, width, 3], "names": ["height", "width", "channels"]} for name in cameras}
    info = {
        "codebase_version": "v3.0", "robot_type": "toy", "total_episodes": len(lengths), "total_frames": first, "total_tasks": len(tasks),
        "chunks_size": 1000, "fps": fps, "splits": {"train": f"0:{len(lengths)}"}, "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def write_tasks(root: Path, tasks: dict[int, str | None]) -> None:
    """As LeRobot does: the sentences are pandas' index."""
    frame = pd.DataFrame({"task_index": list(tasks)}, index=pd.Index(list(tasks.values()), name="task"))
    frame.to_parquet(root / "meta/tasks.parquet")


def change_info(root: Path, change: Callable[[dict], object]) -> None:
    path = root / "meta/info.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def change_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def with_column(table: pa.Table, name: str, values: object) -> pa.Table:
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    if name not in table.column_names:
        return table.append_column(name, array)
    return table.set_column(table.column_names.index(name), name, array)


def set_column(path: Path, name: str, values: object) -> None:
    change_table(path, lambda table: with_column(table, name, values))


def data_file(root: Path, number: int = 0) -> Path:
    return root / f"data/chunk-000/file-{number:03d}.parquet"


def episodes_file(root: Path) -> Path:
    return root / "meta/episodes/chunk-000/file-000.parquet"


def video_file(root: Path, number: int = 0, camera: str = CAMERA) -> Path:
    return root / f"videos/{camera}/chunk-000/file-{number:03d}.mp4"


def take_out(root: Path, gone: set[tuple[int, int]]) -> None:
    """Take rows (episode, step) out of a data set of one file, as an editor does that leaves the videos as they were."""
    table = pq.read_table(data_file(root))
    rows = [row for row in table.to_pylist() if (row["episode_index"], row["frame_index"]) not in gone]
    kept = pa.Table.from_pylist(rows, table.schema)
    pq.write_table(with_column(kept, "index", np.arange(len(rows))), data_file(root))
    count = pq.read_table(episodes_file(root)).num_rows
    lengths = [sum(row["episode_index"] == episode for row in rows) for episode in range(count)]
    stops = np.cumsum(lengths)
    for name, values in {"length": lengths, "dataset_from_index": stops - lengths, "dataset_to_index": stops}.items():
        set_column(episodes_file(root), name, pa.array(np.asarray(values, dtype=np.int64)))
    change_info(root, lambda info: info.update(total_frames=len(rows)))


def read_slowly(
    root: Path, camera: str = CAMERA, names: tuple[str, str] = ("observation.state", "action"), only: int | None = None
) -> list[dict]:
    """Every row in order: state, action, sentence, episode, steps left in it, and the picture [h, w, 3] nearest in time in its span."""
    info = json.loads((root / "meta/info.json").read_text())
    episodes = pd.concat([pd.read_parquet(path) for path in sorted(root.glob("meta/episodes/*/[!.]*.parquet"))])
    wanted = [row for row in episodes.to_dict("records") if only in (None, row["episode_index"])]
    numbers = sorted({int(row["data/file_index"]) for row in wanted})
    frames = pd.concat([pq.read_table(data_file(root, number)).to_pandas() for number in numbers])
    frames = frames[frames["episode_index"].map(one).isin([row["episode_index"] for row in wanted])]
    frames = frames.sort_values("index", key=lambda column: column.map(one)).reset_index(drop=True)
    tasks = pd.read_parquet(root / "meta/tasks.parquet").reset_index()
    sentence = {int(one(row["task_index"])): row.get("task", row.get("index")) for row in tasks.to_dict("records")}
    sentence = {key: text.decode() if isinstance(text, bytes) else text for key, text in sentence.items()}
    spans = {int(row["episode_index"]): row for row in episodes.to_dict("records")}
    films: dict[Path, list[tuple[float, np.ndarray]]] = {}
    found = []
    for row in frames.to_dict("records"):
        episode = int(one(row["episode_index"]))
        item = {
            "state": np.asarray(row[names[0]], np.float32).reshape(-1),
            "action": np.asarray(row[names[1]], np.float32).reshape(-1),
            "sentence": sentence[int(one(row["task_index"]))],
            "episode": episode,
        }
        if info["features"][camera]["dtype"] == "image":
            stored = row[camera]
            content = stored if isinstance(stored, bytes) else None
            if isinstance(stored, dict):
                content = stored["bytes"] if stored["bytes"] is not None else (root / stored["path"]).read_bytes()
            elif isinstance(stored, str):
                content = (root / stored).read_bytes()
            item["picture"] = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        else:
            span = spans[episode]
            place = {"video_key": camera, **{name: int(span[f"videos/{camera}/{name}"]) for name in ("chunk_index", "file_index")}}
            path = root / info["video_path"].format(**place)
            if path not in films:
                with av.open(str(path)) as container:
                    films[path] = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
            begin, end = span[f"videos/{camera}/from_timestamp"], span.get(f"videos/{camera}/to_timestamp", np.inf)
            shown = [each for each in films[path] if begin - 1e-3 <= each[0] < end - 1e-3]
            wanted = begin + float(one(row["timestamp"]))
            item["picture"] = min(shown, key=lambda each: (round(abs(each[0] - wanted), 4), each[0]))[1]
        found.append(item)
    for place, item in enumerate(found):
        item["left"] = sum(other["episode"] == item["episode"] for other in found[place:])
    return found


def one(value: object) -> float:
    """A number that may be stored as a list of one."""
    return float(np.asarray(value).reshape(-1)[0])
