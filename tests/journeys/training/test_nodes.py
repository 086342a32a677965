"""Tests of two Ray nodes, both on this machine.

With a cache folder each both build their cache, and train as one process does. One without pi0fm is told of in a line before anything
starts, and trains when it is sent along.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import recorded_curve as record
import tiny_dataset
import yaml
from ray.cluster_utils import Cluster

from pi0fm.cli.main import main
from pi0fm.cluster.nodes.local_nodes import LocalNodes
from pi0fm.data.pictures.decoding import ONE_THREAD

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes with one CPU each, whose processes have separate cache folders."""
    nodes = [{"num_cpus": 1, "env_vars": {"XDG_CACHE_HOME": str(tmp_path / name)} | ONE_THREAD} for name in ("node-0", "node-1")]
    found = Cluster(initialize_head=True, head_node_args=nodes[0])
    try:
        found.add_node(**nodes[1])
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def test_two_nodes_build_their_caches_and_train_as_one_process(cluster, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "driver"))
    tree = record.options_of(tiny_dataset.written(tmp_path_factory), tmp_path)
    del tree["dataset"]["cache_dir"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    words = ["--num_workers", "2", "--cpus_per_worker", "1", "--ray_address", cluster.address]
    assert main(["train", str(tmp_path / "config.yaml"), *words]) == 0
    record.assert_same(record.curve(tmp_path / "run"), record.recorded())
    shards = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("00000.u8")}
    assert shards == {"node-0", "node-1"}


def without_pi0fm(folder: Path) -> dict[str, str]:
    """The environment of a node whose Python finds no pi0fm but what Ray brings."""
    folder.mkdir()
    program = (
        "import sys\nfrom pathlib import Path\n"
        "sys.path[:] = [path for path in sys.path if 'runtime_resources' in path or not (Path(path) / 'pi0fm').is_dir()]\n"
    )
    (folder / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": str(folder)}


def test_a_node_without_pi0fm_is_a_line_and_trains_when_it_is_sent_along(tmp_path_factory, tmp_path):
    tree = record.options_of(tiny_dataset.written(tmp_path_factory), tmp_path) | {"num_workers": 2, "cpus_per_worker": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))

    def trained(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pi0fm.cli.main", "train", str(tmp_path / "config.yaml"), "--ray_address", nodes.address, *words]
        paths = os.pathsep.join(str(Path(__file__).parents[3] / each) for each in ("", "client"))
        # Ray's workers look in the driver's folder too
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=400, check=False
        )

    with LocalNodes(2, environments=({}, without_pi0fm(tmp_path / "bare"))) as nodes:
        refused = trained()
        assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
        line = refused.stderr.splitlines()[-1]
        assert line.startswith("pi0fm: every node must have the same versions as this one, found on ")
        assert line.count(": no pi0fm for ") == 1
        assert line.endswith("; install the same there, or, where only the code of pi0fm differs, type --ship_code true")
        assert not (tmp_path / "run").exists()
        sent = trained("--ship_code", "true")
        assert sent.returncode == 0, sent.stderr
    record.assert_same(record.curve(tmp_path / "run"), record.recorded())
