"""Tests of the live page: its data of each robot, its access control, its rendering in a browser."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_policies import small_policy
from test_policy_server import observation_bytes, talk

from pi0fm.serve.page import live as page
from pi0fm_client import Executor, PolicyClient, wire
from pi0fm_client.types import ActionChunk

__all__ = ["small_policy"]


def get(url: str, path: str, **headers: str) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(url.replace("ws://", "http://") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def data(url: str, path: str = "/live/data") -> dict[str, Any]:
    return dict(json.loads(get(url, path)[1]))


@pytest.fixture
def arm(start_server: Any, small_policy: Any) -> Iterator[tuple[str, Callable[[int], Executor]]]:
    """A server with the page, and a function that runs a robot with a simulated clock for some control steps."""
    policy = small_policy.in_memory()
    policy.metadata["limits"] = {"low": [-5.0, -20.0, None], "high": [5.0, 20.0, None], "velocity": 1.0}
    server = start_server(policy, live=True)
    random = np.random.default_rng(0)
    observation = {
        "observation.images.base": random.integers(0, 256, (30, 60, 3), np.uint8),
        "observation.images.wrist": random.integers(0, 256, (40, 40, 3), np.uint8),
        "observation.state": np.zeros(4, np.float32),
        "prompt": "press <b>the</b> button",
    }
    clock = [0.0]
    with PolicyClient(server.url) as client:

        def live(steps: int) -> Executor:
            def submit(message: Any) -> Future[ActionChunk]:
                future: Future[ActionChunk] = Future()
                future.set_result(client.infer(message))
                return future

            executor = Executor(
                client, control_hz=0.2, initial_command=np.zeros(3), submit=submit, clock=lambda: clock[0], state_check="off"
            )
            for _ in range(steps):
                executor.observe(observation)
                executor.next()
                clock[0] += 5.0
            return executor

        yield server.url, live


def test_predicted_and_executed_actions_are_of_the_same_control_steps(arm: Any) -> None:
    url, live = arm
    executor = live(40)
    shown = data(url)
    (line,), robot = shown["robots"], shown["chosen"]
    assert line["prompt"] == "press <b>the</b> button" and line["counts"]["steps"] > 30
    assert 0 < line["counts"]["clamped"] <= executor.report.clamped.sum()
    told, done = np.array(robot["predicted"]), np.array(robot["executed"])
    assert told.shape == done.shape and len(done) > 30 and np.array(robot["upcoming"]).shape == (4, 3)
    # the arm may change by 1 a step: the third action has no other limit, so it follows what it was told as fast as that allows
    moves = np.abs(np.diff(done, axis=0))
    assert moves.max() <= 1 + 1e-4 and (np.abs(done) <= np.array([5, 20, np.inf]) + 1e-4).all()
    reached = np.abs(told[1:] - done[:-1]) <= 1
    np.testing.assert_allclose(done[1:][reached & (np.abs(told[1:]) < 5)], told[1:][reached & (np.abs(told[1:]) < 5)], atol=1e-3)
    assert shown["policy"]["limits"]["velocity"] == 1.0 and shown["server"]["connections"] == 1


def test_pictures_are_shown_as_the_network_takes_them(arm: Any, small_policy: Any) -> None:
    url, live = arm
    live(1)
    side = small_policy.config.model.vision.image_size
    status, png, headers = get(url, "/live/picture?camera=base")
    picture = np.array(Image.open(BytesIO(png)))
    assert status == 200 and headers["Content-Type"] == "image/png" and picture.shape == (side, side, 3)
    assert not picture[: side // 5].any() and picture[side // 2].any(), "twice as wide as high: bands above and below"
    assert get(url, "/live/picture?camera=nose")[0] == 404 and get(url, "/live/../app.py")[0] == 404


def test_the_page_is_off_unless_asked_for_and_asks_for_the_key(start_server: Any) -> None:
    assert get(start_server().url, "/live")[0] == 404
    server = start_server(live=True, token="robot")
    for path in ("/live", "/live/live.js", "/live/data", "/live/picture?camera=front"):
        status, _, headers = get(server.url, path)
        assert status == 401 and headers["WWW-Authenticate"].startswith("Basic")
        assert get(server.url, path, Authorization="Basic " + base64.b64encode(b"me:wrong").decode())[0] == 401
    for key in ("Basic " + base64.b64encode(b"me:robot").decode(), "Api-Key robot"):
        status, page, headers = get(server.url, "/live", Authorization=key)
        assert status == 200 and b"/live/live.js" in page and headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert get(server.url, "/live/data", Authorization="Api-Key robot", Host="evil.example")[0] == 403, "a foreign name for this address"


def test_robots_that_sent_no_report_are_shown_and_old_ones_forgotten(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "KEPT_ROBOTS", 2)
    server = start_server(live=True)
    with ExitStack() as stack:
        for front in (1, 2, 3):
            robot = stack.enter_context(talk(server.url))
            robot.recv()
            robot.send(observation_bytes(front=front))
            robot.recv()
        assert np.array(Image.open(BytesIO(get(server.url, "/live/picture?robot=2&camera=front")[1]))).max() == 2
    shown = data(server.url)
    assert [line["robot"] for line in shown["robots"]] == [2, 3] and shown["chosen"]["robot"] == 3 and shown["chosen"]["executed"] == []
    assert data(server.url, "/live/data?robot=2")["chosen"]["robot"] == 2
    end = time.monotonic() + 5
    while data(server.url, "/live/data?robot=2")["chosen"]["cameras"]:
        assert time.monotonic() < end, "pictures of a robot that left are kept"


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (5, "pi0fm/report must be a map of executed, steps"),
        ({"executed": np.zeros(3, np.float32)}, "executed must be floats"),
        ({"executed": np.full((1, 3), np.nan, np.float32)}, "finite"),
        ({"executed": np.zeros((6000, 3), np.float32)}, "at most 16384"),
        ({"executed": np.zeros((2, 7), np.float32)}, "executed must be [n, 3], found [2, 7]"),
        ({"clamped": -1}, "clamped must be a whole number"),
        ({"rm": 1}, "must be a map of"),
    ],
)
def test_a_report_that_is_none_is_refused(start_server: Any, report: Any, line: str) -> None:
    with talk(start_server().url) as robot:
        robot.recv()
        robot.send(wire.pack({"observation.state": np.zeros(3, np.float32), "prompt": "", wire.REPORT: report}))
        answer = robot.recv()
        assert isinstance(answer, str) and line in answer


def test_what_robots_count_is_counted_once(start_server: Any) -> None:
    server = start_server()
    with talk(server.url) as robot:
        robot.recv()
        for clamped in (2, 5, 5):
            report = {wire.REPORT: {"clamped": clamped, "executed": np.zeros((2, 3), np.float32)}}
            robot.send(wire.pack({"observation.state": np.zeros(3, np.float32), "prompt": "", **report}))
            robot.recv()
    assert 'pi0fm_robot_events_total{what="clamped"} 5.0' in get(server.url, "/metrics")[1].decode().splitlines()


class Browser:
    """Headless Chromium by WebDriver's calls."""

    def __init__(self, port: int, chromium: str, folder: Path) -> None:
        quiet = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic", "disable-gpu"]
        words = ["headless", "no-sandbox", "disable-dev-shm-usage", "window-size=1180,1400", f"user-data-dir={folder}", *quiet]
        options = {
            "goog:chromeOptions": {"binary": chromium, "args": [f"--{word}" for word in words]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._url = f"http://127.0.0.1:{port}/session"
        self._url += "/" + self.call("POST", "", capabilities={"alwaysMatch": options})["sessionId"]

    def call(self, method: str, path: str, **body: Any) -> Any:
        request = urllib.request.Request(self._url + path, None if method == "GET" else json.dumps(body).encode(), method=method)
        with urllib.request.urlopen(request, timeout=40) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", script=f"return {script}", args=[])

    def wait(self, script: str) -> None:
        end = time.monotonic() + 20
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.1)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        pytest.skip("no chromium and chromedriver on this machine: apt-get install chromium chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = next(int(line.rstrip(".\n").rpartition(" ")[2]) for line in process.stdout if "successfully on port" in line)
        found = Browser(port, chromium, tmp_path)
        yield found
        found.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.timeout(120)
def test_a_browser_draws_the_page_and_loads_nothing_from_elsewhere(arm: Any, browser: Browser) -> None:
    url, live = arm
    live(60)
    browser.call("POST", "/url", url=url.replace("ws://", "http://") + "/live")
    browser.wait("document.querySelectorAll('#cameras img').length == 2")
    browser.wait("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.getElementById('prompt').textContent") == "“press <b>the</b> button”", "what a robot sends is text"
    assert browser.run("document.querySelectorAll('#actions canvas').length") == 3
    pixels = "one.getContext('2d').getImageData(0, 0, one.width, one.height).data.some(Boolean)"
    assert browser.run(f"[...document.querySelectorAll('canvas')].filter((one) => one.offsetParent).every((one) => {pixels})"), (
        "an empty chart"
    )
    assert "1 of 64" in browser.run("document.getElementById('tiles').textContent")
    assert browser.run("document.getElementById('state').textContent") == "serving"
    loaded = browser.run("performance.getEntriesByType('resource').map((entry) => new URL(entry.name).host)")
    assert set(loaded) == {urllib.parse.urlsplit(url).netloc}
    assert [entry for entry in browser.call("POST", "/se/log", type="browser") if entry["level"] == "SEVERE"] == []
    if folder := os.environ.get("PI0FM_SCREENSHOTS"):  # for docs/
        Path(folder, "live.png").write_bytes(base64.b64decode(browser.call("GET", "/screenshot")))
