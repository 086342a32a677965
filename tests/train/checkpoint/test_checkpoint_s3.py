"""Tests of checkpoints in a bucket: as in a folder, against moto's S3 server, which the test starts on loopback."""

import sys

import pytest
import torch

from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.storage import open_store, whole
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm_client.errors import ConfigError, OutputError

ALONE = Parallel(Context())
PLACE = "s3://runs/lab/first"


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def client(server, monkeypatch):
    """An empty bucket `runs`, found by the variables that every tool of AWS reads."""
    import boto3

    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": server}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    made = boto3.client("s3")
    made.create_bucket(Bucket="runs")
    yield made
    for found in made.list_objects_v2(Bucket="runs").get("Contents", []):
        made.delete_object(Bucket="runs", Key=found["Key"])
    made.delete_bucket(Bucket="runs")


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model/weight": torch.full((3, 2), value), "moments/step": torch.tensor(value)}


def saved(*steps: int, keep: int = 9) -> None:
    checkpoints = Checkpoints(PLACE, ALONE, keep)
    for step in steps:
        checkpoints.save(step, tensors(float(step)), {"step": step})
    checkpoints.close()


def restored() -> float | None:
    target = tensors(0.0)
    checkpoints = Checkpoints(PLACE, ALONE, 9)
    found = checkpoints.restore(target, lambda index: None)
    checkpoints.close()
    return None if found is None else float(target["model/weight"].mean())


def names(client) -> list[str]:
    return sorted(found["Key"] for found in client.list_objects_v2(Bucket="runs").get("Contents", []))


def test_round_trip_and_retention(client):
    assert restored() is None
    saved(5, 10, 15, keep=2)
    assert whole(PLACE) == [10, 15]
    assert restored() == 15.0
    assert names(client) == [
        f"lab/first/step-0000000{step}/{name}" for step in (10, 15) for name in ("COMMIT", "index.json", "rank-00000.safetensors")
    ]


def test_a_torn_one_is_passed_over_by_name(client, capsys):
    saved(5, 10, 15)
    client.delete_object(Bucket="runs", Key="lab/first/step-000000015/COMMIT")
    client.put_object(Bucket="runs", Key="lab/first/step-000000010/rank-00000.safetensors", Body=b"cut")
    assert restored() == 5.0
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is torn")[0] for line in said] == [f"checkpoint {PLACE}/step-000000015", f"checkpoint {PLACE}/step-000000010"]


def test_a_large_file_goes_in_pieces_and_comes_back_by_range(client):
    store = open_store(PLACE)
    big = memoryview(torch.arange(5 << 20, dtype=torch.int32).numpy())  # 20 MiB: past boto3's limit for one request
    store.write("big", [memoryview(b"head"), big])
    assert client.head_object(Bucket="runs", Key="lab/first/big")["ETag"].strip('"').endswith("-3")
    assert store.sizes() == {"big": 4 + big.nbytes}
    assert bytes(store.read("big", 0, 4)) == b"head"
    assert torch.frombuffer(store.read("big", 4 + 4 * 12345, 4 + 4 * 12347), dtype=torch.int32).tolist() == [12345, 12346]
    assert bytes(store.read("big", 7, 7)) == b""
    with pytest.raises(FileNotFoundError):
        store.read("missing")
    store.remove(["big", "missing"])
    assert store.sizes() == {}


def test_a_bucket_that_is_not_there_is_named(client):
    checkpoints = Checkpoints("s3://nowhere/run", ALONE, 2)
    with pytest.raises(OutputError, match=r"checkpoint of step 1 in s3://nowhere/run could not be written \(.*NoSuchBucket"):
        checkpoints.save_now(1, tensors(1.0), {"step": 1})
    with pytest.raises(OutputError, match=r"checkpoints in s3://nowhere/run cannot be listed \(.*NoSuchBucket.*; correct checkpoint_dir"):
        checkpoints.restore(tensors(1.0), lambda index: None)
    checkpoints.close()


def test_without_boto3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"s3://runs/x needs boto3, which is not installed; type: pip install 'pi0fm\[s3\]'"):
        open_store("s3://runs/x")
