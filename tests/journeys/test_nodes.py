"""Two nodes of Ray, here two on one machine with a cache folder each: both build their cache, and train as one process does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import recorded_curve as record
import tiny_dataset
import yaml
from ray.cluster_utils import Cluster

from pi0fm.cli.main import main
from pi0fm.data.pictures.decoding import ONE_THREAD

pytestmark = [pytest.mark.journey, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of one CPU; what they start looks for the user's cache in folders of their own."""
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
