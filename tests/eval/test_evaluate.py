"""The order policy -> episodes -> report, with fakes in place of bundle and simulator."""

import json
from dataclasses import replace

import pytest
from eval_fakes import PointEnvironment, PointPolicy, point_setup

from pi0fm import machine, options
from pi0fm.cli.judging import eval as command
from pi0fm.eval import evaluate as module
from pi0fm.eval.config import EvalConfig
from pi0fm.eval.evaluate import in_this_process, run_episodes, settings_for
from pi0fm.eval.rollouts.episode import Episode
from pi0fm.eval.rollouts.journal import Journal
from pi0fm.sim import catalog
from pi0fm.sim.catalog import prompt_of
from pi0fm.sim.environment import parse_cameras
from pi0fm_client.errors import ConfigError, OutputError

EPISODES = [Episode(task, seed, film="large" if seed == 1 else "no") for task in ("a", "b") for seed in range(1, 7)]


def test_rows_keep_the_order_of_the_episodes_and_videos_go_to_disk(tmp_path, capsys):
    with Journal(tmp_path, {}) as journal:
        results = run_episodes(EPISODES, point_setup(), in_this_process, journal)
    assert [(result.task, result.seed) for result in results] == [(episode.task, episode.seed) for episode in EPISODES]
    assert [result.row()["video"] for result in results if result.video_path] == ["videos/a-seed-1.mp4", "videos/b-seed-1.mp4"]
    assert (tmp_path / "videos/a-seed-1.mp4").stat().st_size > 0
    assert {result.outcome for result in results} <= {"success", "failure"}
    assert "evaluating 12/12 (100%)" in capsys.readouterr().err


def test_the_environments_a_worker_has_change_nothing():
    one, many = (
        sorted((r.task, r.seed, r.outcome, r.steps) for r in in_this_process(EPISODES, point_setup(environments=count))) for count in (1, 7)
    )
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

    monkeypatch.setattr(module, "read_metadata", read_metadata)
    monkeypatch.setattr(module, "_open_policy", open_policy)
    monkeypatch.setattr(catalog, "open_environment", open_environment)
    return asked


def test_the_command_writes_a_report_and_says_crashes_aloud(tmp_path, faked, capsys):
    folder = tmp_path / "out"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    words = ["--policy", "some/bundle", "--tasks", "drawer-open-v3,window-open-v3", "--episodes", "4", "--num_workers", "0"]
    words += ["--output_dir", str(folder)]
    result = command.run(options.parse(command.Options, [*words, "--metrics", str(tmp_path / "metrics.jsonl")], command.ALIASES))
    assert result == json.loads(json.dumps(result))
    assert set(result) >= {"mean_success", "success", "interval", "crashes", "episodes", "seconds", "report", "output_dir"}
    assert (result["crashes"], result["episodes"], result["output_dir"]) == (1, 8, str(folder))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "CRASHES window-open-v3: 1 of 4 episodes crashed" in " ".join(printed.err.split())
    page = (folder / "report.html").read_text()
    assert "Training loss" in page and "lost a contact" in page and "some/bundle" in page and "corner2:8x8" in page and "3000" in page
    assert prompt_of("drawer-open-v3") in page and f"Written by pi0fm {machine.version()} on 20" in page
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


def test_one_call_over_several_suites_says_the_success_of_each(tmp_path, faked):
    told = command.run(
        EvalConfig(
            policy="p",
            tasks="libero_spatial/0,libero_spatial/4,libero_object/3",
            cameras="base=agentview:8x8",
            num_workers=0,
            episodes=4,
            output_dir=str(tmp_path),
        )
    )
    by_suite = told["by_suite"]
    assert set(by_suite) == {"libero_spatial", "libero_object"} and "220, 280" in (tmp_path / "report.html").read_text()
    assert [by_suite[name]["episodes"] for name in ("libero_spatial", "libero_object")] == [8, 4]
    assert by_suite["libero_object"]["mean_success"] == told["success"]["libero_object/3"]
    assert told["mean_success"] == pytest.approx(sum(told["success"].values()) / 3)
