"""Tests of an evaluation that is interrupted, or meets a full or read-only disk, and is started again by the same command."""

import json
from pathlib import Path

import pytest
from eval_fakes import PointEnvironment, PointPolicy

from pi0fm import files
from pi0fm.cli.main import main
from pi0fm.eval import evaluate as module
from pi0fm.eval.rollouts.episode import Episode, EpisodeResult
from pi0fm.eval.rollouts.journal import Journal
from pi0fm.sim import catalog
from pi0fm_client.errors import OutputError

EPISODES = [("drawer-open-v3", 1), ("drawer-open-v3", 2), ("drawer-open-v3", 3), ("reach-v3", 1), ("reach-v3", 2), ("reach-v3", 3)]


@pytest.fixture
def begun(monkeypatch):
    """The (task, seed) of every episode that began; fakes in place of bundle and simulator."""
    seen = []

    class Counted(PointEnvironment):
        def reset(self, seed):
            seen.append((self.task, seed))
            super().reset(seed)

    metadata = {**PointPolicy().metadata, "camera_sources": {"base": "corner2:8x8"}}
    monkeypatch.setattr(module, "read_metadata", lambda config: metadata)
    monkeypatch.setattr(module, "_open_policy", lambda config: PointPolicy())
    monkeypatch.setattr(catalog, "open_environment", lambda task, cameras, max_steps: Counted(task))
    return seen


def evaluate(folder, *more) -> int:
    words = ["--policy", "p", "--tasks", "drawer-open-v3,reach-v3", "--episodes", "3", "--num_workers", "0", "--output_dir", str(folder)]
    return main(["eval", *words, "--environments_per_worker", "1", *more])


def outcomes(folder: Path):
    rows = json.loads((folder / "episodes.json").read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def interrupted(folder, monkeypatch, *more):
    """Ctrl-C after three of six episodes; returns what was kept."""
    add = Journal.add

    def add_three(self, result):
        if len(self._rows) == 3:
            raise KeyboardInterrupt
        return add(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_three)
        assert evaluate(folder, *more) == 130
    return (folder / "episodes.jsonl").read_text().splitlines()


def test_the_same_command_goes_on_after_an_interruption(tmp_path, begun, monkeypatch, capsys):
    assert evaluate(tmp_path / "whole") == 0
    lines = interrupted(tmp_path / "out", monkeypatch)
    assert len(lines) == 4
    begun.clear()
    assert evaluate(tmp_path / "out") == 0
    assert begun == EPISODES[3:], "the first three are not run again"
    assert "holds 3 episodes of an interrupted evaluation" in capsys.readouterr().err
    assert outcomes(tmp_path / "out") == outcomes(tmp_path / "whole")
    figures = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "whole")]
    assert figures[0]["interval"] == figures[1]["interval"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "episodes.json",
        "episodes.parquet",
        "report.html",
        "summary.json",
        "videos",
    ]
    assert evaluate(tmp_path / "out") == 1, "an evaluation that ended is never overwritten"


def test_a_line_cut_by_a_kill_and_a_lost_video_are_run_again(tmp_path, begun, monkeypatch):
    interrupted(tmp_path, monkeypatch)
    rows = tmp_path / "episodes.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    (tmp_path / "videos/drawer-open-v3-seed-1.mp4").unlink()
    begun.clear()
    assert evaluate(tmp_path) == 0
    assert begun == [EPISODES[0], *EPISODES[2:]]
    assert [row["seed"] for row in outcomes(tmp_path)] == [1, 2, 3, 1, 2, 3]


def test_what_an_interrupted_evaluation_of_other_settings_left_is_put_aside(tmp_path, begun, monkeypatch, capsys):
    lines = interrupted(tmp_path, monkeypatch)
    begun.clear()
    assert evaluate(tmp_path, "--seed", "7", "--max_steps", "300") == 0
    assert begun == EPISODES
    assert (tmp_path / "unfinished-1/episodes.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "unfinished-1/videos/drawer-open-v3-seed-1.mp4").is_file()
    assert "had another max steps, noise seed: its rows and videos are in" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_keeps_the_rows_and_the_same_command_goes_on(tmp_path, begun, small_disk, capsys):
    folder = small_disk("512k") / "out"
    ballast = folder.parent / "ballast"
    ballast.write_bytes(bytes(496 * 1024))
    assert evaluate(folder, "--videos_per_task", "3") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pi0fm:")]
    assert "No space left on device" in line and str(folder) in line
    kept = [json.loads(row) for row in (folder / "episodes.jsonl").read_text().splitlines()[1:]]
    assert kept and all((folder / row["video_path"]).stat().st_size for row in kept)
    ballast.unlink()
    begun.clear()
    assert evaluate(folder, "--videos_per_task", "3") == 0
    assert begun == EPISODES[len(kept) :]


def test_a_full_disk_at_the_report_costs_no_episode(tmp_path, begun, small_disk, capsys):
    folder = small_disk("64k") / "out"
    assert evaluate(folder, "--videos", "none") == 0
    needed = sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.iterdir())
    disk = small_disk("256k")
    (disk / "ballast").write_bytes(bytes(256 * 1024 - needed + 4096))
    begun.clear()
    assert evaluate(disk / "out", "--videos", "none") == 1
    assert "No space left on device" in capsys.readouterr().err and begun == EPISODES
    (disk / "ballast").unlink()
    assert evaluate(disk / "out", "--videos", "none") == 0
    assert begun == EPISODES and not (disk / "out/episodes.jsonl").exists()


def test_a_place_that_cannot_be_written_is_one_line_before_anything_runs(unwritable, begun, capsys):
    assert evaluate(unwritable) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pi0fm: ")
    assert begun == []


def test_a_fault_before_the_first_episode_leaves_nothing(tmp_path, begun, monkeypatch):
    def broken(config):
        raise OutputError("no weights")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_open_policy", broken)
        assert evaluate(tmp_path / "new/out") == 1
    assert not (tmp_path / "new/out").exists()
    assert evaluate(tmp_path / "new/out") == 0


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "stopped before its first episode"])
def test_a_process_that_leaves_between_the_opening_and_the_lock_of_another(tmp_path, monkeypatch, ended):
    """It removes the file: rows in it would be lost, and its report is not to be overwritten."""
    try_lock, first = files.try_lock, Journal(tmp_path, {}).__enter__()

    def leaves(descriptor):
        monkeypatch.setattr(files, "try_lock", try_lock)
        if ended:
            first.add(EpisodeResult("a", 1, "success", 3, 0.1))
            (tmp_path / "report.html").write_text("done")
            first.remove()
        first.__exit__(None, None, None)
        return try_lock(descriptor)

    monkeypatch.setattr(files, "try_lock", leaves)
    if ended:
        with pytest.raises(OutputError, match="never overwritten"), Journal(tmp_path, {}):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        return
    with Journal(tmp_path, {}) as second:
        second.add(EpisodeResult("a", 1, "success", 3, 0.1))
        assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 2


def test_a_second_process_is_kept_out(tmp_path):
    with Journal(tmp_path, {}) as journal:
        journal.add(EpisodeResult("a", 1, "success", 3, 0.1, scores=({"log_prob": 1 / 3},)))
        with pytest.raises(OutputError, match="another process evaluates into"), Journal(tmp_path, {}):
            pass
    with Journal(tmp_path, {}) as journal:
        (row,) = journal.finished([Episode("a", 1), Episode("a", 2)]).values()
    assert row == EpisodeResult("a", 1, "success", 3, 0.1, scores=({"log_prob": 1 / 3},))
