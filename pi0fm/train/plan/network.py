"""Seconds of the collectives that exchange gradients and weights between workers.

Owns: rings over links inside and between machines. Does not know: what is sent, how much of it overlaps with computation.

    one machine         every worker sends at `inside`
    several machines    a ring enters and leaves each machine once, over the machine's network; concurrent rings share it

    gather, scatter of S bytes over n workers    (n - 1) / n S / rate  +  latency log2 n
    reduce (scatter, then gather)                twice that
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Workers of one collective: their number, their machines, and the number of such groups that share a machine's network at once."""

    workers: int
    machines: int
    sharing: int = 1


@dataclass(frozen=True)
class Network:
    """The links of a cluster.

    inside: bytes per second from a worker to those of its machine; between: from a machine to the others, each way; latency: seconds for
    each doubling of the workers; per_machine: workers of a full machine; scatter_times, reduce_times: their time over that of a gather, 1
    and 2 with nccl's rings; measured for gloo.
    """

    inside: float
    between: float
    latency: float
    per_machine: int
    scatter_times: float = 1.0
    reduce_times: float = 2.0

    def group(self, workers: int, replicas: int = 1) -> Group:
        """Return the group that holds one state, where `workers` hold `replicas` of it in rank order."""
        each = workers // replicas
        return Group(each, math.ceil(each / self.per_machine), max(1, min(workers, self.per_machine) // each))

    def across(self, workers: int, replicas: int) -> Group:
        """Return the group that holds the same rows, one worker of each replica."""
        each = workers // replicas
        together = max(1, self.per_machine // each)  # replicas on one machine
        return Group(replicas, math.ceil(replicas / together), min(each, self.per_machine))

    def gather(self, group: Group, size: float, calls: int = 1) -> float:
        """Return the seconds until every worker has all of `size` bytes, of which each held a part."""
        if group.workers == 1:
            return 0.0
        rate = self.inside if group.machines == 1 else min(self.inside, self.between / group.sharing)
        moved = (group.workers - 1) / group.workers * size / rate
        return moved + calls * self.latency * math.log2(group.workers)

    def scatter(self, group: Group, size: float, calls: int = 1) -> float:
        """Return the seconds until every worker has its part of the sum over workers."""
        return self.scatter_times * self.gather(group, size, calls)

    def reduce(self, group: Group, size: float, calls: int = 1) -> float:
        """Return the seconds until every worker has the whole sum over workers."""
        return self.reduce_times * self.gather(group, size, calls)
