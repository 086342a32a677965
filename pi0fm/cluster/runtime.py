"""Starting Ray or joining a cluster, and shutting down only what was started.

Owns: the options of `ray.init` that keep output and memory small on a laptop, the environment of one-threaded workers, the check that
requested resources exist. Does not know: what runs on Ray.
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

# For `.options(runtime_env=ONE_THREAD)`: workers that simulate or load run side by side, so each must not start a thread per core.
ONE_THREAD: Mapping[str, Any] = {"env_vars": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}}

START_ADVICE = "start one with `ray start --head`, or leave the address out"
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


@contextmanager
def ray_session(
    address: str | None = None,
    num_cpus: int | None = None,
    resources: Mapping[str, float] | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    ship_code: bool = False,
) -> Iterator[None]:
    """Start or join Ray during the block; afterwards stop it only if this call started it.

    If this process has already initialised Ray, that Ray is used unchanged. Otherwise:
    address: of a running cluster (`auto`, `HOST:PORT`, `ray://HOST:PORT`); None takes RAY_ADDRESS, and without that starts Ray here.
    num_cpus, resources: declared resources of a Ray started here; None means the machine's cores. Ignored when joining.
    object_store_bytes: upper bound of its shared memory, lowered to half of the free space in /dev/shm. Ignored when joining.
    ship_code: send this pi0fm to the nodes of a joined cluster, with precedence over the version installed there.
    Raises ConfigError when the address does not answer, ClusterError when a local Ray does not start.
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


def local_ray_processes() -> tuple[psutil.Process, ...]:
    """Ray's processes among the children of this one; none if a running cluster was joined."""
    return tuple(child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server"))


def refuse_ended(processes: Iterable[psutil.Process], advice: str = "type the same command with --resume true") -> None:
    """Raise ClusterError when one of Ray's processes has ended."""
    for process in processes:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise ClusterError(f"Ray must live as long as the run, found its process {process.pid} ended; {advice}")


class RayHead:
    """Ray's head process, with which all others register, on any machine of a joined cluster.

    Ray waits 60 s for it and then ends the driver without a message of pi0fm; after an earlier restart of the head the run continues.
    """

    def __init__(self) -> None:
        import ray

        self._address = str(getattr(ray.get_runtime_context(), "gcs_address", ""))  # missing for Ray's client
        self._answered = self._looked = time.monotonic()

    def refuse_lost(self) -> None:
        """Raise ClusterError when the head has not answered for SECONDS_WITHOUT_HEAD; checks every few seconds."""
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
    """Refuse a request for resources that the running Ray does not have, for which Ray would wait forever.

    each: resources of one worker, such as `{"CPU": 1, "GPU": 1}`; they must fit on one node. count: workers at the same time.
    Nodes that an autoscaler would add later are not counted. Raises ConfigError with the resource, the need and what each node has.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    for name, amount in each.items():
        largest = max((node["Resources"].get(name, 0.0) for node in nodes), default=0.0)
        if amount > largest:
            raise ConfigError(
                f"each worker needs {amount:g} {name}, but the largest Ray node has {largest:g}; ask for less, or join a larger cluster"
            )
    room = [workers_that_fit(node["Resources"], each, most=count) for node in nodes]
    if count > sum(room):
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
        there = [
            f"{node['NodeManagerHostname']} has {', '.join(f'{node["Resources"].get(name, 0):g} {name}' for name in each)}: {number}"
            for node, number in zip(nodes, room, strict=True)
        ]
        raise ConfigError(
            f"{count} workers with {wanted} each are requested, but Ray has room for {sum(room)} ({'; '.join(there)}), {count - sum(room)} "
            "too few; lower the number of workers, or add nodes"
        )


def workers_that_fit(node: Mapping[str, float], each: Mapping[str, float], most: int) -> int:
    """Number of workers that fit on a node with these resources, at most `most`."""
    return min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in each.items() if amount > 0), default=most)


def first_ready(references: Sequence[Any]) -> Any:
    """Wait for the first of `references`.

    Raises ClusterError soon after a process of the Ray started here has died, where Ray would wait for a minute or forever.
    """
    import ray

    while True:
        ready, _ = ray.wait(list(references), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        if ready:
            return ready[0]
        refuse_ended(local_ray_processes(), "type the same command again, which goes on")


def _start(num_cpus: int | None, resources: dict[str, float] | None, object_store_bytes: int) -> None:
    """Start Ray on this machine; try once more if the first start times out, as on a busy machine.

    The token is valid for this process only. Ray's default token would stay in the home folder and be sent to every cluster joined later.
    RAY_AUTH_MODE is not set here: Ray reads it at import, and would send no token if it were set afterwards.
    Workers run at normal priority: with Ray's default niceness of 15 all other processes on the machine would go first.
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
    """Restore the variables and let Ray read them again, or it would send this token to the next Ray of this process."""
    for name, value in given.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from ray._raylet import AuthenticationTokenLoader

    AuthenticationTokenLoader.instance().reset_cache()


def _join(address: str, ship_code: bool) -> None:
    import ray

    refuse_unreachable(address)
    try:
        ray.init(address, **_QUIET, **({"runtime_env": {"py_modules": _package_folders()}} if ship_code else {}))
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:  # the second where a token is asked for and there is none
        reason = str(error).splitlines()[0].partition(". ")[0]
        if address == "auto":
            raise ConfigError(f"no Ray cluster answers at {address!r} ({reason}); {START_ADVICE}") from None
        raise ConfigError(
            f"{address!r} answers, but refuses this process ({reason}); if its token differs (Ray says InvalidAuthToken), copy "
            "the output of `ray get-auth-token` there into RAY_AUTH_TOKEN here, with RAY_AUTH_MODE=token"
        ) from None


def refuse_unreachable(address: str | None) -> None:
    """Raise ConfigError within seconds if nothing listens at the address of a cluster, for which Ray would wait ten minutes.

    address: as `ray_session` takes it; `auto` and `local` are not checked. Does not import Ray.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    # Ray connects to this machine's network address instead of the loopback
    asked = _network_address() if host in ("localhost", "127.0.0.1") and not address.startswith("ray:") else host
    try:
        socket.create_connection((asked, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        why = f"{asked}: {error}" if asked != host else error
        raise ConfigError(f"no Ray cluster answers at {address!r} ({why}); {START_ADVICE}") from None


def _network_address() -> str:
    """This machine's network address, determined as Ray does; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _package_folders() -> list[str]:
    """Folders of the packages that a node needs."""
    import pi0fm
    import pi0fm_client

    return [str(Path(package.__file__).parent) for package in (pi0fm, pi0fm_client) if package.__file__]


def _object_store_that_fits(wanted: int) -> int:
    """Limit the object store to half of the free shared memory, 64 MB in a plain container; a larger store would use a slow disk."""
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free // 2 if shared.is_dir() else wanted
    return max(SMALLEST_OBJECT_STORE_BYTES, min(wanted, free))
