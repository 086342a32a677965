"""Tests of `pi0fm doctor`: every fault of a data set at once, what to type, the exit code; and a run that skips the named episodes."""

import json
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_dataset
import yaml
from any_dataset import CAMERA, change_info, data_file, episodes_file, set_column, shade, video_file, write_set, write_video
from PIL import Image

from pi0fm.cli.main import main
from pi0fm.data.columns import lerobot_source
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import DatasetConfig
from pi0fm.doctor.data import find_faults
from pi0fm_client.errors import DatasetError

NETWORK = {
    "precision": "float32",  # all runs of a process share it
    "model": tiny_dataset.NETWORK | {"max_prompt_tokens": 24},
    "steps": 2,
    "num_workers": 0,
    "threads": 1,
    "global_batch_size": 4,
    "execution_horizon": 4,
}


def doctor(capsys, *words) -> tuple[int, dict, str]:
    """(exit code, the last line of standard output, standard error)."""
    code = main(["doctor", *map(str, words)])
    said = capsys.readouterr()
    assert said.out, said.err
    return code, json.loads(said.out.splitlines()[-1]), said.err


def training(network, root, tmp_path) -> list[str]:
    """Options of a run on the data set at `root`, with a separate cache."""
    places = {"root": root, "cache_dir": tmp_path / "cache"}
    return [
        "train",
        str(network),
        *(word for name, place in places.items() for word in (f"--dataset.{name}", str(place))),
        "--output_dir",
        str(tmp_path / "run"),
    ]


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "network.yaml"
    path.write_text(yaml.safe_dump(NETWORK))
    return path


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "mistyped")]) == 2
    assert str(tmp_path / "mistyped") in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_healthy_set(tmp_path, capsys, network, kind):
    root = write_set(tmp_path / "set", (5, 4), kind=kind, files="episode")
    for words in ((network,), ("--pictures", "none"), ("--pictures", "all")):
        code, found, said = doctor(capsys, root, *words)
        assert code == 0 and found["faults"] == 0 and (found["episodes"], found["rows"]) == (2, 9)
        assert "no fault" in said


def test_all_faults_of_a_set_by_kind_with_the_line_to_type(tmp_path, capsys, network):
    root = write_set(
        tmp_path / "set", (5,) * 8, kind="video", files="episode", tasks={0: "press it", 1: "", 2: "put " * 20}, task_of=lambda e, s: 0
    )
    set_column(data_file(root, 1), "action", pa.array([[0.0, 1.0, float("nan")]] * 5, pa.list_(pa.float32())))
    set_column(data_file(root, 2), "task_index", [0, 0, 9, 9, 9])
    set_column(data_file(root, 3), "task_index", [0, 0, 0, 0, 1])
    set_column(data_file(root, 4), "task_index", [0, 2, 0, 0, 0])
    video_file(root, 5).write_bytes(video_file(root, 5).read_bytes()[:300])
    data_file(root, 6).write_bytes(b"PAR1")
    code, found, said = doctor(capsys, root, network)
    assert code == 1
    assert found["kinds"] == {"file": 1, "not finite": 1, "task": 1, "prompt": 2, "video": 1}
    assert found["bad_episodes"] == [1, 2, 3, 4, 5, 6]
    assert "row 12 of episode 2 in" in said and "has task_index 9" in said
    assert "row 19 of episode 3" in said and "the prompt must say something" in said
    assert "row 21 of episode 4" in said and "24 tokens" in said and "found 8" in said
    assert "type --dataset.skip_bad true to train on the other 2 episodes" in said.splitlines()[-1]
    code, found, _ = doctor(capsys, root)  # without a network there is no longest prompt
    assert code == 1 and found["kinds"]["prompt"] == 1


def test_what_spoils_the_whole_set(tmp_path, capsys):
    root = write_set(tmp_path / "set", (5, 4))
    change_info(root, lambda info: info.update(fps=None))
    code, found, said = doctor(capsys, root)
    assert code == 1 and found["kinds"] == {"data set": 1} and "lacks fps" in said


def test_a_wrong_option_has_its_own_exit_code(tmp_path, capsys):
    root = write_set(tmp_path / "set", (3, 3), names=("state", "actions"))
    assert main(["doctor", str(root)]) == 2
    assert "type --embodiment.state state" in capsys.readouterr().err
    assert main(["doctor", str(root), "--embodiment.state", "state", "--embodiment.action", "actions"]) == 0


