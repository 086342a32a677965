"""Checks of a cluster before a run starts there: the same versions and code on every node, and storage that all nodes share.

Owns: one task per node for each check, a line for each difference. Does not know: training, resources (runtime.py), data sets (caching.py).

    driver ── node_facts, by value ──> node A, B, ...     python, torch, pi0fm: a node without pi0fm answers too
           ── check_storage ─────────> node A, B, ...     run.json as the driver wrote it; writing a file to the checkpoint folder
"""

import runpy
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pi0fm import files
from pi0fm.cluster.nodes import node_facts
from pi0fm.train.checkpoint.storage import open_store
from pi0fm_client.errors import ClusterError, OutputError, Pi0fmError

SECONDS_FOR_AN_ANSWER = 120.0  # a node starts a process, which imports torch
WHERE = ("host", "interpreter")


def nodes_with(each: Mapping[str, float]) -> dict[str, str]:
    """Host and address by id of the live nodes on which a worker fits. each: resources of a worker."""
    import ray

    return {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in each.items())
    }


def on_each_node(
    function: Callable[..., Any], nodes: Iterable[str], *arguments: Any, seconds: float | None = SECONDS_FOR_AN_ANSWER
) -> dict[str, Any]:
    """Call `function(*arguments)` once on every node; returns its result, or the error that it raised, by node id. seconds: time limit."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, here = ray.remote(function), NodeAffinitySchedulingStrategy
    # 0 CPUs, so that it starts at once; by node id, since containers of one machine may share the host name
    running = {
        node: task.options(num_cpus=0, max_retries=1, scheduling_strategy=here(node, soft=False)).remote(*arguments) for node in nodes
    }
    found: dict[str, Any] = {}
    for node, reference in running.items():
        try:
            found[node] = ray.get(reference, timeout=seconds)
        except Exception as error:  # noqa: BLE001  Ray wraps any error of the function, and raises others
            found[node] = getattr(error, "cause", None) or error
    return found


def refuse_nodes(nodes: Mapping[str, str], output_dir: Path, checkpoint_place: Path | str) -> None:
    """Raise ClusterError for nodes whose versions or code differ from the driver's, OutputError for one without the shared storage.

    nodes: names by id. output_dir: claimed, so it holds the run's run.json.
    """
    # loaded by path: Ray sends a function by value if its module cannot be imported
    found = on_each_node(runpy.run_path(node_facts.__file__)[node_facts.node_facts.__name__], nodes)
    lines = version_differences(node_facts.node_facts(), {nodes[node]: facts for node, facts in found.items()})
    if lines:
        raise ClusterError(
            f"every node must have the same versions as this one, found {'; '.join(lines)}; install them there, or, if only the code of "
            "pi0fm differs, type --ship_code true"
        )
    seen = on_each_node(check_storage, nodes, output_dir, (output_dir / "run.json").read_bytes(), checkpoint_place)
    for node, fault in seen.items():
        if isinstance(fault, Exception):
            raise ClusterError(f"node {nodes[node]} does not answer ({last_line(fault)}); start it again, or leave it out")
        if fault is not None:
            raise OutputError(f"node {nodes[node]}: {fault}")


def version_differences(here: Mapping[str, str], there: Mapping[str, Mapping[str, str] | Exception]) -> list[str]:
    """A line for each node that differs from this one. there: facts by node name, or the error of the request."""
    lines = []
    for name, facts in there.items():
        if isinstance(facts, Exception):
            lines.append(f"on {name}: {last_line(facts)}")
            continue
        compared = {each: mine for each, mine in here.items() if each not in WHERE}
        other = [f"{each} {facts.get(each, 'missing')} (here {mine})" for each, mine in compared.items() if facts.get(each) != mine]
        if facts.get(node_facts.CODE) == "missing":
            other = [f"no pi0fm for {facts['interpreter']}", *(each for each in other if not each.startswith(node_facts.CODE))]
        if other:
            lines.append(f"on {name}: {', '.join(other)}")
    return lines


def check_storage(output_dir: Path, record: bytes, checkpoint_place: Path | str) -> str | None:
    """Check this node's storage; returns its fault in a line, or None. record: the driver's run.json."""
    name = f".seen-by-{socket.gethostname()}"
    try:
        seen = output_dir / "run.json"
        if not seen.is_file() or seen.read_bytes() != record:
            return f"{output_dir} must be on a disk that all nodes share, found another folder or none there; choose another --output_dir"
        files.make_folder(output_dir)
        if isinstance(checkpoint_place, str):  # a path is in output_dir and made by the first checkpoint
            store = open_store(checkpoint_place)
            store.write(name, [memoryview(b"1")])
            store.remove([name])
    except Pi0fmError as error:
        return str(error)
    except OSError as error:
        return f"{checkpoint_place} must be writable ({last_line(error)}); choose another --checkpoint_dir"
    return None


def last_line(error: BaseException) -> str:
    """Last line of an error's text, which in Ray's long texts names the fault."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__:.200}"
