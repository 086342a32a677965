"""Starting Ray, joining it, and leaving it as it was found.

Owns: the options of `ray.init` that keep a laptop quiet and small, the environment of one-threaded workers, the check that a
request for resources can be met. Does not know: what runs on Ray.
"""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pi0fm import progress
from pi0fm_client.errors import ClusterError, ConfigError

OBJECT_STORE_BYTES = 256 * 2**20
SECONDS_BETWEEN_LOOKS = 2.0
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
SECONDS_BETWEEN_HEAD_LOOKS, SECONDS_WITHOUT_HEAD = 5.0, 30.0  # Ray ends the driver after 60
SMALLEST_OBJECT_STORE_BYTES = 80 * 2**20  # Ray refuses less than 75 MiB

# For `.options(runtime_env=ONE_THREAD)`: a worker that simulates or loads must not start one thread a core, where others run too.
ONE_THREAD: Mapping[str, Any] = {"env_vars": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}}

START_ONE = "start one with `ray start --head`, or leave the address out"
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


@contextmanager
def ray_session(
    address: str | None = None,
    num_cpus: int | None = None,
    resources: Mapping[str, float] | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    ship_code: bool = False,
) -> Iterator[None]:
    """Start or join Ray for the time of the block; stop it afterwards only if this call started it.

    A Ray that this process already initialised is used as it is. Otherwise:
    address: of a running cluster (`auto`, `HOST:PORT`, `ray://HOST:PORT`); None takes RAY_ADDRESS, and without that starts Ray here.
    num_cpus, resources: what the Ray that is started here claims to have; None means the machine's cores. Ignored when joining.
    object_store_bytes: upper bound of its shared memory, lowered to half of what /dev/shm has left. Ignored when joining.
    ship_code: send this pi0fm to the nodes of a cluster that is joined, in front of what is installed there.
    Raises ConfigError when the address does not answer, ClusterError when a Ray of its own does not start.
    """
    # Ray reads this when it is imported: without it `uv run` as driver zips the working directory and starts every worker through uv.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    given = {name: os.environ.get(name) for name in TOKEN_VARIABLES}
    try:
        if address == "local":
            _start(num_cpus, dict(resources) if resources else None, _object_store_that_fits(object_store_bytes))
        else:
            _join(address, ship_code)
        yield
    finally:
        ray.shutdown()
        _forget_token(given)


def started_here() -> tuple[psutil.Process, ...]:
    """Ray's own processes among the children of this one; none where a running cluster was joined."""
    return tuple(child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server"))


def refuse_ended(processes: Iterable[psutil.Process], advice: str = "type the same command with --resume true") -> None:
    """Raise ClusterError when one of Ray's processes has ended."""
    for process in processes:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise ClusterError(f"Ray must live as long as the run, found its process {process.pid} ended; {advice}")


class Head:
    """The process of Ray that all others register with: of a cluster that was joined, on any machine.

    Ray itself waits a minute for it and then ends the driver without a word of ours; a head that is restarted sooner goes on.
    """

    def __init__(self) -> None:
        import ray

        self._address = str(getattr(ray.get_runtime_context(), "gcs_address", ""))  # none for Ray's client
        self._answered = self._looked = time.monotonic()

    def refuse_gone(self) -> None:
        """Raise ClusterError when it has not answered for SECONDS_WITHOUT_HEAD; looks every few seconds."""
        now = time.monotonic()
        if not self._address or now - self._looked < SECONDS_BETWEEN_HEAD_LOOKS:
            return
        self._looked = now
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_BETWEEN_LOOKS).close()
            self._answered = now
        except OSError as error:
            if now - self._answered > SECONDS_WITHOUT_HEAD:
                raise ClusterError(
                    f"Ray must live as long as the run, found no answer from its head at {self._address} ({error.strerror or error}); "
                    "start it again, then type the same command with --resume true"
                ) from None