def test_a_fault_in_the_middle_of_a_video_needs_a_look_at_all(tmp_path, capsys):
    root = write_set(tmp_path / "set", (8, 8), kind="video", files="episode")
    write_video(video_file(root, 1), [shade(1, 0), shade(1, 6), shade(1, 7)], 10, [0, 0.6, 0.7])
    assert doctor(capsys, root)[0] == 0 or doctor(capsys, root, "--dataset.tolerance_s", "0.01")[0] == 0
    code, found, said = doctor(capsys, root, "--pictures", "all", "--dataset.tolerance_s", "0.01")
    assert code == 1 and found["bad_episodes"] == [1] and "row 9 of episode 1" in said
    assert "type --dataset.skip_bad all to train on the other 1 episode" in found["advice"]
    typed = "--dataset.skip_bad", "all"
    assert (
        "a run with this --dataset.skip_bad trains on"
        in doctor(capsys, root, "--pictures", "all", "--dataset.tolerance_s", "0.01", *typed)[1]["advice"]
    )


def test_the_tolerance_that_is_told_is_enough_for_all_rows(tmp_path, capsys, network):
    """Row 9 is 0.1 s from its picture, row 11 is 0.3 s from its own; a run with the told tolerance ends."""
    root = write_set(tmp_path / "set", (8, 8), kind="video", files="episode")
    times = [0, 0.2, 0.6, 0.65, 0.7]
    write_video(video_file(root, 1), [shade(1, 10 * time) for time in times], 10, times)
    words = training(network, root, tmp_path)
    assert main([*words, "--dataset.tolerance_s", "0.05"]) == 1
    said = capsys.readouterr().err
    assert "row 9 of episode 1" in said and "type --dataset.tolerance_s 0.201" in said
    told = doctor(capsys, root, "--pictures", "all", "--dataset.tolerance_s", "0.05")[1]["advice"]
    assert told.endswith("type --dataset.tolerance_s 0.201")
    assert main([*words, "--dataset.tolerance_s", "0.201"]) == 0


def test_a_run_that_looks_at_all_pictures_leaves_out_what_is_bad_in_the_middle(tmp_path, capsys, network):
    root = write_set(tmp_path / "set", (8, 8, 8), kind="video", files="episode")
    write_video(video_file(root, 1), [shade(1, 0), shade(1, 6), shade(1, 7)], 10, [0, 0.6, 0.7])
    words = [*training(network, root, tmp_path), "--dataset.tolerance_s", "0.01"]
    assert main([*words, "--dataset.skip_bad", "true"]) == 1
    assert "or type --dataset.skip_bad all to leave out every such episode" in capsys.readouterr().err
    assert main([*words, "--dataset.skip_bad", "all"]) == 0
    assert len(json.loads((tmp_path / "run/left_out.json").read_text())[""]) == 1


def test_an_empty_picture_is_known_from_its_column(tmp_path, capsys):
    root = write_set(tmp_path / "set", (8, 8, 8))
    stored = pq.read_table(data_file(root))[CAMERA].to_pylist()
    stored[11] = None
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    set_column(data_file(root), CAMERA, pa.array(stored, picture))
    code, found, said = doctor(capsys, root)
    assert code == 1 and found["bad_episodes"] == [1] and "row 11 of episode 1" in said and "found null" in said


def with_means(root, means):
    set_column(episodes_file(root), f"stats/{CAMERA}/mean", pa.array([[[[each]] for each in mean] for mean in means]))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_another_episodes_pictures_have_another_mean_than_is_noted(tmp_path, capsys, kind):
    root = write_set(tmp_path / "set", (8,) * 5, kind=kind, files="episode")
    means = [np.mean([shade(episode, step) for step in range(8)], axis=(0, 1, 2)) / 255 for episode in range(5)]
    for shift in (0, 0.03):  # a codec may shift all alike
        with_means(root, [mean + shift for mean in means])
        assert doctor(capsys, root, "--pictures", "all")[0] == 0
    with_means(root, [means[0], means[3], *means[2:]])
    assert doctor(capsys, root)[0] == 0
    code, found, said = doctor(capsys, root, "--pictures", "all")
    assert code == 1 and found["bad_episodes"] == [1] and "has a mean colour of 0.24 0.24 0.24, but meta/episodes says 0.44" in said
    with_means(root, [means[0]] * 5)  # one for all says nothing of any
    assert doctor(capsys, root, "--pictures", "all")[0] == 0


