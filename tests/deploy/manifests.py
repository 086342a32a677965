"""Rendering and validation of the manifests, without a cluster.

Owns: `render` (kubectl's own kustomize) and `problems` (one line for each field that Kubernetes or KubeRay would refuse or ignore).
Does not know: what the manifests say.
"""

import os
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
OVERLAYS = ("cpu", "gpu-1", "gpu-8", "gpu-4x8", "spot")
RAY_KINDS = ("RayJob", "RayCluster")
KUBERNETES = "1.34"
POD_TEMPLATES = (
    ("spec", "rayClusterSpec", "headGroupSpec", "template"),
    ("spec", "rayClusterSpec", "workerGroupSpecs", "template"),
    ("spec", "submitterPodTemplate"),
    ("spec", "headGroupSpec", "template"),
    ("spec", "workerGroupSpecs", "template"),
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
    if document.get("kind") not in RAY_KINDS:
        return list(_core_problems(document))
    errors = _ray_validator().iter_errors(document)
    found = [f"{each.json_path}: {each.message}" for error in errors for each in (error, *_of_its_kind(error, document["kind"]))]
    found += _definition_problems(document)
    for path in POD_TEMPLATES:
        for template in _at(document, path):
            found += _core_problems({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "of-the-job"}, "template": template})
    return found


@cache
def _ray_validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(yaml.safe_load((HERE / "ray.schema.yaml").read_text()))


def _of_its_kind(error: jsonschema.ValidationError, kind: str) -> list[jsonschema.ValidationError]:
    """What a failed choice between the kinds found wrong for the one that the object is of."""
    return [each for each in error.context or () if each.schema_path[0] == RAY_KINDS.index(kind)]


def _definition_problems(document: Document) -> Iterator[str]:
    """By KubeRay's own definitions, made strict, where KUBERAY_CRDS names their folder; nothing without."""
    if "KUBERAY_CRDS" in os.environ:
        path = Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{document['kind'].lower()}s.yaml"
        for error in jsonschema.Draft202012Validator(_definition(path)).iter_errors(document):
            yield f"{path.name}: {error.json_path}: {error.message}"


@cache
def _definition(path: Path) -> dict[str, Any]:
    versions = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return dict(_strict(schema))


def _strict(node: Any) -> Any:
    """A definition as JSON Schema in which an unknown field is an error."""
    if isinstance(node, list):
        return [_strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    found = {
        key: {name: _strict(each) for name, each in value.items()} if key == "properties" else _strict(value) for key, value in node.items()
    }
    if "properties" in node and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    if node.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
        found.pop("anyOf", None)
    elif node.get("nullable"):
        found["type"] = [node["type"], "null"]
    return found


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
