"""The served policy: its greeting, its warm-up, and its replacement by another.

Owns: `ServedPolicy`, the metadata that a swap must not change. Does not know: connections, HTTP, how a bundle is loaded.

    requests   a   b       c     d        e   f
    policy 1  [a] [b]     [c]   [d]  drained, closed
    policy 2      load, warm up     |    [e] [f]          no connection is dropped; replies with an id tell the new identity
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np

from pi0fm.serve import door
from pi0fm.serve.batcher import Batcher, Tap, Worker
from pi0fm.serve.keys import Keys
from pi0fm.serve.limits import ServingLimits
from pi0fm.serve.metrics import Metrics
from pi0fm_client import ObservationCheck, wire
from pi0fm_client.errors import Pi0fmError, ServingError
from pi0fm_client.types import ActionPrefix, Observation, Policy

WARM_UP_IMAGE_SIZE = (224, 224)
SAME_AFTER_A_SWAP = ("cameras", "state_key", "state_dim", "robot_action_dim", "action_horizon", "robot")
logger = logging.getLogger(__name__)


class ServablePolicy(Policy, Protocol):
    """A policy that can judge a client's map; the warm-up reads `cameras`, `state_key`, `state_dim` and `image_size` of its metadata."""

    def observation(self, flat: Mapping[str, Any]) -> Observation:
        """Return the observation in a map. Raises ObservationError in one line; it is called in threads."""
        ...


@runtime_checkable
class PrefixPolicy(Protocol):
    """A policy whose `infer_batch` takes `prefixes`, one ActionPrefix or None for each observation."""

    def refuse_prefixes(self) -> None:
        """Raise where no chunk can be led to a prefix, as the policy is loaded."""
        ...

    def check_prefix(self, prefix: ActionPrefix) -> None:
        """Raise ObservationError for a prefix that does not fit; it is called in threads."""
        ...

    @property
    def leading(self) -> Mapping[str, str]:
        """`guidance`, and how a chunk that is led is compiled, `compile`."""
        ...


@dataclass(frozen=True)
class ServedPolicy:
    """One policy as it is served. greeting: the first frame of a connection. identity: for replies to requests with an id."""

    policy: ServablePolicy
    batcher: Batcher
    reader: door.RequestReader
    greeting: bytes
    identity: str | None


@final
class Serving:
    """The policy that is served now. Raises ObservationError for metadata that cannot be sent."""

    def __init__(
        self,
        policy: ServablePolicy,
        options: ServingLimits,
        metrics: Metrics,
        keys: Keys | None,
        tap: Callable[[ServablePolicy], Sequence[Tap]],
    ) -> None:
        self._options, self._metrics, self._keys, self._tap = options, metrics, keys, tap
        self._swapping = False
        self.now = self._served(policy)
        self.is_warm = False

    def _served(self, policy: ServablePolicy) -> ServedPolicy:
        metadata, options = policy.metadata, self._options
        chooses, compared = hasattr(policy, "infer_best"), ObservationCheck(metadata, cameras=(), mode=options.state_check)

        def judged(message: Mapping[str, Any]) -> Observation:
            observation = policy.observation(message)
            compared(message)
            return observation

        renamed, width = self._keys or dict, metadata.get("robot_action_dim")
        check = _prefix_check(policy)
        reader = door.RequestReader(judged, options.max_frame_bytes, renamed, check, chooses, width)
        told = {wire.IDENTITY: wire.REPLY_IDENTITY, "alarm": wire.ALARM}
        extensions = [*reader.extensions, *(key for name, key in told.items() if name in metadata)]
        greeting = {**without_paths(metadata), "max_frame_bytes": options.max_frame_bytes, wire.EXTENSIONS: extensions}
        if check is not None and isinstance(policy, PrefixPolicy):
            greeting["realtime"] = dict(policy.leading)
        if self._keys is not None:
            greeting["keys"] = dict(self._keys.columns)
        return ServedPolicy(
            policy, Batcher(policy, options, self._metrics, self._tap(policy)), reader, wire.pack(greeting), metadata.get(wire.IDENTITY)
        )

    async def warm_up(self) -> float:
        """Make the policy ready; return the seconds it took, 0 when it was ready. Raises ServingError for one that cannot infer."""
        began = time.perf_counter()
        if not self.is_warm:
            await _warm(self.now)
            self.is_warm = True
        return time.perf_counter() - began

    async def swap(self, load: Callable[[], ServablePolicy]) -> None:
        """Serve the policy that `load` returns, once it is warm; until then, and if it fails, the present one.

        Raises ServingError for a policy that connected robots could not use, and the exceptions of `load`.
        """
        if self._swapping:
            raise ServingError("another bundle is being loaded already: wait until it is served")
        self._swapping = True
        loader = Worker("pi0fm-swap")
        try:
            fresh, before = self._served(await loader.run(load)), self.now
            try:
                refuse_another_robot(fresh.policy.metadata, before.policy.metadata)
                await _warm(fresh)
            except ServingError:
                fresh.batcher.close()
                raise
            self.now = fresh
        finally:
            self._swapping = False
            loader.close()
        self._metrics.swaps.inc()
        logger.warning("serving %s instead of %s", fresh.identity, before.identity)
        await before.batcher.drain()
        before.batcher.close()


def refuse_another_robot(metadata: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise ServingError for a policy that cannot take the place of a known one."""
    differing = [name for name in SAME_AFTER_A_SWAP if metadata.get(name) != known.get(name)]
    if differing:
        raise ServingError(f"a bundle takes the place of one for the same robot, found another {', '.join(differing)}: give one for it")


def _prefix_check(policy: ServablePolicy) -> Callable[[ActionPrefix], None] | None:
    """Return the check of action prefixes, where the policy can continue them."""
    if not isinstance(policy, PrefixPolicy):
        return None
    try:
        policy.refuse_prefixes()
    except Pi0fmError as error:
        logger.warning("no real-time chunking: %s", error)
        return None
    compiled, led = getattr(getattr(policy, "sampler", None), "compile", "off"), policy.leading
    if led["compile"] != compiled:
        logger.warning(
            "chunks that go on from an action prefix are computed without --compile %s, since guidance %s cannot be compiled: time them, "
            "or serve a policy trained with --rtc.max_delay by --guidance hard_prefix, which is compiled",
            compiled,
            led["guidance"],
        )
    return policy.check_prefix


async def _warm(served: ServedPolicy) -> None:
    try:
        await served.batcher.warm_up(served.policy.observation(synthetic_observation(served.policy.metadata)))
    except ServingError:
        raise
    except Exception as error:  # any fault of a policy means that it cannot be served
        if not isinstance(error, Pi0fmError):
            logger.exception("the warm-up failed")
        raise ServingError(f"the policy failed on a synthetic observation ({type(error).__name__}: {error}): check the bundle") from error


def without_paths(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `metadata` with the last name of each absolute path in it: where things are on a machine is no client's business."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(item) for key, item in value.items()}
        return Path(value).name if isinstance(value, str) and value.startswith("/") else value

    return {key: cleaned(value) for key, value in metadata.items()}


def synthetic_observation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Make a message with black images and a zero state of the sizes in `metadata`. Raises ServingError when it has none."""
    try:
        height, width = metadata.get("image_size", WARM_UP_IMAGE_SIZE)
        message: dict[str, Any] = {key: np.zeros((height, width, 3), np.uint8) for key in metadata["cameras"].values()}
        message[metadata["state_key"]] = np.zeros(metadata["state_dim"], np.float32)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServingError(f"the metadata must name cameras, state_key and state_dim to warm up with, found fault with {error}") from None
    return {**message, "prompt": "warm up"}
