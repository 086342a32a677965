"""Tests of the log of requests: replay is bitwise equal, batch by batch; it keeps its bound and survives a kill."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_policies import saved, small_policy
from test_policy_server import talk

from pi0fm.cli.main import main
from pi0fm.policy.load_options import LoadOptions
from pi0fm.policy.saved import bundle
from pi0fm.serve.batcher import Request
from pi0fm.serve.records.config import ReplayConfig
from pi0fm.serve.records.replay import describe, replay
from pi0fm.serve.records.request_log import RequestLog, read
from pi0fm_client import wire
from pi0fm_client.errors import BundleError, ConfigError, OutputError, ServingError
from pi0fm_client.types import ActionChunk, ActionPrefix, Observation

__all__ = ["saved", "small_policy"]
PREFIX = np.array([[1.0, 0.5, -2.0], [1.5, 0.25, -1.0]], np.float32)
ROBOTS, EACH = 4, 3


@pytest.fixture(scope="module")
def logged(saved: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The log of a server that four robots asked at once, with and without a seed, a prefix, candidates."""
    folder = tmp_path_factory.mktemp("log")
    load = LoadOptions(threads=1)
    policy = bundle.load(saved, load)
    log = RequestLog(folder, 2**26, lambda _: describe(policy, saved, load))
    start = request.getfixturevalue("start_server_for_module")
    server = start(policy, log=log)

    def ask(robot: int) -> None:
        random = np.random.default_rng(robot)
        with talk(server.url) as connection:
            connection.recv()
            for turn in range(EACH):
                message: dict[str, Any] = {
                    "observation.images.base": random.integers(0, 256, (20 + robot, 20, 3), np.uint8),
                    "observation.state": random.normal(size=4).astype(np.float32),
                    "prompt": "press" + " it" * robot,
                }
                message |= [{}, {"noise_seed": 3}, {wire.NUM_CANDIDATES: 2} if robot % 2 else {wire.ACTION_PREFIX: PREFIX}][turn]
                connection.send(wire.pack(message))
                assert isinstance(connection.recv(timeout=20), bytes)

    with ThreadPoolExecutor(ROBOTS) as threads:
        list(threads.map(ask, range(ROBOTS)))
    server.stop()
    return folder


@pytest.fixture(scope="module")
def start_server_for_module(leaving: Any) -> Any:
    import fake_server

    yield from fake_server.start_server.__wrapped__(leaving)  # type: ignore[attr-defined]


def test_a_log_is_inferred_again_bit_for_bit(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(logged)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["requests"] == found["identical"] == ROBOTS * EACH
    assert found["largest_difference"] == 0 and found["differs"] == [] and found["identity"]["log"] == found["identity"]["first"]
    assert f"{ROBOTS * EACH} of {ROBOTS * EACH} answers are the log's, bit for bit" in err


def test_two_bundles_are_compared_beside_what_another_seed_changes(logged: Path, saved: Path, small_policy: Any, tmp_path: Path) -> None:
    bundle.save(
        tmp_path / "near", {name: value * 1.001 for name, value in small_policy.weights.items()}, small_policy.config, small_policy.stats
    )
    found = replay(ReplayConfig(logged, other=tmp_path / "near"))
    assert all(0 < near < 0.1 * noise for near, noise in zip(found["other"], found["another_seed"], strict=True))
    assert len(found["worst"]) == 5 and found["worst"][0]["largest_difference"] >= found["worst"][1]["largest_difference"] > 0
    again = replay(ReplayConfig(logged, bundle=tmp_path / "near", other=saved, most=2))
    assert again["differs"] == ["identity"] and again["identical"] == 0 and again["batches"] == 2 and again["largest_difference"] > 0
    other_robot = replace(
        small_policy.config, embodiment=replace(small_policy.config.embodiment, cameras={"base": "observation.images.base"})
    )
    bundle.save(tmp_path / "other", small_policy.weights, other_robot, small_policy.stats)
    with pytest.raises(ServingError, match="for the same robot, found another cameras"):
        replay(ReplayConfig(logged, other=tmp_path / "other", most=1))


def test_a_log_without_its_bundle_or_without_requests_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="no log of requests in"):
        replay(ReplayConfig(tmp_path))
    log = RequestLog(tmp_path, 2**23, lambda _: {"bundle": "/gone", "load": {}, "guidance": "guided"})
    log.inferred("a", *one_batch(1.0))
    log.close()
    with pytest.raises(BundleError, match="gone from /gone: give --bundle"):
        replay(ReplayConfig(tmp_path))
    with pytest.raises(ConfigError, match=r"of pi0fm 9\.9, whose options"):
        log = RequestLog(tmp_path / "new", 2**23, lambda _: {"bundle": str(tmp_path), "load": {"new": 1}, "versions": {"pi0fm": "9.9"}})
        log.inferred("a", *one_batch(1.0))
        log.close()
        replay(ReplayConfig(tmp_path / "new"))


