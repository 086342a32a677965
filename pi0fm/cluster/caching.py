"""The frame cache on every node of a Ray cluster, before workers ask for it.

Owns: one task a node, and its faults. Does not know: how a cache is built; a node that shares its disk with another finds it built.

    driver ── task on node A ──> open_cache: all cores of A decode, under A's lock
           ── task on node B ──> the same on B
           <── seconds of each, or the line of the first fault ──
Workers open the cache themselves, so a run without this is as right: the first worker of each node then builds while the others wait.
"""

import time

from pi0fm.cluster.runtime import ray_session
from pi0fm.data.embodiment import Embodiment
from pi0fm.data.frame_cache import cache_bytes, open_cache
from pi0fm.data.lerobot_source import DatasetConfig, open_source
from pi0fm.data.shards import CacheFormat
from pi0fm.errors import Pi0fmError


def cache_everywhere(
    dataset: DatasetConfig, embodiment: Embodiment, size: int, form: CacheFormat = "uint8", ray_address: str | None = None
) -> dict[str, float]:
    """Build the cache on every node that is alive; by node, the seconds that it took. Paths of `dataset` must be absolute.

    A data set beyond `dataset.cache_limit_gib` is streamed, so nothing is built for it. Raises what `open_source` and `open_cache` do.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with ray_session(ray_address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        task = ray.remote(build)
        running = {
            node["NodeManagerHostname"]: task.options(
                # a task of no CPU starts at once: it is not it that works, but the programs it starts
                num_cpus=0,
                max_retries=1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(dataset, embodiment, size, form)
            for node in nodes
        }
        try:
            return {name: ray.get(reference) for name, reference in running.items()}
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Pi0fmError):
                raise error.cause from None
            raise


def build(dataset: DatasetConfig, embodiment: Embodiment, size: int, form: CacheFormat) -> float:
    """What a node does; the seconds that it took."""
    began = time.perf_counter()
    source = open_source(dataset, embodiment)
    if cache_bytes(source, size, form) <= dataset.cache_limit_gib * 2**30:
        open_cache(source, dataset, size, form)
    return time.perf_counter() - began
