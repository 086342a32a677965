"""A server's counts, in Prometheus' text form at /metrics.

Owns: the names of the numbers. Does not know: when they change. Nothing of a request's content is in them.
"""

from collections.abc import Mapping
from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

SPREADS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0)


@final
class Metrics:
    """The numbers of one server.

    stage: `read` in the door, `wait` in the queue, `infer` of a batch, `total` from a frame's arrival to its reply.
    robots: by the names of pi0fm_client.wire.COUNTS, as the executors report them.
    refused: by why: key, origin, path, full, unavailable, observation, deadline, newer, busy, stuck, stopping, internal.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.stage = Histogram("pi0fm_stage_seconds", "Seconds of a request by stage", ["stage"], buckets=SECONDS, registry=registry)
        self.batch_size = Histogram("pi0fm_batch_size", "Requests in an inference", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.refused = Counter("pi0fm_refused", "Requests and connections that were refused", ["why"], registry=registry)
        self.late = Counter("pi0fm_late_answers", "Answers after their deadline", registry=registry)
        self.robots = Counter("pi0fm_robot_events", "Counts by robots: steps, standstills, clamps, ...", ["what"], registry=registry)
        self.uncertainty = Histogram("pi0fm_uncertainty", "Spread of an answer's velocities", buckets=SPREADS, registry=registry)
        self.alarms = Counter("pi0fm_alarms", "Answers whose uncertainty is an alarm of the calibrated bundle", registry=registry)
        self.gpu_memory = Gauge("pi0fm_gpu_memory_bytes", "Memory that the process holds on the policy's GPU", registry=registry)
        self.swaps = Counter("pi0fm_swaps", "Bundles that replaced another", registry=registry)
        self.connections = Gauge("pi0fm_connections", "Robots that are connected", registry=registry)
        self.waiting = Gauge("pi0fm_waiting", "Requests in the queue", registry=registry)
        self.unlogged = Gauge("pi0fm_unlogged_batches", "Batches that the log of requests had no time for", registry=registry)

    def count_scores(self, scores: Mapping[str, float]) -> None:
        """Count how sure an answer was, where its policy says so."""
        if "spread" in scores:
            self.uncertainty.observe(scores["spread"])
        if scores.get("alarm"):
            self.alarms.inc()

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self.registry)
