"""Several Ray nodes on this machine that can be killed, added and drained.

Owns: their processes. Does not know: what runs there.

    head, no CPU    | drivers, Ray Train's controller        stands for a machine that stays
    node 0, 1, ...  | one worker each                        stand for machines that join and leave
"""

import signal
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, final

import psutil

from pi0fm.cluster.runtime import SMALLEST_OBJECT_STORE_BYTES
from pi0fm_client.errors import ClusterError

# A node that does not answer for 3 s counts as lost; Ray's defaults are 5 checks of 3 s each.
QUICK_TO_NOTICE = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "health_check_timeout_ms": 3000}


@final
class LocalNodes:
    """Cluster of `count` nodes and a head: `with LocalNodes(2) as nodes: ... nodes.address ...`, only in the main thread.

    cpus: CPUs of each node; the head has none. environments: variables of the first nodes.
    """

    def __init__(self, count: int, cpus: int = 1, environments: tuple[dict[str, str], ...] = ()) -> None:
        from ray.cluster_utils import Cluster

        self._cpus, self._store = cpus, SMALLEST_OBJECT_STORE_BYTES
        head = {"num_cpus": 0, "object_store_memory": self._store, "_system_config": QUICK_TO_NOTICE}
        try:
            self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        except Exception as error:  # noqa: BLE001  Ray raises a bare Exception for a node that is not up after 30 s
            why = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"Ray must start on this machine, found that it did not ({why}); close other programs and try again"
            ) from None
        try:
            self.ids = [self.add(environments[number] if number < len(environments) else None) for number in range(count)]
        except BaseException:
            self._cluster.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        """Address for `--ray_address`."""
        return str(self._cluster.address)

    @property
    def alive(self) -> list[str]:
        """Ids of the live nodes, without the head."""
        return [node.node_id for node in self._cluster.worker_nodes if all(process.is_running() for process in _raylets(node))]

    def add(self, environment: dict[str, str] | None = None) -> str:
        """Start a node and return its id. environment: variables of its processes."""
        more = {"env_vars": environment} if environment else {}
        return str(self._cluster.add_node(num_cpus=self._cpus, object_store_memory=self._store, **more).node_id)

    def kill(self, node_id: str) -> None:
        """Kill a node as a power failure does: its raylet and the raylet's processes."""
        node = self._node(node_id)
        family = [child for raylet in _raylets(node) for child in (*raylet.children(recursive=True), raylet)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """Kill the head; the other nodes end soon after."""
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def drain(self, node_id: str, seconds: float) -> None:
        """Announce the preemption of a node in `seconds`, as a cloud does for a spot machine."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason, deadline = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int(1000 * (time.time() + seconds))
        GcsClient(address=self.address).drain_node(node_id, reason, "announced to go", deadline)

    def _node(self, node_id: str) -> Any:
        return next(node for node in self._cluster.worker_nodes if node.node_id == node_id)


def _raylets(node: Any) -> list[psutil.Process]:
    found = []
    for info in node.all_processes.get("raylet", []):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(info.process.pid))
    return found
