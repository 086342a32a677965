"""Tests that everything renders to valid objects, that a misspelt field is found, and that each job fits its pods."""

import copy
import json
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
from pi0fm.cli.main import find, main
from pi0fm.serve.server import SECONDS_TO_DRAIN
from pi0fm.train.start.output import claim

RAYJOB = "RayJob"


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> tuple[str, dict[str, Document]]:
    documents = render(DEPLOY / "kuberay" / "overlays" / request.param)
    return request.param, {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def rendered() -> dict[str, Document]:
    """An object of each kind: the job on CPUs, the cluster that stays, the servers."""
    places = (DEPLOY / "serve", DEPLOY / "kuberay" / "cluster", DEPLOY / "kuberay" / "overlays" / "cpu")
    return {document["kind"]: document for place in places for document in render(place)}


def groups(job: Document) -> tuple[Document, Document]:
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


def test_every_rendered_object_is_valid(overlay: tuple[str, dict[str, Document]]) -> None:
    _, documents = overlay
    assert set(documents) == {"ConfigMap", "NetworkPolicy", "PersistentVolumeClaim", RAYJOB}
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
        ("RayCluster", ["spec", "autoscalerOptions", "idleTimeoutSeconds"], "idleTimeout"),
        ("RayCluster", ["spec", "workerGroupSpecs", 0, "maxReplicas"], "maxReplica"),
        ("RayCluster", ["spec", "headGroupSpec", "template", "spec", "containers", 0, "envFrom"], "envfrom"),
        ("NetworkPolicy", ["spec", "ingress"], "ingres"),
        ("Deployment", ["spec", "template", "spec", "containers", 0, "livenessProbe"], "liveness"),
        ("PodDisruptionBudget", ["spec", "minAvailable"], "minavailable"),
        ("Service", ["spec", "ports"], "port"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misspelt_field_is_seen(rendered: dict[str, Document], kind: str, path: list[Any], wrong: str) -> None:
    document = copy.deepcopy(rendered[kind])
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
def test_a_value_of_the_wrong_kind_is_seen(rendered: dict[str, Document], path: list[Any], value: Any) -> None:
    document = copy.deepcopy(rendered[RAYJOB])
    node = document
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    assert problems(document) != []


def test_a_kind_that_nobody_knows_is_seen() -> None:
    assert problems({"apiVersion": "v1", "kind": "Pode"}) == ["v1 Pode is no kind of Kubernetes 1.34"]


def test_a_patch_that_hits_nothing_stops_the_rendering(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kuberay", tmp_path / "kuberay")
    patch = tmp_path / "kuberay" / "overlays" / "gpu-8" / "size.yaml"
    patch.write_text(patch.read_text().replace("workerGroupSpecs/0", "workerGroupSpecs/1", 1))
    with pytest.raises(ValueError, match="workerGroupSpecs"):
        render(patch.parent)


def test_the_cluster_and_the_servers_are_valid(rendered: dict[str, Document]) -> None:
    assert {kind: problems(document) for kind, document in rendered.items()} == {kind: [] for kind in rendered}
    assert len(rendered) == 8


def test_a_bucket_takes_the_place_of_the_volume_for_checkpoints(tmp_path: Path) -> None:
    """The README's overlay for S3, as it is printed there."""
    shutil.copytree(DEPLOY / "kuberay", tmp_path / "kuberay")
    (text,) = re.findall(r"```yaml\n(apiVersion: kustomize.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    place = tmp_path / "kuberay" / "overlays" / "mine"
    place.mkdir()
    (place / "kustomization.yaml").write_text(text)
    job = next(document for document in render(place) if document["kind"] == RAYJOB)
    assert problems(job) == []
    assert "--checkpoint_dir s3://" in job["spec"]["entrypoint"]
    for group in groups(job):
        assert {"secretRef": {"name": "pi0fm-s3"}} in group["template"]["spec"]["containers"][0]["envFrom"]


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
    module = find((command,))
    return command, options.parse(module.Options, rest, module.ALIASES)


def test_the_entrypoint_is_a_command_line_that_decodes(overlay: tuple[str, dict[str, Document]], tmp_path: Path, repository: Path) -> None:
    name, documents = overlay
    command, config = decoded(entrypoint(documents[RAYJOB], tmp_path, repository))
    assert command == "train"
    run, data = ("quickstart", "quickstart") if name == "cpu" else ("pi0-libero", "libero")
    assert config.dataset.root == tmp_path / "data" / "datasets" / data
    assert config.output_dir == tmp_path / "data" / "runs" / run
    assert config.pretrained == (None if name == "cpu" else tmp_path / "data" / "bundles" / "pi0_base")


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


def test_the_workers_are_as_many_as_the_pods_have_room_for(
    overlay: tuple[str, dict[str, Document]], tmp_path: Path, repository: Path
) -> None:
    name, documents = overlay
    head, group = groups(documents[RAYJOB])
    _, config = decoded(entrypoint(documents[RAYJOB], tmp_path, repository))
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    each = 1 if name == "cpu" else limits["nvidia.com/gpu"]
    assert config.workers == (group["minReplicas"] * each, group["maxReplicas"] * each)
    assert each * config.cpus_per_worker <= int(limits["cpu"]) < (each + 1) * config.cpus_per_worker
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    elastic = group["minReplicas"] < group["maxReplicas"]
    assert documents[RAYJOB]["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False) is elastic
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_only_the_overlays_for_gpus_ask_for_gpus(overlay: tuple[str, dict[str, Document]], repository: Path) -> None:
    name, documents = overlay
    head, workers = groups(documents[RAYJOB])
    (worker,) = workers["template"]["spec"]["containers"]
    (ray_head,) = head["template"]["spec"]["containers"]
    expected = {"cpu": None, "gpu-1": 1}.get(name, 8)
    assert worker["resources"]["limits"].get("nvidia.com/gpu") == worker["resources"]["requests"].get("nvidia.com/gpu") == expected
    assert "nvidia.com/gpu" not in ray_head["resources"]["limits"]
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert worker["image"] == ray_head["image"] == f"pi0fm:{version}-{'cpu' if name == 'cpu' else 'cuda'}"


def test_spot_workers_may_be_taken_and_the_head_may_not() -> None:
    job = next(document for document in render(DEPLOY / "kuberay" / "overlays" / "spot") if document["kind"] == RAYJOB)
    head, workers = (group["template"]["spec"] for group in groups(job))
    terms = workers["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(terms) == 4 and workers["terminationGracePeriodSeconds"] == 120
    assert "affinity" not in head and "tolerations" not in head
    assert "--max_failures 100" in job["spec"]["entrypoint"]


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


def test_the_recording_fills_the_data_set_that_training_reads(rendered: dict[str, Document]) -> None:
    job = rendered[RAYJOB]
    (recorder,) = groups(job)[0]["template"]["spec"]["initContainers"]
    command, recording = decoded(recorder["command"])
    words = shlex.split(job["spec"]["entrypoint"])
    assert (command, recording.episodes) == ("demos", 50)
    assert recording.num_workers <= int(recorder["resources"]["limits"]["cpu"])
    assert recording.dataset.repo_id == words[words.index("--dataset.repo_id") + 1]
    assert recording.dataset.root == words[words.index("--dataset.root") + 1]


def test_the_server_answers_its_probes_and_one_always_stays(rendered: dict[str, Document], tmp_path: Path) -> None:
    pod = rendered["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, config = decoded(["pi0fm", *container["args"]])
    assert (command, config.host, config.port) == ("serve", "0.0.0.0", container["ports"][0]["containerPort"])
    probes = [container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
    assert all(probe["httpGet"] == {"path": "/healthz", "port": container["ports"][0]["name"]} for probe in probes)
    assert probes[2]["periodSeconds"] * probes[2]["failureThreshold"] > config.stall_seconds
    assert pod["terminationGracePeriodSeconds"] > SECONDS_TO_DRAIN
    labels = rendered["Deployment"]["spec"]["selector"]["matchLabels"]
    policy = next(document for document in render(DEPLOY / "serve") if document["kind"] == "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == labels, "an empty selector would shut every pod of the namespace"
    assert rendered["Service"]["spec"]["selector"] == rendered["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert rendered["PodDisruptionBudget"]["spec"]["minAvailable"] < rendered["Deployment"]["spec"]["replicas"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True and pod["securityContext"]["runAsNonRoot"] is True


def test_the_readme_names_what_exists(repository: Path) -> None:
    text = (DEPLOY / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"`((?:kubectl|docker|sbatch|pi0fm|PI0FM_TOKEN=\S+ docker) [^`]+)`", text)]
    folders = {words[words.index("-k") + 1] for words in commands if "-k" in words}
    files = {words[words.index("-f") + 1] for words in commands if "docker" in words and "-f" in words}
    scripts = {words[1] for words in commands if words[0] == "sbatch"}
    assert folders >= {f"deploy/kuberay/overlays/{name}" for name in OVERLAYS} | {"deploy/kuberay/cluster", "deploy/serve"}
    assert files == {"deploy/Dockerfile.cpu", "deploy/Dockerfile.cuda", "deploy/compose.yaml"}
    assert scripts == {"deploy/slurm/train.sbatch"}
    assert [name for name in folders | files | scripts if not (repository / name).exists()] == []


def test_the_readme_predicts_what_the_plan_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows `... | `pi0fm plan ...` | hours | $ |`."""
    rows = re.findall(r"\| `(pi0fm plan [^`]+)` \| ([\d.]+) \| ([\d.]+) \|$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 4
    for command, hours, cost in rows:
        assert main(shlex.split(command)[1:]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (f"{found['hours']:.1f}", f"{found['cost']:.0f}") == (hours, cost), command
        assert found["fits"]