def one_batch(value: float, side: int = 8) -> tuple[list[Request], list[int], list[ActionChunk]]:
    seen = Observation({"front": np.full((side, side, 3), int(value), np.uint8)}, np.full(3, value, np.float32), "press")
    requests = [Request(seen, prefix=ActionPrefix(PREFIX, 1)), Request(seen)]
    return requests, [1, 2**62], [ActionChunk(np.full((4, 3), value + row, np.float32)) for row in range(2)]


def test_a_log_keeps_its_bound_across_restarts_and_forgets_the_oldest(tmp_path: Path) -> None:
    for start in range(3):
        log = RequestLog(tmp_path, 2**20, lambda identity: {"told": identity})
        for count in range(20):
            log.inferred("a", *one_batch(20.0 * start + count, side=100))  # 60 kB
        log.close()
        assert log.dropped == 0
    found = [batch.actions[0][0, 0] for batch in read(tmp_path)]
    assert found[-1] == 59 and found == sorted(found) and 10 < len(found) < 20
    assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 1.2 * 2**20
    (batch,) = [batch for batch in read(tmp_path) if batch.actions[0][0, 0] == 59]
    assert batch.description["told"] == "a" and batch.seeds == [1, 2**62] and abs(batch.at - time.time()) < 60
    assert batch.requests[0].observation.images["front"].max() == 59 and batch.requests[0].prefix is not None
    assert np.array_equal(batch.requests[0].prefix.actions, PREFIX) and batch.requests[1].prefix is None


def test_a_file_that_a_kill_cut_or_a_disk_changed_is_read_up_to_there(tmp_path: Path) -> None:
    log = RequestLog(tmp_path, 2**23, lambda _: {})
    for value in (1.0, 2.0, 3.0):
        log.inferred(None, *one_batch(value))
    log.close()
    (path,) = tmp_path.glob("*.log")
    whole = path.read_bytes()
    middle = len(whole) // 2
    for changed, left, said in (
        (whole[:-1], 2, 0),
        (whole[:middle], 1, 0),
        (whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:], 2, 1),
        (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], 1, 1),
        (whole[:20], 0, 0),
    ):
        path.write_bytes(changed)
        damaged: list[str] = []
        assert len(list(read(tmp_path, damaged))) == left
        assert len(damaged) == said and all("is damaged before byte" in line for line in damaged), "a cut end is a kill's"


def test_another_policy_begins_another_file(tmp_path: Path) -> None:
    log = RequestLog(tmp_path, 2**23, lambda identity: {"bundle": f"/{identity}"})
    for identity in ("a", "b"):
        log.inferred(identity, *one_batch(1.0))
    log.close()
    assert [batch.description["bundle"] for batch in read(tmp_path)] == ["/a", "/b"]


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    log = RequestLog(tmp_path, 2**23, lambda _: {})
    with pytest.raises(OutputError, match="a log of requests has one writer"):
        RequestLog(tmp_path, 2**23, lambda _: {})
    log.close()


def test_a_log_that_is_deleted_under_the_server_begins_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "log"
    log = RequestLog(folder, 2**23, lambda _: {})
    for value, gone in ((1.0, folder), (2.0, folder / "requests-00000002.log"), (3.0, None)):
        log.inferred(None, *one_batch(value))
        end = time.monotonic() + 10
        while log._waiting_bytes and time.monotonic() < end:
            time.sleep(0.01)
        if gone is not None:
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    log.close()
    assert [batch.actions[0][0, 0] for batch in read(folder)] == [3.0]
    assert caplog.messages == [f"the log of requests in {folder} was deleted: it begins again there"] * 2
    RequestLog(folder, 2**23, lambda _: {}).close()


def test_a_disk_that_is_behind_costs_log_lines_and_no_memory(tmp_path: Path) -> None:
    log = RequestLog(tmp_path, 2**23, lambda _: time.sleep(0.2) or {})
    for _ in range(30):
        log.inferred(None, *one_batch(1.0, side=1000))  # 6 MB
    assert log.dropped > 10
    log.close()