def require_resources(each: Mapping[str, float], count: int = 1) -> None:
    """Refuse what the running Ray can never give, before Ray waits for it without end.

    each: what one worker asks for, such as `{"CPU": 1, "GPU": 1}`; it must fit on one node. count: workers at the same time.
    Nodes that an autoscaler would add later are not counted. Raises ConfigError that names the resource, the need and what each node has.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    for name, amount in each.items():
        largest = max((node["Resources"].get(name, 0.0) for node in nodes), default=0.0)
        if amount > largest:
            raise ConfigError(
                f"each worker needs {amount:g} {name}, but the largest Ray node has {largest:g}; ask for less, or join a larger cluster"
            )
    room = [room_on(node["Resources"], each, most=count) for node in nodes]
    if count > sum(room):
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
        there = [
            f"{node['NodeManagerHostname']} has {', '.join(f'{node["Resources"].get(name, 0):g} {name}' for name in each)}: {number}"
            for node, number in zip(nodes, room, strict=True)
        ]
        raise ConfigError(
            f"{count} workers with {wanted} each are asked for, but Ray has room for {sum(room)} ({'; '.join(there)}), {count - sum(room)} "
            "too few; lower the number of workers, or add nodes"
        )


def room_on(node: Mapping[str, float], each: Mapping[str, float], most: int) -> int:
    """How many workers fit on a node of such resources, at most `most`."""
    return min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in each.items() if amount > 0), default=most)


def first_ready(references: Sequence[Any]) -> Any:
    """Wait for the first of `references`.

    Raises ClusterError soon after a process of the Ray that was started here has died; Ray itself waits on, without end or for a minute.
    """
    import ray

    while True:
        ready, _ = ray.wait(list(references), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        if ready:
            return ready[0]
        refuse_ended(started_here(), "type the same command again, which goes on")


def _start(num_cpus: int | None, resources: dict[str, float] | None, object_store_bytes: int) -> None:
    """Start Ray on this machine; try a second time when the first is too slow, as on a machine that is busy with something else.

    Its token is of this process alone. Ray's own would stay in the home folder, and meet every cluster that is joined later. The mode is
    left to Ray: it reads that variable when it is imported, and would send no token if it were set afterwards.
    Its workers get the processor as any other process does: at Ray's own niceness of 15 all else on the machine goes before them.
    """
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    if not any(name in os.environ for name in TOKEN_VARIABLES):
        os.environ["RAY_AUTH_TOKEN"] = uuid.uuid4().hex
    for last in (False, True):
        try:
            ray.init(
                "local", num_cpus=num_cpus, resources=resources, object_store_memory=object_store_bytes, include_dashboard=False, **_QUIET
            )
            return
        except Exception as error:  # noqa: BLE001  Ray raises a bare Exception for a node that is not up after 30 s
            ray.shutdown()
            why = " ".join(str(error).split())[:200]
            if last:
                raise ClusterError(
                    f"Ray must start on this machine, but twice did not ({why}); close other programs and try again"
                ) from None
            progress.say(f"Ray did not start ({why}); trying once more")


def _forget_token(given: Mapping[str, str | None]) -> None:
    """Leave the variables as they were, for Ray to read again: the token of a Ray that ended would meet every other of this process."""
    for name, value in given.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from ray._raylet import AuthenticationTokenLoader

    AuthenticationTokenLoader.instance().reset_cache()


def _join(address: str, ship_code: bool) -> None:
    import ray

    refuse_silent(address)
    try:
        ray.init(address, **_QUIET, **({"runtime_env": {"py_modules": _own_code()}} if ship_code else {}))
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:  # the second where a token is asked for and there is none
        reason = str(error).splitlines()[0].partition(". ")[0]
        if address == "auto":
            raise ConfigError(f"no Ray cluster answers at {address!r} ({reason}); {START_ONE}") from None
        raise ConfigError(
            f"{address!r} answers, but lets nobody join from here ({reason}); where its token is another (Ray says InvalidAuthToken), copy "
            "what `ray get-auth-token` prints there into RAY_AUTH_TOKEN here, with RAY_AUTH_MODE=token"
        ) from None


def refuse_silent(address: str | None) -> None:
    """Raise ConfigError where nothing listens at the address of a cluster, within seconds: Ray itself waits for ten minutes.

    address: as `ray_session` takes it; `auto` and `local` are left to Ray, which is not imported.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    # Ray asks this machine's own address instead of the loopback
    asked = _own_address() if host in ("localhost", "127.0.0.1") and not address.startswith("ray:") else host
    try:
        socket.create_connection((asked, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        why = f"{asked}: {error}" if asked != host else error
        raise ConfigError(f"no Ray cluster answers at {address!r} ({why}); {START_ONE}") from None


def _own_address() -> str:
    """This machine's address on its network, found as Ray finds it: nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _own_code() -> list[str]:
    """The folders of the packages that a node needs."""
    import pi0fm
    import pi0fm_client

    return [str(Path(package.__file__).parent) for package in (pi0fm, pi0fm_client) if package.__file__]


def _object_store_that_fits(wanted: int) -> int:
    """Limit the store to free shared memory: 64 MB in a plain container. A larger store falls back to a slow disk."""
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free // 2 if shared.is_dir() else wanted
    return max(SMALLEST_OBJECT_STORE_BYTES, min(wanted, free))
