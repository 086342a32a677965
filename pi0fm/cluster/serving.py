"""The policy server behind Ray Serve: the same application in several replicas, each with the policy on a separate device.

Owns: replicas, their number by the connected robots, their health. Does not know: the protocol, the application.

    robots 1, 2 ====                          ==== replica 1: application, batcher, policy
    robots 3, 4 ====  the HTTP proxy of Ray  ==== replica 2: added when `robots_per_replica` are connected to each of the others

A connection stays with its replica, and a robot's session is its connection: a request carries everything that it needs of earlier ones,
so any replica may answer a robot that connects again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette

from pi0fm.cluster.runtime import ray_session, require_resources
from pi0fm.processes import sigterm_interrupts
from pi0fm_client.errors import ClusterError, ConfigError, ServingError

NAME = "pi0fm"
SECONDS_TO_LEAVE = 10.0
Build = Callable[[], Starlette]
Fault = Callable[[Starlette], str | None]


@dataclass(frozen=True)
class Replicas:
    """Number and resources of replicas: from `least` to `most`, one added beyond `robots_per_replica` connections to each.

    each: resources of one replica, such as {"GPU": 1}.
    """

    least: int
    most: int
    robots_per_replica: int
    each: dict[str, float]


def serve_replicas(build: Build, fault: Fault, replicas: Replicas, host: str, port: int, announce: Callable[[], None]) -> None:
    """Serve the application of `build` in each replica until the process is told to end; calls `announce` when all `least` are warm.

    fault: describes an application's fault in one line, else None; a replica with a fault is restarted. Raises ClusterError if Ray Serve is
    not installed or no replica starts, ConfigError for resources that Ray does not have.
    """
    with ray_session(), sigterm_interrupts():  # inside: Ray installs a handler when it starts
        try:
            from ray import serve
        except ImportError as error:
            raise ClusterError(f"--replicas needs Ray Serve, found no {error.name}: type pip install 'ray[serve]'") from None
        require_resources({"CPU": 1, **replicas.each}, replicas.least)
        robots = {"target_ongoing_requests": replicas.robots_per_replica, "min_replicas": replicas.least, "max_replicas": replicas.most}
        deployment = serve.deployment(
            name=NAME,
            autoscaling_config={**robots, "upscale_delay_s": 5, "downscale_delay_s": 120},
            max_ongoing_requests=4 * replicas.robots_per_replica,
            graceful_shutdown_timeout_s=SECONDS_TO_LEAVE,
            ray_actor_options={"num_cpus": 1, "num_gpus": replicas.each.get("GPU", 0)},
        )(serve.ingress()(_replica_of(build, fault)))
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            serve.run(deployment.bind(), name=NAME, route_prefix="/")
            announce()
            while True:
                time.sleep(1.0)
        except KeyboardInterrupt:
            return
        except RuntimeError:
            told = serve.status().applications[NAME].deployments[NAME].message.strip().splitlines()
            why = told[-1].strip()[:300] if told else "its reason is in Ray's logs"
            raise ClusterError(f"no replica started ({why}): try pi0fm serve without --replicas") from None
        finally:
            serve.shutdown()


def refuse_single_server_options(options: Any) -> None:
    """Raise ConfigError for options of `pi0fm serve` that belong to one process and its socket."""
    for name in ("live", "log_requests", "tls_certificate", "log_format"):
        if getattr(options, name) not in (None, False, "text"):
            raise ConfigError(f"--{name} works with a single server only, found it with --replicas; leave one of the two out")


def _replica_of(build: Build, fault: Fault) -> type:
    class Replica:
        def __serve_build_asgi_app__(self) -> Starlette:
            self._served = build()
            return self._served

        def check_health(self) -> None:
            found = fault(self._served)
            if found is not None:
                raise ServingError(found)

    return Replica
