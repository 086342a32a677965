import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from demos_help import config, submit

from pi0fm import options
from pi0fm.cluster.recording import record_demonstrations
from pi0fm.cluster.runtime import ray_session, require_resources
from pi0fm.demos.config import DemosConfig
from pi0fm.demos.dataset import SETTINGS_FILE
from pi0fm.demos.record import record
from pi0fm.sim import catalog
from pi0fm.sim.environment import parse_cameras
from pi0fm_client.errors import ConfigError

pytestmark = pytest.mark.journey
# An episode takes 25 ms, so that 400 of them outlast any moment of the kill below, and a test that is kept waiting for seconds.
KILLED = """
import signal
import sys
import time
from pathlib import Path
from demos_help import config, submit
from pi0fm.processes import sigterm_interrupts
from pi0fm.demos.record import record

def slowly(task, seed):
    time.sleep(0.025)
    return submit(task, seed)

# what starts the tests may ignore Ctrl-C, and a child inherits that; a terminal's program does not
signal.signal(signal.SIGINT, signal.default_int_handler)
with sigterm_interrupts():
    record(config(Path(sys.argv[1]), episodes=200), slowly, 2)
"""
TERMINATED = ["--tasks", "handle-press-v3", "--episodes", "500", "--cameras", "base=corner2:32x32", "--root"]


def columns(root: Path) -> dict[str, list[object]]:
    return parquet.read_table(root / "data").to_pydict()


def pixels(root: Path) -> list[np.ndarray]:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    data = LeRobotDataset("local/test", root=root, video_backend="pyav")
    return [data[index]["observation.images.base"].numpy() for index in range(len(data))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_recording_opens_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    root = tmp_path / "set"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "support"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (root / SETTINGS_FILE).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(random.uniform(0, 1.5))  # any moment will do: within an episode, a segment's end, the swap
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
    there = columns(root)
    episodes = there["episode_index"][-1] + 1
    if number == signal.SIGKILL:
        assert episodes % 10 == 0
    assert 10 <= episodes < 400
    assert len(pixels(root)) == len(there["index"])
    asked = max(episodes // 2 + 3, 12)
    if episodes <= asked:
        record(config(root, episodes=asked), submit, 2)
        whole = tmp_path / "whole"
        record(config(whole, episodes=asked), submit, 2)
        assert columns(root)["seed"] == columns(whole)["seed"]
        assert columns(root)["action"] == columns(whole)["action"]
        assert all(np.array_equal(one, other) for one, other in zip(pixels(root), pixels(whole), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_publishes_what_is_whole(tmp_path: Path, workers: int) -> None:
    root = tmp_path / "set"
    words = [sys.executable, "-m", "pi0fm.cli.main", "demos", *TERMINATED, str(root), "--num_workers", str(workers)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        seen, said = None, ""
        while seen is None:
            line = process.stderr.readline()
            said += line
            assert line, f"it ended before its first line of progress: {said}"
            seen = re.match(r"demonstrations (\d+)/500", line)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and errors.splitlines()[-1] == "pi0fm: interrupted; what was finished is kept"
    assert int(seen[1]) <= columns(root)["episode_index"][-1] + 1 < 500  # those of the segment that was open, too
    assert len(pixels(root)) == len(columns(root)["index"])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.long
def test_the_data_set_is_the_same_whatever_the_number_of_workers(tmp_path: Path) -> None:
    roots = [tmp_path / f"workers{count}" for count in (1, 2)]
    with ray_session(num_cpus=2):
        for count, root in zip((1, 2), roots, strict=True):
            tree = {
                "tasks": "handle-press-v3",
                "episodes": 3,
                "cameras": "base=corner2:48x48",
                "num_workers": count,
                "dataset": {"root": str(root)},
            }
            assert record_demonstrations(options.decode(DemosConfig, tree))["episodes"] == 3
        with pytest.raises(ConfigError, match="each worker needs 1 GPU"):
            require_resources({"GPU": 1})
        with pytest.raises(ConfigError, match="room for 2"):
            require_resources({"CPU": 1}, count=3)
        require_resources({"CPU": 1}, count=2)
    one, two = map(columns, roots)
    assert one == two
    assert all(np.array_equal(a, b) for a, b in zip(pixels(roots[0]), pixels(roots[1]), strict=True))


@pytest.mark.parametrize("task", sorted(catalog.suite_named(catalog.DEFAULT_SUITE).tasks))
def test_every_task_is_built_and_its_expert_acts(task: str) -> None:
    environment = catalog.open_environment(task, parse_cameras("base=corner2:32x32"), max_steps=3)
    environment.reset(0)
    for _ in range(3):
        environment.step(environment.expert_action())
    assert np.isfinite(environment.observe().state).all()
    environment.close()
