"""The frame cache on every node of a Ray cluster, before workers ask for it.

Owns: one task a node, and its faults. Does not know: how a cache is built; a node that shares its disk with another finds it built.

    driver ── task on node A ──> open_cache of every data set of the run: all cores of A decode, under A's lock
           ── task on node B ──> the same on B
           <── seconds of each, or the line of the first fault ──
Workers open the cache themselves, so a run without this is as right: the first worker of each node then builds while the others wait.
"""

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pi0fm.cluster.runtime import ray_session
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.loading.mixture import MixtureEntry
from pi0fm.data.pictures.frame_cache import cache_bytes, open_cache
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize
from pi0fm_client.errors import Pi0fmError


def cache_everywhere(
    entries: Sequence[MixtureEntry],
    size: int,
    ray_address: str | None = None,
    needs: Mapping[str, float] = MappingProxyType({}),
    resize: Resize = ANTIALIAS,
) -> dict[str, float]:
    """Build the caches of all data sets of a run on every node that is alive; by node id, the seconds that it took. Paths must be absolute.

    needs: resources of a worker; a node that has less, such as a head without CPUs, trains nothing and may not even see the data.
    A data set beyond its `cache_limit_gib` is streamed, so nothing is built for it. Raises what `open_source` and `open_cache` do.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with ray_session(ray_address):
        nodes = [
            node for node in ray.nodes() if node["Alive"] and all(node["Resources"].get(name, 0) >= each for name, each in needs.items())
        ]
        task = ray.remote(build)
        running = {
            node["NodeID"]: task.options(  # containers of one machine may share its name
                # a task of no CPU starts at once: it is not it that works, but the programs it starts
                num_cpus=0,
                max_retries=1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(list(entries), size, resize)
            for node in nodes
        }
        try:
            return {name: ray.get(reference) for name, reference in running.items()}
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Pi0fmError):
                raise error.cause from None
            raise


def build(entries: Sequence[MixtureEntry], size: int, resize: Resize = ANTIALIAS) -> float:
    """What a node does; the seconds that it took."""
    began = time.perf_counter()
    for entry in entries:
        source, dataset = open_source(entry.dataset, entry.embodiment, entry.selection()), entry.dataset
        if cache_bytes(source, size, dataset.cache_format) <= dataset.cache_limit_gib * 2**30:
            open_cache(source, dataset, size, dataset.cache_format, resize)
    return time.perf_counter() - began
