"""Dockerfiles and shell scripts through their linters; compose.yaml by its specification; the Slurm script on a stub of Slurm."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from manifests import DEPLOY

SBATCH = DEPLOY / "slurm" / "train.sbatch"
PIN = DEPLOY / "pin"
SRUN = """#!/usr/bin/env bash
# Starts its command once for each task, and hands SIGTERM on to all, as srun does.
shift # --kill-on-bad-exit=1
pids=()
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_NODEID=$task "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    if [ "$code" -gt 128 ] && kill -0 "$pid" 2>/dev/null; then code=0; wait "$pid" || code=$?; fi
    [ "$code" -eq 0 ] || worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$CALLS"
case "$1" in show) echo localhost ;; esac
"""


def linter(name: str) -> str:
    found = Path(sys.executable).parent / name
    if not found.exists():
        pytest.skip(f"{name} is not installed beside this Python")
    return str(found)


def test_dockerfiles_are_linted() -> None:
    done = subprocess.run([linter("hadolint"), *DEPLOY.glob("Dockerfile.*")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_images_are_pinned_by_what_their_registries_answer(tmp_path: Path) -> None:
    """With docker's part played by its recorded answer; a registry that does not answer leaves both files as they were."""
    files = [tmp_path / name for name in ("pin", "Dockerfile.cpu", "Dockerfile.cuda")]
    for path in files:
        path.write_bytes((DEPLOY / path.name).read_bytes())
        path.chmod(0o755)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()

    def pinned(digests: dict[str, str]) -> subprocess.CompletedProcess[str]:
        answers = "".join(f"{image}) echo {digest} ;;\n" for image, digest in digests.items())
        asked = '[ "$*" = "buildx imagetools inspect --format {{.Manifest.Digest}} ${!#}" ] || exit 9\n'
        docker.write_text(f'#!/usr/bin/env bash\n{asked}case "${{!#}}" in\n{answers}*) exit 1 ;;\nesac\n')
        docker.chmod(0o755)
        environment = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"}
        return subprocess.run([str(files[0])], env=environment, capture_output=True, text=True, check=False)

    before = [path.read_text() for path in files[1:]]
    images = sorted(set(re.findall(r"^ARG (?:PYTHON|UV)=(\S+)$", "\n".join(before), re.MULTILINE)))
    assert len(images) == 2
    assert pinned({images[0]: f"sha256:{'a' * 64}"}).returncode != 0
    half = pinned({images[0]: f"sha256:{'a' * 64}", images[1]: "unauthorized"})
    assert half.returncode == 1 and f"the registry of {images[1]} must answer with a digest, found 'unauthorized'" in half.stderr
    assert [path.read_text() for path in files[1:]] == before
    for digit in "ab":  # a second time over the first
        digests = {image: f"sha256:{digit * 63}{number}" for number, image in enumerate(images)}
        assert pinned(digests).returncode == 0
        for path, text in zip(files[1:], before, strict=True):
            for image, digest in digests.items():
                text = text.replace(f"={image}\n", f"={image}@{digest}\n")
            assert path.read_text() == text


def test_shell_scripts_are_linted(repository: Path) -> None:
    scripts = [SBATCH, PIN, *(path for path in (repository / ".ci").iterdir() if path.is_file() and path.read_text().startswith("#!"))]
    shells = [path for path in scripts if "sh" in path.read_text().splitlines()[0]]
    assert len(shells) >= 3
    done = subprocess.run([linter("shellcheck"), *shells], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def compose(**environment: str) -> dict:
    """compose.yaml as Docker reads it: variables replaced, one that is required and missing an error, merges made."""

    def value(found: re.Match[str]) -> str:
        name, kind, other = found.groups()
        if name not in environment and kind == ":?":
            raise KeyError(other)
        return environment.get(name, other)

    text = re.sub(r"(?m)^ *#.*$", "", (DEPLOY / "compose.yaml").read_text())
    return yaml.safe_load(re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text))


