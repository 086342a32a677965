"""Both overlays render to objects that Kubernetes and KubeRay take, and a misspelt field would be seen."""

import copy
import importlib
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import DEPLOY, OVERLAYS, Document, problems, render

from pi0fm import options
from pi0fm.train.start.output import claim

RAYJOB = "RayJob"


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> tuple[str, dict[str, Document]]:
    documents = render(DEPLOY / "kuberay" / "overlays" / request.param)
    return request.param, {document["kind"]: document for document in documents}


def groups(job: Document) -> tuple[Document, Document]:
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def test_every_rendered_object_is_valid(overlay: tuple[str, dict[str, Document]]) -> None:
    _, documents = overlay
    assert set(documents) == {"ConfigMap", "PersistentVolumeClaim", RAYJOB}
    assert {kind: problems(document) for kind, document in documents.items()} == {kind: [] for kind in documents}


def rename(path: list[Any], wrong: str) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for step in path[:-1]:
            document = document[step]
        document[wrong] = document.pop(path[-1])

    return change


CLUSTER = ["spec", "rayClusterSpec"]
HEAD_POD = [*CLUSTER, "headGroupSpec", "template", "spec"]
WORKER = [*CLUSTER, "workerGroupSpecs", 0]


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        (RAYJOB, ["apiVersion"], "apiversion"),
        (RAYJOB, ["spec", "backoffLimit"], "backofLimit"),
        (RAYJOB, [*CLUSTER, "rayVersion"], "rayversion"),
        (RAYJOB, [*CLUSTER, "headGroupSpec"], "headGroup"),
        (RAYJOB, [*WORKER, "minReplicas"], "minReplica"),
        (RAYJOB, [*HEAD_POD, "containers", 0, "envFrom"], "envfrom"),
        (RAYJOB, [*HEAD_POD, "initContainers", 0, "command"], "comand"),
        (RAYJOB, [*HEAD_POD, "volumes", 1, "emptyDir", "sizeLimit"], "size"),
        (RAYJOB, [*WORKER, "template", "spec", "containers", 0, "resources", "limits"], "limit"),
        (RAYJOB, [*WORKER, "template", "spec", "securityContext", "fsGroup"], "fsgroup"),
        ("PersistentVolumeClaim", ["spec", "accessModes"], "accessMode"),
        ("ConfigMap", ["data"], "dat"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misspelt_field_is_seen(overlay: tuple[str, dict[str, Document]], kind: str, path: list[Any], wrong: str) -> None:
    document = copy.deepcopy(overlay[1][kind])
    rename(path, wrong)(document)
    assert any(wrong in line or path[-1] in line for line in problems(document))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "backoffLimit"], "3"),
        (["spec", "shutdownAfterJobFinishes"], False),
        (["spec", "submissionMode"], "K8SJobMode"),
        ([*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        ([*CLUSTER, "authOptions", "mode"], "none"),
        ([*WORKER, "replicas"], 1.5),
        ([*HEAD_POD, "containers"], []),
        ([*HEAD_POD, "containers", 0, "ports", 0, "containerPort"], "gcs"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_seen(overlay: tuple[str, dict[str, Document]], path: list[Any], value: Any) -> None:
    document = copy.deepcopy(overlay[1][RAYJOB])
    node = document
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    assert problems(document) != []


def test_a_kind_that_nobody_knows_is_seen() -> None:
    assert problems({"apiVersion": "v1", "kind": "Pode"}) == ["v1 Pode is no kind of Kubernetes 1.34"]


def test_a_patch_that_hits_nothing_stops_the_rendering(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kuberay", tmp_path / "kuberay")
    patch = tmp_path / "kuberay" / "overlays" / "gpu" / "worker-group.yaml"
    patch.write_text(patch.read_text().replace("workerGroupSpecs/0", "workerGroupSpecs/1", 1))
    with pytest.raises(ValueError, match="workerGroupSpecs"):
        render(patch.parent)


def entrypoint(job: Document, folder: Path, repository: Path) -> list[str]:
    """The words that the job's shell hands to pi0fm, with /data at `folder`/data and /app at the repository."""
    program = folder / "bin" / "pi0fm"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\nfor word in pi0fm "$@"; do echo "$word"; done\n')
    program.chmod(0o755)
    words = [
        word.replace("/data/", f"{folder}/data/").replace("/app/", f"{repository}/") for word in shlex.split(job["spec"]["entrypoint"])
    ]
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=50, check=True).stdout.splitlines()


def decoded(words: list[str]) -> tuple[str, Any]:
    """(command, its options) of a `pi0fm ...` command line."""
    program, command, *rest = words
    assert program == "pi0fm"
    module = importlib.import_module(f"pi0fm.cli.{command}")
    return command, options.parse(module.Options, rest, module.ALIASES)


def test_the_entrypoint_is_a_command_line_that_decodes(overlay: tuple[str, dict[str, Document]], tmp_path: Path, repository: Path) -> None:
    command, config = decoded(entrypoint(overlay[1][RAYJOB], tmp_path, repository))
    assert command == "train"
    assert config.dataset.root == tmp_path / "data" / "datasets" / "quickstart"
    assert config.output_dir == tmp_path / "data" / "runs" / "quickstart"
    assert config.steps == options.read_yaml(repository / "configs" / "quickstart.yaml")["steps"]


def test_a_retry_goes_on_with_the_run_of_the_first_attempt(
    overlay: tuple[str, dict[str, Document]], tmp_path: Path, repository: Path
) -> None:
    job = overlay[1][RAYJOB]
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    _, first = decoded(entrypoint(job, tmp_path, repository))
    assert first.resume == "auto"
    claim(first)
    _, second = decoded(entrypoint(job, tmp_path, repository))
    assert second == first
    claim(second)  # raises if the retry were another run


def test_every_worker_pod_is_one_training_worker(overlay: tuple[str, dict[str, Document]], tmp_path: Path, repository: Path) -> None:
    job = overlay[1][RAYJOB]
    head, workers = groups(job)
    _, config = decoded(entrypoint(job, tmp_path, repository))
    (container,) = workers["template"]["spec"]["containers"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == config.num_workers
    assert config.num_workers * config.cpus_per_worker <= workers["replicas"] * int(container["resources"]["limits"]["cpu"])
    assert 2 * config.cpus_per_worker > int(container["resources"]["limits"]["cpu"]) or "nvidia.com/gpu" in container["resources"]["limits"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_only_the_gpu_overlay_asks_for_gpus(overlay: tuple[str, dict[str, Document]]) -> None:
    name, documents = overlay
    head, workers = groups(documents[RAYJOB])
    (worker,) = workers["template"]["spec"]["containers"]
    (ray_head,) = head["template"]["spec"]["containers"]
    expected = 1 if name == "gpu" else None
    assert worker["resources"]["limits"].get("nvidia.com/gpu") == expected
    assert worker["resources"]["requests"].get("nvidia.com/gpu") == expected
    assert "nvidia.com/gpu" not in ray_head["resources"]["limits"]
    assert worker["image"] == ray_head["image"] == f"pi0fm:0.1.0-{'cuda' if name == 'gpu' else 'cpu'}"


def test_every_container_finds_its_volumes_and_settings(overlay: tuple[str, dict[str, Document]]) -> None:
    documents = overlay[1]
    for group in groups(documents[RAYJOB]):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == documents["PersistentVolumeClaim"]["metadata"]["name"]
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {"/data": "data", "/dev/shm": "shared-memory"}
            assert container["envFrom"] == [{"configMapRef": {"name": documents["ConfigMap"]["metadata"]["name"]}}]


def test_ray_is_the_version_of_the_lock(overlay: tuple[str, dict[str, Document]], repository: Path) -> None:
    lock = tomllib.loads((repository / "uv.lock").read_text())
    (locked,) = [package["version"] for package in lock["package"] if package["name"] == "ray"]
    assert overlay[1][RAYJOB]["spec"]["rayClusterSpec"]["rayVersion"] == locked


def test_the_recording_fills_the_data_set_that_training_reads(overlay: tuple[str, dict[str, Document]]) -> None:
    job = overlay[1][RAYJOB]
    (recorder,) = groups(job)[0]["template"]["spec"]["initContainers"]
    command, recording = decoded(recorder["command"])
    words = shlex.split(job["spec"]["entrypoint"])
    assert (command, recording.episodes) == ("demos", 50)
    assert recording.num_workers <= int(recorder["resources"]["limits"]["cpu"])
    assert recording.dataset.repo_id == words[words.index("--dataset.repo_id") + 1]
    assert recording.dataset.root == words[words.index("--dataset.root") + 1]


def test_the_readme_names_what_exists(repository: Path) -> None:
    text = (DEPLOY / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"\| `([^`]+)` \|", text)]
    folders = [words[words.index("-k") + 1] for words in commands if "-k" in words]
    files = [words[words.index("-f") + 1] for words in commands if "-f" in words]
    assert sorted(folders) == [f"deploy/kuberay/overlays/{name}" for name in OVERLAYS]
    assert sorted(files) == ["deploy/Dockerfile.cpu", "deploy/Dockerfile.cuda"]
    assert all((repository / name).exists() for name in folders + files)
    (serving,) = [words for words in commands if "serve" in words]
    command, config = decoded(["pi0fm", *serving[serving.index("serve") :]])
    assert (command, str(config.bundle), config.host) == ("serve", "/bundle", "0.0.0.0")
