"""Tests of `pi0fm compare`: pairs, statements, the page, and folders that are not evaluations."""

import json
from pathlib import Path

import pytest

from pi0fm import files
from pi0fm.cli.main import main
from pi0fm.eval.report import page as report
from pi0fm.eval.report.page import ReportContext
from pi0fm.eval.rollouts.episode import EpisodeResult
from pi0fm.eval.statistics import log_evidence, mcnemar, wilson
from pi0fm.eval.summary import summarize

OUTCOMES = {"s": "success", "f": "failure", "c": "crash"}


def evaluated(folder: Path, settings: dict[str, str] | None = None, policy: dict[str, str] | None = None, **letters: str) -> str:
    """The folder of an evaluation; letters: the outcomes of the seeds of each task, from 1 on; policy: what its bundle says."""
    results = [EpisodeResult(task, seed, OUTCOMES[letter], 9, 0.1) for task, word in letters.items() for seed, letter in enumerate(word, 1)]
    rows = [result.row() for result in results]
    facts = {"settings": settings or {"max steps": "400"}, "policy": policy or {}}
    report.write(folder, summarize(results, tuple(letters)), rows, ReportContext("p", facts=facts))
    return str(folder)


def compared(capsys, *words: str) -> dict:
    assert main(["compare", *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_pairs_are_counted_without_crashes(tmp_path, capsys):
    old, new = evaluated(tmp_path / "old", push="ssffc", pull="sf"), evaluated(tmp_path / "new", push="sfssc", pull="cs")
    found = compared(capsys, old, new)
    (paired,) = found["paired"]
    counts = ("pairs", "both", "only_this", "only_baseline", "neither")
    assert [paired[name] for name in counts] == [5, 1, 3, 1, 0]
    assert paired["difference"]["rate"] == pytest.approx(2 / 5)
    assert paired["p"] == paired["p_holm"] == mcnemar(3, 1)
    assert found["evaluations"]["old"]["success"]["push"]["high"] == pytest.approx(wilson(2, 4).high, abs=1e-6)
    assert found["warnings"] == ["old and new: 2 episodes crashed in one, or are missing there, and have no pair"]
    assert json.loads(Path("outputs/compare/compare.json").read_text())["paired"] == found["paired"]


def test_a_settled_difference_is_said_and_shown(tmp_path, capsys):
    folders = [evaluated(tmp_path / name, push=word) for name, word in (("old", "f" * 20), ("new", "s" * 20), ("same", "f" * 20))]
    found = compared(capsys, *folders)
    better, same = found["paired"]
    settled = next(n for n in range(20) if log_evidence(n, 0) >= 2.9957)
    assert better["statement"] == f"new is better: settled after {settled} of 20 pairs, whenever one looks"
    assert same["statement"] == "same: no difference to settle, 0 against 0 pairs that disagree"
    assert better["p_holm"] == 2 * better["p"] and same["p"] == 1
    page = Path(found["report"]).read_text()
    assert better["statement"] in page and page.count("data:image/png") == 1 and "<script" not in page and "http" not in page


def test_a_difference_that_is_not_settled_says_what_is_missing(tmp_path, capsys):
    found = compared(capsys, evaluated(tmp_path / "old", push="sffff"), evaluated(tmp_path / "new", push="fssff"))
    (paired,) = found["paired"]
    assert paired["settled_after"] is None and paired["p_any_time"] > 0.05
    assert paired["statement"] == f"new looks better, not settled: about {paired['more_pairs']} more pairs, if the shares stay as they are"


def test_other_settings_are_said_and_those_of_the_policy_are_not(tmp_path, capsys):
    old = evaluated(tmp_path / "old", {"max steps": "400", "solver": "euler"}, push="sf")
    new = evaluated(tmp_path / "new", {"max steps": "200", "solver": "heun"}, push="sf")
    assert compared(capsys, old, new)["warnings"] == ["old and new differ in max steps: 400 and 200"]


def test_steps_make_a_curve_and_training_seeds_an_interval(tmp_path, capsys):
    """Seeds of 50, 75 and 100 %: mean 75, deviation 25, Student's t at two degrees of freedom 4.303."""
    words = {("100", "0"): "ffsf", ("200", "0"): "ssff", ("200", "1"): "sssf", ("200", "2"): "ssss"}
    folders = [
        evaluated(
            tmp_path / f"at-{steps}-{seed}", policy={"dataset": "d", "steps": steps, "seed": seed, "identity": steps + seed}, push=word
        )
        for (steps, seed), word in words.items()
    ]
    other = evaluated(tmp_path / "other", policy={"dataset": "e", "steps": "200", "seed": "0"}, push="ssff")
    found = compared(capsys, *folders, other)
    (points,) = found["recipes"].values()
    assert [point["steps"] for point in points] == [100, 200]
    assert points[0]["interval"] == [pytest.approx(end, abs=1e-6) for end in (wilson(1, 4).low, wilson(1, 4).high)]
    assert points[1]["rates"] == [0.5, 0.75, 1.0] and points[1]["mean"] == 0.75
    assert points[1]["interval"][0] == pytest.approx(0.75 - 4.303 * 0.25 / 3**0.5, abs=1e-5) and points[1]["interval"][1] == 1
    page = Path(found["report"]).read_text()
    assert page.count("data:image/png") == 2 and "Over steps and training seeds" in page


def test_training_seeds_at_one_step_are_a_table_without_a_curve(tmp_path, capsys):
    seeds = [
        evaluated(tmp_path / seed, policy={"dataset": "d", "steps": "200", "seed": seed, "identity": seed}, push="sf") for seed in "01"
    ]
    page = Path(compared(capsys, *seeds)["report"]).read_text()
    assert page.count("data:image/png") == 1 and "Over steps and training seeds" in page


def test_videos_of_one_episode_stand_side_by_side(tmp_path, capsys):
    folders = [Path(evaluated(tmp_path / name, push=word)) for name, word in (("old", "ssf"), ("new", "sff"))]
    for folder in folders:
        rows = json.loads((folder / "episodes.json").read_text())
        for row in rows[:2]:
            row["video"] = f"videos/push-seed-{row['seed']}.mp4"
            files.write_bytes(folder / row["video"], folder.name.encode())
        rows[2]["video"] = "../outside.mp4"
        files.write_json(folder / "episodes.json", rows)
    files.write_bytes(tmp_path / "outside.mp4", b"secret")
    page = Path(compared(capsys, *map(str, folders))["report"]).read_text()
    assert page.count("<video") == 4 and page.index("push, seed 2") < page.index("push, seed 1")  # those that differ first
    assert "seed 3" not in page


def test_folders_of_one_name_keep_their_paths(tmp_path, capsys):
    found = compared(capsys, evaluated(tmp_path / "a/eval", push="sf"), evaluated(tmp_path / "b/eval", push="sf"))
    assert list(found["evaluations"]) == [str(tmp_path / "a/eval"), str(tmp_path / "b/eval")]


def refused(capsys, *words: str) -> str:
    assert main(["compare", *words]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_folders_that_cannot_be_compared(tmp_path, capsys):
    old = evaluated(tmp_path / "old", push="sf")
    assert "needs two evaluations or more" in refused(capsys, old)
    assert f"found {old} twice" in refused(capsys, old, old)
    assert "nowhere does not exist" in refused(capsys, old, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "name the --output_dir of pi0fm eval" in refused(capsys, old, str(tmp_path / "empty"))
    files.write_text(tmp_path / "begun/episodes.jsonl", "{}")
    assert "it has not ended: type its command again" in refused(capsys, old, str(tmp_path / "begun"))
    files.write_text(tmp_path / "recorded/summary.json", "{}")
    assert "an evaluation on recorded episodes or in real time" in refused(capsys, old, str(tmp_path / "recorded"))
    assert "share none that did not crash; evaluate both with the same --tasks" in refused(
        capsys, old, evaluated(tmp_path / "c", pull="cc")
    )
    for content in ("[", "{}", "3", "[3]", '[{"episode": 1}]'):
        files.write_text(tmp_path / "odd/episodes.json", content)
        assert "must hold an evaluation in simulation" in refused(capsys, old, str(tmp_path / "odd"))
    row = {"task": "push", "seed": 7, "outcome": "success"}
    for rows in ([row | {"outcome": "banana"}], [row, row | {"outcome": "failure"}]):
        files.write_json(tmp_path / "odd/episodes.json", rows)
        assert "push, seed 7" in refused(capsys, old, str(tmp_path / "odd"))


def test_only_a_comparison_is_replaced(tmp_path, capsys):
    folders = [evaluated(tmp_path / name, push="sf") for name in ("old", "new")]
    compared(capsys, *folders)
    compared(capsys, *folders)
    Path("outputs/compare/thesis.txt").write_text("mine")
    assert "holds thesis.txt; type --output_dir ANOTHER" in refused(capsys, *folders)
    assert "is a file" in refused(capsys, *folders, "--output_dir", str(tmp_path / "old/report.html/below"))
