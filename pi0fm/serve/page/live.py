"""The live page of a server: each robot's cameras as the model sees them, its predicted and executed actions, latency, scores, limits.

Owns: the last moments of each robot, the page's routes, who may see it. Does not know: how the page draws (live.js), the policy.

    GET /live                             the page, whose two other files come from the same address; nothing comes from elsewhere
    GET /live/data?robot=3                JSON: the policy, the server's counts, a line for each robot, and the whole of robot 3
    GET /live/picture?robot=3&camera=base the last picture, resized and padded as the network takes it

It costs a request nothing but a reference to its observation: pictures are resized when somebody looks.
"""

import asyncio
import base64
import binascii
import ipaddress
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pi0fm.serve.batcher import Request
from pi0fm_client.types import ActionChunk, Observation

KEPT_ROBOTS = 64
KEPT_STEPS = 240  # control steps of predicted against executed actions
KEPT_ANSWERS = 240
GONE_SECONDS = 600.0
DIGITS = 5
FILES = {"": "live.html", "live.js": "live.js", "live.css": "live.css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
NetworkPictures = Callable[[Observation], Mapping[str, NDArray[np.uint8]]]


@dataclass
class _Robot:
    """answers: seconds on the server's clock, milliseconds from arrival to answer, uncertainty or None."""

    number: int
    name: str
    seen: NetworkPictures
    observation: Observation
    chunk: NDArray[np.float32]
    at: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    predicted: deque[list[float]] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    executed: deque[list[float]] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    answers: deque[tuple[float, float, float | None]] = field(default_factory=lambda: deque(maxlen=KEPT_ANSWERS))

    def line(self, now: float) -> dict[str, Any]:
        """Return the robot's line in the list."""
        recent = [answer for answer in self.answers if now - answer[0] < 5.0]
        milliseconds = [answer[1] for answer in self.answers]
        return {
            "robot": self.number,
            "name": self.name,
            "prompt": self.observation.prompt[:200],
            "seconds_ago": _short(now - self.at),
            "answers_per_second": _short(len(recent) / 5.0),
            "latency_ms": {name: _short(np.percentile(milliseconds, share)) for name, share in (("p50", 50), ("p95", 95))},
            "counts": dict(self.counts),
        }

    def whole(self) -> dict[str, Any]:
        """Return the robot's panel. predicted, executed: [steps, A], the same steps; upcoming: [H, A]."""
        return {
            "robot": self.number,
            "cameras": list(self.observation.images),
            "state": _rows(self.observation.state),
            "predicted": [_rows(row) for row in self.predicted],
            "executed": [_rows(row) for row in self.executed],
            "upcoming": [_rows(row) for row in self.chunk],
            "latency_ms": [_short(answer[1]) for answer in self.answers],
            "uncertainty": [None if answer[2] is None else _short(answer[2]) for answer in self.answers],
        }


@final
class LivePage:
    """The page. about: the policy and the server's load, for the page's head; refusal: the answer to a browser without the key."""

    def __init__(
        self, about: Callable[[], Mapping[str, Any]], refusal: Callable[[Mapping[str, str]], Response | None], threads: Executor
    ) -> None:
        self._about, self._refusal, self._threads = about, refusal, threads
        self._robots: OrderedDict[Hashable, _Robot] = OrderedDict()
        self._numbers = count(1)

    def routes(self) -> list[Route]:
        """Return the routes that an application adds."""
        data, picture = Route("/live/data", self._answered(self._data)), Route("/live/picture", self._answered(self._picture))
        return [data, picture, Route("/live", self._answered(self._file)), Route("/live/{name}", self._answered(self._file))]

    def inferred(
        self, seen: NetworkPictures | None, requests: Sequence[Request], seeds: Sequence[int], chunks: Sequence[ActionChunk]
    ) -> None:
        """Note a batch; seen: an observation's pictures as the policy's network takes them."""
        now = time.monotonic()
        for request, chunk in zip(requests, chunks, strict=True):
            robot = self._robots.get(request.session)
            if robot is None:
                name = request.name or f"robot {len(self._robots) + 1}"
                robot = _Robot(next(self._numbers), name, seen or _as_sent, request.observation, chunk.actions)
                self._robots[request.session] = robot
            elif request.report is not None and len(request.report.executed) and request.report.executed.shape[1] == robot.chunk.shape[1]:
                rows = request.report.executed[: len(robot.chunk)]
                robot.predicted.extend(robot.chunk[: len(rows)].tolist())
                robot.executed.extend(rows.tolist())
            robot.seen, robot.observation, robot.chunk, robot.at = seen or _as_sent, request.observation, chunk.actions, now
            robot.counts = robot.counts if request.report is None else request.report.counts
            milliseconds = (time.perf_counter() - request.arrived) * 1e3
            robot.answers.append((now, milliseconds, chunk.scores.get("spread")))
            self._robots.move_to_end(request.session)
        while self._robots and (len(self._robots) > KEPT_ROBOTS or now - next(iter(self._robots.values())).at > GONE_SECONDS):
            self._robots.popitem(last=False)

    def left(self, connection: object) -> None:
        """Let go of the pictures of the robots of a connection that ended; a robot's key is (connection, name)."""
        for key, robot in self._robots.items():
            if isinstance(key, tuple) and key[0] is connection:
                robot.observation = replace(robot.observation, images={})

    def _answered(self, answer: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        async def guarded(request: HttpRequest) -> Response:
            if not _is_own_name(request.url.hostname or ""):
                return PlainTextResponse("open this page by the machine's address, or its own name\n", 403)
            response: Response = self._refusal(request.headers) or await answer(request)
            response.headers.update(HEADERS)
            return response

        return guarded

    async def _file(self, request: HttpRequest) -> Response:
        name = FILES.get(request.path_params.get("name", ""))
        return PlainTextResponse("no such page\n", 404) if name is None else FileResponse(Path(__file__).with_name(name))

    async def _data(self, request: HttpRequest) -> Response:
        now, chosen = time.monotonic(), self._chosen(request)
        robots = [robot.line(now) for robot in sorted(self._robots.values(), key=lambda robot: robot.number)]
        return JSONResponse({**self._about(), "robots": robots, "chosen": None if chosen is None else chosen.whole()})

    async def _picture(self, request: HttpRequest) -> Response:
        robot, camera = self._chosen(request), request.query_params.get("camera", "")
        if robot is None:
            return PlainTextResponse("no robot has asked yet\n", 404)
        png = await asyncio.get_running_loop().run_in_executor(self._threads, _png, robot.seen, robot.observation, camera)
        return PlainTextResponse("no such camera\n", 404) if png is None else Response(png, media_type="image/png")

    def _chosen(self, request: HttpRequest) -> _Robot | None:
        """Return the robot that was asked for, else the last one that asked."""
        number = request.query_params.get("robot", "")
        found = [robot for robot in self._robots.values() if str(robot.number) == number] or list(self._robots.values())
        return found[-1] if found else None


def basic_key(headers: Mapping[str, str]) -> str | None:
    """Return the key that a browser sent as the password of its own form, under any name."""
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2] if scheme.lower() == "basic" else None
    except (binascii.Error, UnicodeDecodeError):
        return None


def _is_own_name(host: str) -> bool:
    """Tell whether a page of this name can only be this machine's: a foreign site may point a name of its own at this address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.lower() in {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
    return True


def _png(seen: NetworkPictures, observation: Observation, camera: str) -> bytes | None:
    picture = seen(observation).get(camera)
    if picture is None:
        return None
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _as_sent(observation: Observation) -> Mapping[str, NDArray[np.uint8]]:
    return observation.images


def _rows(row: Any) -> list[float]:
    return [_short(value) for value in row]


def _short(value: Any) -> float:
    return float(f"{float(value):.{DIGITS}g}")