def test_every_entry_of_a_mixture(tmp_path, capsys):
    good, bad = (write_set(tmp_path / name, (5, 4)) for name in ("good", "bad"))
    set_column(data_file(bad), "task_index", [0] * 8 + [9])
    recipe = tmp_path / "both.yaml"
    entries = {"a": {"dataset": {"root": str(good)}}, "b": {"dataset": {"root": str(bad)}, "exclude_episodes": []}}
    recipe.write_text(yaml.safe_dump(NETWORK | {"mixture": entries}))
    code, found, said = doctor(capsys, recipe)
    assert code == 1 and [each["entry"] for each in found["entries"]] == ["a", "b"] and found["faults"] == 1
    assert "mixture.b: " in said and "type --mixture.b.dataset.skip_bad true to train on the other 1 episode" in said.splitlines()[-1]
    assert doctor(capsys, recipe, "--mixture.b.exclude_episodes", "1")[0] == 0
    assert main(["doctor", str(good), str(recipe)]) == 2
    assert f"leave {good} out" in capsys.readouterr().err


def test_a_file_of_several_episodes_is_judged_one_by_one(tmp_path, capsys):
    root = write_set(tmp_path / "set", (8, 8, 8), kind="video")
    film = [shade(number // 8, number % 8) for number in range(16)]
    write_video(video_file(root), film, 10)
    code, found, said = doctor(capsys, root)
    assert code == 1 and found["bad_episodes"] == [2] and "no picture in its span 1.6..2.4 s" in said


def test_a_run_leaves_out_what_is_named_and_keeps_the_list(tmp_path, capsys, network):
    root = write_set(
        tmp_path / "set", (6,) * 6, kind="video", files="episode", tasks={0: "press it", 1: ""}, task_of=lambda e, s: int(e == 3)
    )
    set_column(data_file(root, 1), "action", pa.array([[0.0, 1.0, float("nan")]] * 6, pa.list_(pa.float32())))
    video_file(root, 4).write_bytes(b"no video")
    words = training(network, root, tmp_path)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "must have finite numbers in 'action'" in said and "--dataset.skip_bad true" in said
    assert main([*words, "--dataset.skip_bad", "true"]) == 0
    noted = json.loads((tmp_path / "run/left_out.json").read_text())[""]
    assert len(noted) == 3
    bundle = json.loads((tmp_path / "run/bundle/config.json").read_text())
    assert bundle["policy"]["training"]["left_out_episodes"] == "1 (not finite), 3 (prompt), 4 (video)"


def test_prompts_are_judged_before_the_first_step(tmp_path, capsys, network):
    for case, sentence in {"empty": "", "long": "put " * 20}.items():
        root = write_set(tmp_path / case, (8,) * 3, tasks={0: "press it", 1: sentence}, task_of=lambda e, s: int((e, s) == (2, 7)))
        out = tmp_path / f"run-{case}"
        assert (
            main(
                [
                    "train",
                    str(network),
                    "--dataset.root",
                    str(root),
                    "--dataset.cache_dir",
                    str(tmp_path / "cache"),
                    "--output_dir",
                    str(out),
                ]
            )
            == 1
        )
        said = capsys.readouterr().err
        assert "row 23 of episode 2" in said and not (out / "metrics.jsonl").exists()
        assert ("--model.max_prompt_tokens" in said) == (case == "long")


def test_a_stream_is_looked_into_before_the_first_step(tmp_path, capsys, network):
    root = write_set(tmp_path / "set", (8, 8), kind="video", files="episode")
    video_file(root, 1).write_bytes(b"no video")
    out = tmp_path / "run"
    words = ["--dataset.cache_limit_gib", "1e-6", "--dataset.stream_buffer_gib", "0.01", "--output_dir", str(out)]
    assert main(["train", str(network), "--dataset.root", str(root), *words]) == 1
    assert f"video {video_file(root, 1)} cannot be decoded" in capsys.readouterr().err and not (out / "metrics.jsonl").exists()


def test_the_longest_state_of_a_prompt_is_the_one_that_is_judged(tmp_path, capsys):
    network = tmp_path / "network.yaml"
    model = {"preset": "pi05"} | {name: value for name, value in tiny_dataset.NETWORK.items() if name != "preset"}
    text = "Task: press it, State: 255 255 255 255;\nAction: "
    root = write_set(tmp_path / "set", (8, 8), tasks={0: "press it"})
    state = np.zeros((16, 4), np.float32)
    state[11] = 9
    set_column(data_file(root), "observation.state", pa.array(state.tolist(), pa.list_(pa.float32())))
    for tokens, code in ((len(text), 0), (len(text) - 1, 1)):
        network.write_text(
            yaml.safe_dump(NETWORK | {"model": model | {"max_prompt_tokens": tokens, "vocab_size": 384}, "normalization": "quantile"})
        )
        assert main(["doctor", str(root), str(network)]) == code
    assert "row 0 of episode 0" in capsys.readouterr().err


@pytest.mark.long
def test_a_million_rows_in_twenty_seconds(tmp_path):
    """Columns only, on this machine; 1000 episodes of 1000 rows."""
    rows, episodes = 1_000_000, 1000
    root = write_set(tmp_path / "set", (2,), tasks={0: "press it"})
    step = np.tile(np.arange(1000), episodes)
    random = np.random.default_rng(0)
    columns = {
        name: pa.FixedSizeListArray.from_arrays(random.normal(size=rows * width).astype(np.float32), width)
        for name, width in (("observation.state", 4), ("action", 3))
    }
    columns |= {"timestamp": (step / 10).astype(np.float32), "frame_index": step, "episode_index": np.repeat(np.arange(episodes), 1000)}
    pq.write_table(pa.table(columns | {"index": np.arange(rows), "task_index": np.zeros(rows, np.int64)}), data_file(root))
    first = np.arange(episodes) * 1000
    table = {"episode_index": np.arange(episodes), "length": 1000, "dataset_from_index": first, "dataset_to_index": first + 1000}
    pd.DataFrame(table | {"data/chunk_index": 0, "data/file_index": 0}).to_parquet(root / "meta/episodes/chunk-000/file-000.parquet")
    change_info(root, lambda info: info.update(total_frames=rows, total_episodes=episodes))
    began = time.perf_counter()
    found = find_faults(DatasetConfig(root=root), Embodiment(cameras={"base": CAMERA}), extent="none")
    assert found.rows == rows and not found.faults
    assert time.perf_counter() - began < 20


def test_an_episode_is_short_beside_those_of_its_task(tmp_path, capsys):
    root = write_set(tmp_path / "set", (8, 8, 8, 2, 2), tasks={0: "open it", 1: "tap it"}, task_of=lambda episode, step: int(episode > 2))
    assert doctor(capsys, root)[1]["contents"]["short"] == []


def test_what_a_set_holds_is_said_and_shown(tmp_path, capsys):
    root = write_set(tmp_path / "set", (8, 8, 2), tasks={0: "press it", 1: "open it"}, task_of=lambda episode, step: int(episode == 1))
    code, found, said = doctor(capsys, root, "--output_dir", tmp_path / "out")
    held = found["contents"]
    assert code == 0 and (held["fps"], held["lengths"], held["short"]) == (10.0, [2, 8, 8], [2])
    assert held["tasks"] == {"press it": 2, "open it": 1} and next(iter(held["cameras"].values())).startswith(CAMERA)
    action = {each["name"]: each for each in held["dimensions"] if each["column"] == "action"}
    assert next(iter(action.values()))["kind"] == "switch" and len(action) == 3, "the number of the episode, 0, 1 or 2"
    assert "'press it' (2)" in said and "short episodes: 2" in said
    with Image.open(tmp_path / "out/contact.png") as sheet:
        assert sheet.size == (1002, 3 * 182 + 6) and len(sheet.convert("L").getcolors()) > 20
    root = write_set(tmp_path / "longer", (45, 45))
    set_column(data_file(root), "action", pa.array([[0.5, float(row), min(row, 60.0)] for row in range(90)], pa.list_(pa.float32())))
    _, found, said = doctor(capsys, root, "--output_dir", tmp_path / "again", "--pictures", "none")
    assert [each["kind"] for each in found["contents"]["dimensions"] if each["column"] == "action"] == ["constant", "", "saturated"]
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("http://robot:8000", "or a server's ws:// address, found 'http://robot:8000'; type ws://robot:8000 for a policy server"),
        ("ws//robot:8000", "type ws://robot:8000 for a policy server"),
        ("quikstart", "found 'quikstart': did you mean 'quickstart'?"),
        ("arm-dat", "found 'arm-dat': did you mean 'arm-data'?"),
    ],
)
def test_a_word_that_names_nothing_is_one_line_with_what_was_expected(tmp_path, capsys, monkeypatch, word, said):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "arm-data", (3, 3))
    assert main(["doctor", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_name_of_the_hub_without_a_network_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))

    def offline(repo_id):
        raise DatasetError(f"data set {repo_id!r} is not on this disk, and cannot be downloaded (no network); give --dataset.root")

    monkeypatch.setattr(lerobot_source, "_download", offline)
    assert main(["doctor", "lerobot/pusht"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "pi0fm: data set 'lerobot/pusht' is not on this disk, and cannot be downloaded (no network); give --dataset.root"
    )
