"""Rendering and judging of the manifests, without a cluster.

Owns: `render` (kubectl's own kustomize) and `problems` (one line for each field that Kubernetes or KubeRay would refuse or ignore).
Does not know: what the manifests say.
"""

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

Document = dict[str, Any]

HERE = Path(__file__).resolve().parent
DEPLOY = HERE.parents[1] / "deploy"
OVERLAYS = ("cpu", "gpu")
KUBERNETES = "1.34"
POD_TEMPLATES = (
    ("spec", "rayClusterSpec", "headGroupSpec", "template"),
    ("spec", "rayClusterSpec", "workerGroupSpecs", "template"),
    ("spec", "submitterPodTemplate"),
)


def kubectl() -> str:
    """The kubectl that uv.lock pins, in the environment that runs the tests."""
    return str(Path(sys.executable).parent / "kubectl")


def render(folder: Path) -> list[Document]:
    """The objects that `kubectl apply -k folder` would send."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=50, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return list(yaml.safe_load_all(done.stdout))


def problems(document: Document) -> list[str]:
    """What is wrong with one object; empty when nothing is."""
    if document.get("kind") != "RayJob":
        return list(_core_problems(document))
    found = [f"{error.json_path}: {error.message}" for error in _rayjob_validator().iter_errors(document)]
    for path in POD_TEMPLATES:
        for template in _at(document, path):
            found += _core_problems({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "of-the-job"}, "template": template})
    return found


@cache
def _rayjob_validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(yaml.safe_load((HERE / "rayjob.schema.yaml").read_text()))


def _core_problems(document: Document) -> Iterator[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(str(part) for part in error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"{document.get('apiVersion')} {document.get('kind')} is no kind of Kubernetes {KUBERNETES}"


def _at(node: Any, path: tuple[str, ...]) -> Iterator[Any]:
    """Every value at `path`; a list on the way stands for all its items."""
    if isinstance(node, list):
        for item in node:
            yield from _at(item, path)
    elif not path:
        yield node
    elif isinstance(node, dict) and path[0] in node:
        yield from _at(node[path[0]], path[1:])
