"""Options of an evaluation: lists, ranges, cameras, seeds that were demonstrated."""

import pytest

from pi0fm import options
from pi0fm.eval.config import EvalConfig, camera_specs, checked_cameras, plan, refuse_seen_seeds
from pi0fm.eval.rollouts.episode import Episode
from pi0fm.sim import catalog
from pi0fm.sim.environment import parse_cameras
from pi0fm_client.errors import ConfigError


def config(**changes):
    return EvalConfig(**({"policy": "bundle", "tasks": ("a",)} | changes))


@pytest.mark.parametrize("words", [["--tasks", "a,b"], ["--tasks", "[a, b]"], ["--tasks", "a, b,"]])
def test_tasks_on_the_command_line(words):
    parsed = options.parse(EvalConfig, ["--policy", "x", *words, "--cameras", "base=corner:9x9"])
    assert parsed.tasks == ("a", "b")
    assert parsed.cameras == ("base=corner:9x9",)


def test_tasks_from_yaml_or_python_survive_a_round_trip():
    first = options.decode(EvalConfig, {"policy": "x", "tasks": ["a", "b"]})
    assert first == EvalConfig(policy="x", tasks=("a", "b")) == options.decode(EvalConfig, options.encode(first))


def test_the_plan_films_each_tasks_first_episodes_large_and_the_failures_of_the_others():
    found = plan(config(tasks="a,b", episodes=12, first_seed=7, videos_per_task=2))
    films = ["large"] * 2 + ["failure"] * 8 + ["always", "failure"]
    assert found == [Episode(task, 7 + k, films[k]) for task in ("a", "b") for k in range(12)]
    for more, film in ({"videos": "none"}, "no"), ({"videos": "all", "videos_per_task": 0}, "always"):
        assert {episode.film for episode in plan(config(tasks="a", episodes=12, **more))} == {film}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ","}, "one task or more"),
        ({"tasks": "a,b,a"}, "found a more than once"),
        ({"episodes": 0}, "episodes must be 1 or more, found 0"),
        ({"execution_horizon": 0}, "execution_horizon must be 1 or more"),
        ({"num_workers": -1}, "num_workers must be 0 or more"),
        ({"gpus_per_worker": 0.5, "num_workers": 0}, "takes what it finds"),
        ({"policy": "ws://robot:8000", "num_flow_steps": 3}, "num_flow_steps belongs to the server ws://robot:8000"),
        ({"policy": "ws://robot:8000", "noise_level": 0.5, "device": "cpu"}, "noise_level and device belong to the server"),
        ({"policy": "ws://a:8", "robot": "arm"}, "robot belongs to the server ws://a:8, which runs the model; type it behind pi0fm serve"),
        ({"policy": "ws://robot:8000", "scores": True}, "ws://robot:8000 sends actions only; give --policy the bundle's directory"),
        ({"policy": "ws://robot:8000", "compile": "kernels"}, "compile belongs to the server ws://robot:8000"),
        ({"scores": True, "compile": "kernels"}, "scores need a policy that is not compiled, found compile kernels"),
        ({"videos": "none", "videos_per_task": 2}, "--videos none films nothing, found videos_per_task 2; leave one"),
        ({"score_probes": 4}, "score_probes belongs to --scores, found 4 without it"),
        ({"scores": True, "score_probes": -1}, "score_probes must be 0 or more"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config(**changes)


@pytest.mark.parametrize("first", [1, 41, 50, 59])
def test_seeds_of_demonstrations_are_refused(first):
    seen = {"demonstration_seeds": {"b": [60, 99], "a": [20, 59]}}
    asked = config(tasks="a", first_seed=first, episodes=20)
    with pytest.raises(ConfigError, match=r"a was demonstrated with seeds 20 to 59.*--first_seed 60, or --allow_seen_seeds"):
        refuse_seen_seeds(asked, seen)
    refuse_seen_seeds(config(tasks="a", first_seed=first, episodes=20, allow_seen_seeds=True), seen)


@pytest.mark.parametrize("first", [0, 60])
def test_fresh_seeds_and_unknown_ones_pass(first):
    refuse_seen_seeds(config(first_seed=first, episodes=20), {"demonstration_seeds": {"a": [20, 59]}})
    refuse_seen_seeds(config(first_seed=first, episodes=20), {"demonstration_seeds": {"b": [0, 99]}})
    refuse_seen_seeds(config(first_seed=first), {})


def test_cameras_come_from_the_command_the_policy_or_the_simulator():
    sources = {"camera_sources": {"base": "corner2:96x96", "wrist": "gripperPOV:64x80"}}
    suite = catalog.suite_named(catalog.DEFAULT_SUITE)
    assert camera_specs(config(), sources, suite) == parse_cameras("base=corner2:96x96,wrist=gripperPOV:64x80")
    assert camera_specs(config(cameras="base=topview:32x32"), sources, suite) == parse_cameras("base=topview:32x32")
    assert camera_specs(config(), {}, suite) == suite.default_cameras


def test_a_task_with_its_suite_is_the_task_by_its_name_alone():
    full = config(tasks="metaworld/drawer-open-v3,reach-v3")
    assert full == config(tasks="drawer-open-v3,reach-v3")
    with pytest.raises(ConfigError, match="drawer-open-v3 was demonstrated with seeds 1 to 9"):
        refuse_seen_seeds(full, {"demonstration_seeds": {"drawer-open-v3": [1, 9]}})
    with pytest.raises(ConfigError, match="found drawer-open-v3 more than once"):
        config(tasks="metaworld/drawer-open-v3,drawer-open-v3")


def test_suites_of_one_robot_are_judged_together_and_of_another_are_refused():
    both = config(tasks="libero_spatial/0,libero_object/3")
    sources = {"camera_sources": {"image": "agentview-fast:128x128"}}
    assert checked_cameras(both, sources) == parse_cameras("image=agentview-fast:128x128")
    assert checked_cameras(both, {}) == catalog.SUITES["libero_object"].default_cameras
    with pytest.raises(ConfigError, match=r"found other cameras in metaworld than in libero_spatial; evaluate each by itself, or type --c"):
        checked_cameras(config(tasks="libero_spatial/0,reach-v3"), {})
    with pytest.raises(ConfigError, match=r"found other state in pusht than in metaworld; evaluate each by itself$"):
        checked_cameras(config(tasks="reach-v3,pusht/push-t"), {"camera_sources": {"base": "top:96x96"}})
    with pytest.raises(ConfigError, match="unknown LIBERO object task '12'"):
        checked_cameras(config(tasks="libero_spatial/0,libero_object/12"), {})
