"""Who runs what: the ledger, the calling process, the whole command with fakes in place of bundle and simulator."""

import json
from dataclasses import replace

import pytest
from eval_fakes import PointEnvironment, PointPolicy, point_setup

from pi0fm import options
from pi0fm.cli import eval as command
from pi0fm.cluster import evaluation
from pi0fm.cluster.evaluation import run, settings_for, stream
from pi0fm.cluster.ledger import Ledger
from pi0fm.eval.config import EvalConfig
from pi0fm.eval.episode import Episode, EpisodeResult
from pi0fm.sim import catalog
from pi0fm.sim.environment import parse_cameras
from pi0fm_client.errors import ConfigError, OutputError

EPISODES = [Episode(task, seed, record=seed == 1) for task in ("a", "b") for seed in range(1, 7)]


def success(episode):
    return EpisodeResult(episode.task, episode.seed, "success", 1, 0.0)


def test_the_ledger_hands_out_each_episode_once_and_fills_slots():
    ledger = Ledger(EPISODES)
    first, second = ledger.take(0, 5), ledger.take(1, 5)
    assert first + second == EPISODES[:10]
    assert ledger.take(0, 5) == []
    ledger.ended(0, [success(first[0])])
    assert ledger.take(0, 5) == [EPISODES[10]]
    assert (ledger.holds(0), ledger.holds(1), ledger.holds(2)) == (5, 5, 0)


def test_a_dead_workers_episodes_are_tried_once_more_alone_then_crash():
    ledger = Ledger(EPISODES[:4])
    ledger.take(0, 2)
    ledger.take(1, 1)
    assert ledger.lost(0, "gone") == []
    # The fresh one first; then one second try at a time, for a worker that holds nothing.
    assert ledger.take(0, 2) == [EPISODES[3]]
    assert ledger.take(1, 1) == []
    ledger.ended(0, [success(EPISODES[3])])
    assert ledger.take(0, 2) == [EPISODES[0]]
    assert ledger.take(0, 2) == []
    (crash,) = ledger.lost(0, "gone again")
    assert (crash.task, crash.seed, crash.outcome, crash.error) == ("a", 1, "crash", "its worker died twice: gone again")
    assert ledger.take(0, 2) == [EPISODES[1]]
    ledger.ended(0, [success(EPISODES[1])])
    assert ledger.take(0, 2) == []
    assert ledger.holds(0) == 0


def test_rows_keep_the_order_of_the_episodes_and_videos_go_to_disk(tmp_path, capsys):
    rows, summary = run(EPISODES, ("a", "b"), point_setup(), 0, tmp_path)
    assert [(row["task"], row["seed"]) for row in rows] == [(episode.task, episode.seed) for episode in EPISODES]
    assert [row["video"] for row in rows if row["video"]] == ["videos/a-seed-1.mp4", "videos/b-seed-1.mp4"]
    assert (tmp_path / "videos/a-seed-1.mp4").stat().st_size > 0
    assert summary.episodes == 12 and summary.crashes == 0
    assert "evaluating 12/12 (100%)" in capsys.readouterr().err


def test_the_environments_a_worker_has_change_nothing():
    one, many = (sorted((r.task, r.seed, r.outcome, r.steps) for r in stream(EPISODES, point_setup(slots=slots), 0)) for slots in (1, 7))
    assert one == many


def test_the_execution_horizon_is_the_options_then_the_policys_then_eight():
    def horizon(given, **metadata):
        return settings_for(EvalConfig(policy="x", tasks="a", execution_horizon=given), metadata).execution_horizon

    assert horizon(3, execution_horizon=5) == 3
    assert horizon(None, execution_horizon=5, action_horizon=16) == 5
    assert horizon(None, action_horizon=16) == 8
    assert horizon(None, action_horizon=4) == 4
    assert horizon(None) == 8


KNOWN = {
    "demonstration_seeds": {"drawer-open-v3": [100, 150]},
    "camera_sources": {"base": "corner2:8x8"},
    "embodiment": "point",
    "training": {"steps": "3000"},
}


@pytest.fixture
def faked(monkeypatch):
    """`evaluate` with the numpy policy for a bundle and points for a simulator; the list holds what was asked for."""
    asked = []

    def open_policy(config):
        asked.append(f"open {config.policy}")
        return PointPolicy()

    def read_metadata(config):
        asked.append(f"read {config.policy}")
        return {**PointPolicy().metadata, **KNOWN}

    def open_environment(task, cameras, max_steps):
        asked.append((cameras, max_steps, task))

        def fault(where, seed, step):
            if task == "window-open-v3" and seed == 2 and where == "step":
                raise RuntimeError("lost a contact")

        return PointEnvironment(task, fault)

    monkeypatch.setattr(evaluation, "_read_metadata", read_metadata)
    monkeypatch.setattr(evaluation, "_open_policy", open_policy)
    monkeypatch.setattr(catalog, "open_environment", open_environment)
    return asked


def test_the_command_writes_a_report_and_says_crashes_aloud(tmp_path, faked, capsys):
    folder = tmp_path / "out"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    words = [
        "--policy",
        "some/bundle",
        "--tasks",
        "drawer-open-v3,window-open-v3",
        "--episodes",
        "4",
        "--num_workers",
        "0",
        "--output_dir",
        str(folder),
    ]
    result = command.run(options.parse(command.Options, [*words, "--metrics", str(tmp_path / "metrics.jsonl")], command.ALIASES))
    assert result == json.loads(json.dumps(result))
    assert set(result) >= {"mean_success", "success", "interval", "crashes", "episodes", "seconds", "report", "output_dir"}
    assert (result["crashes"], result["episodes"], result["output_dir"]) == (1, 8, str(folder))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "CRASHES window-open-v3: 1 of 4 episodes crashed" in " ".join(printed.err.split())
    page = (folder / "report.html").read_text()
    assert "Training loss" in page and "lost a contact" in page and "some/bundle" in page and "corner2:8x8" in page and "3000" in page
    assert faked[:2] == ["read some/bundle", "open some/bundle"]
    assert faked[2] == (parse_cameras("base=corner2:8x8"), None, "drawer-open-v3")
    with pytest.raises(OutputError, match="never overwritten"):
        command.run(options.parse(command.Options, words))


def test_seen_seeds_are_refused_before_anything_runs(tmp_path, faked):
    seen = EvalConfig(policy="p", tasks="drawer-open-v3", first_seed=140, num_workers=0, episodes=2, output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="demonstrated with seeds 100 to 150"):
        command.run(seen)
    assert faked == ["read p"] and not (tmp_path / "out").exists()
    assert command.run(replace(seen, allow_seen_seeds=True))["episodes"] == 2


def test_an_unknown_task_is_refused_before_the_policy_is_loaded(tmp_path, faked):
    with pytest.raises(ConfigError, match=r"unknown Meta-World task 'drawer-open': did you mean 'drawer-open-v3'"):
        command.run(EvalConfig(policy="p", tasks="drawer-open", num_workers=0, output_dir=str(tmp_path / "out")))
    assert faked == []
