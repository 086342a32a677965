"""Tests of evaluation on Ray actors: the same results as in the calling process, an actor that dies, faults without Ray's wrapping."""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import eval_fakes
import pytest
from eval_fakes import point_setup
from small_policies import small_policy

from pi0fm.cluster import following
from pi0fm.cluster.evaluation import on_actors
from pi0fm.cluster.following import follow
from pi0fm.cluster.runtime import ray_session
from pi0fm.eval.config import FollowConfig, FollowOptions
from pi0fm.eval.evaluate import in_this_process, run_episodes
from pi0fm.eval.rollouts.episode import Episode
from pi0fm.policy.saved import bundle
from pi0fm.sim import catalog
from pi0fm.train.start.lease import hold_lease
from pi0fm_client.errors import ConfigError, SimulationError

__all__ = ["small_policy"]
EPISODES = [Episode(task, seed, film="large" if seed == 1 else "no") for task in ("a", "b") for seed in range(1, 9)]
pytestmark = pytest.mark.journey


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    """One Ray for the file; actors find nothing of tests/ on their path, so the fakes travel by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(eval_fakes)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with ray_session(num_cpus=2):
        yield
    cloudpickle.unregister_pickle_by_value(eval_fakes)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def unrendered(where, seed, step):
    if where == "observe":
        raise SimulationError("no renderer on this machine")


def verdicts(results):
    return sorted((result.task, result.seed, result.outcome, result.steps) for result in results)


def test_two_workers_find_what_the_calling_process_finds():
    assert verdicts(on_actors(EPISODES, point_setup(), 2)) == verdicts(in_this_process(EPISODES, point_setup()))


def test_an_episode_that_kills_its_worker_is_a_crash_and_takes_no_other_along(tmp_path):
    deaths = Path(tmp_path) / "deaths"

    def fault(where, seed, step):
        if (where, seed, step) == ("step", 3, 2):
            with deaths.open("a") as file:
                file.write("x")
            os._exit(1)

    results = run_episodes(EPISODES[:8], point_setup(fault), partial(on_actors, num_workers=2))
    assert deaths.read_text() == "xx", "tried twice"
    healthy = {row[1]: row[2:] for row in verdicts(in_this_process(EPISODES[:8], point_setup()))}
    assert [result.seed for result in results if result.outcome == "crash"] == [3]
    assert "its worker died twice" in results[2].error
    assert all((result.outcome, result.steps) == healthy[result.seed] for result in results if result.seed != 3)


ENDED = """
import os, signal, sys, time
import eval_fakes, psutil
from ray import cloudpickle
from pi0fm.cluster.evaluation import on_actors
from pi0fm.cluster.runtime import ray_session
from pi0fm.eval.rollouts.episode import Episode
from pi0fm_client.errors import ClusterError

cloudpickle.register_pickle_by_value(eval_fakes)
cloudpickle.register_pickle_by_value(sys.modules["__main__"])

def slow(where, seed, step):
    time.sleep(0.05)

def evaluate(at_the_first_result):
    for number, result in enumerate(on_actors([Episode("a", seed) for seed in range(400)], eval_fakes.point_setup(slow), 1)):
        if number == 0:
            at_the_first_result()

with ray_session(num_cpus=1):
    try:
        evaluate(lambda: os.kill(os.getpid(), signal.SIGTERM))
    except KeyboardInterrupt:
        print("ours: interrupted")
    family = {}

    def kill_raylet():
        family.update({child: child.as_dict(["name"])["name"] for child in psutil.Process().children(recursive=True)})
        next(child for child, name in family.items() if name == "raylet").kill()

    try:
        evaluate(kill_raylet)
    except ClusterError as error:
        print("ours:", error)
print("ours:", [family[process] for process in psutil.wait_procs(list(family), timeout=20)[1] if "Agent" not in family[process]])
"""


def test_sigterm_interrupts_and_a_ray_that_died_is_one_line():
    """Ray itself aborts at SIGTERM, and waits without end for a raylet that was killed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(eval_fakes.__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", ENDED], env=environment, capture_output=True, text=True, timeout=400, check=False)
    own = [line for line in done.stdout.splitlines() if line.startswith("ours: ")]  # Ray prints the end of the raylet's log, or does not
    assert (own[0], own[2]) == ("ours: interrupted", "ours: []"), done.stderr[-2000:]
    assert re.fullmatch(r"ours: Ray must live as long as the run, found its process \d+ ended; type the same command again.*", own[1])


def test_a_fault_of_the_user_arrives_as_itself_on_one_line():
    with pytest.raises(SimulationError) as caught:
        list(on_actors(EPISODES, point_setup(unrendered), 1))
    assert str(caught.value) == "no renderer on this machine"
    with pytest.raises(ConfigError, match="Ray has room for 2"):
        list(on_actors(EPISODES, point_setup(), 3))
    with pytest.raises(ConfigError, match="needs 1 GPU"):
        list(on_actors(EPISODES, replace(point_setup(), gpus_per_worker=1.0), 1))


class ThreeActions(eval_fakes.FakeEnvironment):
    """As the small policy's robot: state 4, actions 3."""

    def __init__(self, task, cameras, max_steps):
        super().__init__(task, cameras, max_steps)
        self.action_dim = 3


def test_a_run_that_trains_is_followed_by_actors(small_policy, tmp_path, monkeypatch):
    """Ray's workers evaluate a bundle while the run leaves the next one."""
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(catalog, "open_environment", ThreeActions)
    run = tmp_path / "run"

    def leave(steps):
        path = run / f"bundles/step-{steps:09d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        bundle.save(path, small_policy.weights, replace(small_policy.config, training={"steps": str(steps)}), small_policy.stats)

    def trains():
        with hold_lease(run):
            begun.set()
            leave(100)
            while not (run / "best.json").exists():
                time.sleep(0.01)
            leave(200)

    run.mkdir()
    begun, training = threading.Event(), threading.Thread(target=trains)
    training.start()
    begun.wait()
    words = {"tasks": "reach-v3", "cameras": "base=corner2:8x8,wrist=gripperPOV:8x8", "episodes": 3, "max_steps": 6, "num_workers": 2}
    found = follow(FollowConfig(follow=FollowOptions(run=run, keep="all"), **words))
    training.join()
    assert [(row["steps"], row["episodes"], row["crashes"]) for row in found["evaluations"]] == [(100, 3, 0), (200, 3, 0)]
    assert len(list((run / "evaluations").glob("step-*/videos/*.mp4"))) == 6, "every failure is filmed"