def test_compose_is_valid_and_asks_for_a_key() -> None:
    with pytest.raises(KeyError, match="PI0FM_TOKEN"):
        compose()
    document = compose(PI0FM_TOKEN="key")
    if importlib.util.find_spec("compose_spec"):
        import compose_spec

        assert sorted(compose_spec.PyCompose.from_json(json.dumps(document)).service_names()) == ["serve", "train"]
    for service in document["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert service["read_only"] is True and service["user"] == "1000:1000" and service["shm_size"] == "16gb"
    assert document["services"]["serve"]["environment"] == {
        **document["services"]["train"]["environment"],
        "PI0FM_TOKEN": "key",
    }


@pytest.fixture
def slurm(tmp_path: Path):
    """`slurm(words, nodes)`: what sbatch would start, with the script's own #SBATCH lines as the job's size."""
    programs = {"srun": SRUN, "scontrol": SCONTROL}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SBATCH.read_text(), re.MULTILINE))

    def start(words: list[str], nodes: int = int(asked["nodes"]), gpus: int | None = None, **more: str) -> subprocess.Popen[str]:
        job = {
            "SLURM_JOB_ID": str(10000 + os.getpid() % 10000),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes * int(asked["ntasks-per-node"])),
            "SLURM_JOB_NODELIST": "localhost",
            "CALLS": str(tmp_path / "calls"),
        }
        job |= {} if gpus is None else {"SLURM_GPUS_ON_NODE": str(gpus)}
        path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, **job, "PATH": path, "PI0FM_VENV": str(tmp_path / "none"), **more}
        return subprocess.Popen(
            ["bash", str(SBATCH), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    return start


def stand_in(folder: Path, text: str) -> None:
    (folder / "torchrun").write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / "torchrun").chmod(0o755)


def test_every_node_starts_one_agent_with_all_its_gpus(slurm, tmp_path: Path) -> None:
    stand_in(tmp_path, 'echo "$SLURM_PROCID: $*"')
    out, error = (started := slurm(["pi0", "libero", "full", "--output_dir", "a folder"], nodes=4, gpus=8)).communicate(timeout=50)
    assert (started.returncode, error) == (0, "")
    lines = sorted(out.splitlines())
    assert [line.partition(": ")[0] for line in lines] == ["0", "1", "2", "3"]
    assert len({line.partition(": ")[2] for line in lines}) == 1, "all agents are told the same"
    for words in (
        "--nnodes 4 --nproc-per-node 8",
        "--rdzv-endpoint localhost:",
        "train pi0 libero full --output_dir a folder --num_workers 0",
    ):
        assert words in lines[0]
    assert lines[0].endswith("--resume auto")
    assert (tmp_path / "calls").read_text() == "scontrol show hostnames localhost\n"


def test_nothing_to_train_is_a_line(slurm) -> None:
    _, error = (started := slurm([])).communicate(timeout=50)
    assert started.returncode == 2 and "type sbatch deploy/slurm/train.sbatch" in error


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_whose_time_ends_saves_and_is_queued_again(slurm, tmp_path: Path, number: int) -> None:
    stand_in(tmp_path, 'trap "echo saved; exit 143" TERM; touch "$CALLS.$SLURM_PROCID"; while true; do sleep 0.1; done')
    started = slurm(["pi0"], nodes=2)
    wait_for(tmp_path / "calls.0", tmp_path / "calls.1")
    started.send_signal(number)
    out, error = started.communicate(timeout=50)
    assert out.splitlines() == ["saved", "saved"] and "queued again" in error
    assert started.returncode == 143
    assert (tmp_path / "calls").read_text().splitlines()[-1].startswith("scontrol requeue ")


def test_a_run_that_ends_at_the_signal_is_not_queued_again(slurm, tmp_path: Path) -> None:
    stand_in(tmp_path, 'trap "exit 0" TERM; touch "$CALLS.0"; while true; do sleep 0.1; done')
    started = slurm(["pi0"])
    wait_for(tmp_path / "calls.0")
    started.send_signal(signal.SIGUSR1)
    started.communicate(timeout=50)
    assert started.returncode == 0 and "requeue" not in (tmp_path / "calls").read_text()


def test_a_failed_run_fails_the_job(slurm, tmp_path: Path) -> None:
    stand_in(tmp_path, '[ "$SLURM_PROCID" = 0 ] || exit 3')
    started = slurm(["pi0"], nodes=2)
    started.communicate(timeout=50)
    assert started.returncode == 3 and "requeue" not in (tmp_path / "calls").read_text()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.journey
@pytest.mark.timeout(300)
def test_two_nodes_train_together(slurm, tmp_path_factory, tmp_path: Path) -> None:
    """torchrun's own agents, and real training: one process on each of two nodes of this machine."""
    import recorded_curve
    import tiny_dataset

    root = tiny_dataset.written(tmp_path_factory)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(recorded_curve.options_of(root, tmp_path) | {"num_workers": 1}))
    started = slurm([str(file)], nodes=2, PYTHONPATH=os.pathsep.join(sys.path))
    _, error = started.communicate(timeout=250)
    assert started.returncode == 0, error[-3000:]
    recorded_curve.assert_same(recorded_curve.curve(tmp_path / "run"), recorded_curve.recorded())
    assert shlex.split((tmp_path / "calls").read_text())[0] == "scontrol"
