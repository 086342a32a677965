"""Building the frame cache on every node of a Ray cluster before the workers open it.

Owns: one task per node, and its faults. Does not know: how a cache is built; a node that shares its disk with another finds it built.

    driver ── task on node A ──> open_cache of every data set of the run: all cores of A decode, under A's lock
           ── task on node B ──> the same on B
           <── seconds and digests of each, or the line of the first fault, with its node ──
Workers open the cache themselves, so a run without this step gives the same result: the first worker of each node then builds the cache
while the others wait.
"""

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pi0fm.cluster.nodes.preflight import last_line, nodes_with, on_each_node
from pi0fm.cluster.runtime import ray_session
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import MixtureEntry
from pi0fm.data.pictures.frame_cache import cache_bytes, open_cache
from pi0fm.data.pictures.resizing import ANTIALIAS, Resize
from pi0fm.train.checkpoint.facts import columns_digest
from pi0fm_client.errors import ClusterError, DatasetError, Pi0fmError


def cache_everywhere(
    entries: Sequence[MixtureEntry],
    size: int,
    ray_address: str | None = None,
    needs: Mapping[str, float] = MappingProxyType({}),
    resize: Resize = ANTIALIAS,
) -> dict[str, float]:
    """Build the caches of all data sets of a run on every live node; returns the seconds by node id. Paths must be absolute.

    needs: resources of a worker; a node with less, such as a head without CPUs, is skipped: it does not train and may not see the data.
    A data set larger than its `cache_limit_gib` is streamed and gets no cache. Raises the errors of `open_source` and `open_cache`.
    """
    with ray_session(ray_address):
        names = nodes_with(needs)
        found = on_each_node(build, names, list(entries), size, resize, seconds=None)
    for node, error in found.items():
        if isinstance(error, Pi0fmError):
            raise type(error)(f"{error} (on node {names[node]})")
        if isinstance(error, Exception):
            raise ClusterError(f"every node must prepare the data, found {type(error).__name__} on node {names[node]}: {last_line(error)}")
    for number, entry in enumerate(entries):
        read = {names[node]: digests[number] for node, (_, digests) in found.items()}
        if len(set(read.values())) > 1:
            each = ", ".join(f"{name} has {digest:.8}" for name, digest in read.items())
            raise DatasetError(f"all nodes must read the same data set, found several at {entry.dataset.root}: {each}; copy it again")
    return {node: seconds for node, (seconds, _) in found.items()}


def build(entries: Sequence[MixtureEntry], size: int, resize: Resize = ANTIALIAS) -> tuple[float, list[str]]:
    """Build the caches on this node; returns the seconds, and a digest of each data set as this node reads it."""
    began = time.perf_counter()
    digests = []
    for entry in entries:
        source, dataset = open_source(entry.dataset, entry.embodiment, entry.selection()), entry.dataset
        digests.append(columns_digest(source))
        if cache_bytes(source, size, dataset.cache_format) <= dataset.cache_limit_gib * 2**30:
            open_cache(source, dataset, size, dataset.cache_format, resize)
    return time.perf_counter() - began, digests
