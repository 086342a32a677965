"""Tests of the Dockerfiles' text, without building them."""

import re
import tomllib
from pathlib import Path

import pytest
from manifests import DEPLOY

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


@pytest.fixture(params=DOCKERFILES)
def instructions(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """(instruction, rest) of every line, continued lines joined, comments dropped."""
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / request.param).read_text()).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in instructions if instruction == name]


def test_base_images_are_pinned(instructions: list[tuple[str, str]]) -> None:
    given = dict(rest.split("=", 1) for rest in of(instructions, "ARG"))
    stages = [rest.split(" AS ")[0] for rest in of(instructions, "FROM")]
    assert stages == ["${UV}", "${PYTHON}", "${PYTHON}"]
    assert all(re.fullmatch(r"[a-z./-]+:\d+\.\d+\.\d+[a-z-]*(@sha256:[0-9a-f]{64})?", given[stage[2:-1]]) for stage in stages)


def test_what_is_installed_is_the_wheel(instructions: list[tuple[str, str]]) -> None:
    commands = [part.strip() for rest in of(instructions, "RUN") for part in rest.split("&&")]
    assert commands.index("uv build --wheel --out-dir /tmp/wheel") < commands.index("uv pip install --no-deps /tmp/wheel/*.whl")


def test_the_lock_decides_what_is_installed(instructions: list[tuple[str, str]]) -> None:
    commands = [part.strip() for rest in of(instructions, "RUN") for part in rest.split("&&")]
    resolving = [command for command in commands if re.match(r"uv (sync|export|pip install|add|lock)", command)]
    assert resolving
    for command in resolving:
        assert re.search(r"--frozen|--no-deps|--requirements /tmp/torch\.txt", command), command
    assert not any("pip install" in command and not command.startswith("uv ") for command in commands)


def test_the_image_runs_as_a_user_that_is_not_root(instructions: list[tuple[str, str]]) -> None:
    last_stage = instructions[max(index for index, (name, _) in enumerate(instructions) if name == "FROM") :]
    assert of(last_stage, "USER") == ["1000"]
    assert of(last_stage, "ENTRYPOINT") == ['["pi0fm"]']


def test_what_is_copied_exists_and_is_in_the_build_context(instructions: list[tuple[str, str]], repository: Path) -> None:
    context = {line.removeprefix("!") for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for rest in of(instructions, "COPY") if "--from=" not in rest for word in rest.split()[:-1] if not word.startswith("--")]
    assert set(copied) == context
    assert [name for name in copied if not (repository / name).exists()] == []


def test_the_build_has_all_that_the_wheel_holds(instructions: list[tuple[str, str]], repository: Path) -> None:
    """hatchling passes over a folder that is not there, and would build a wheel without it."""
    wheel = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = {word for rest in of(instructions, "COPY") if "--from=" not in rest for word in rest.split()[:-1]}
    assert set(wheel["only-include"]) <= copied


def test_the_renderer_is_what_ci_installs(instructions: list[tuple[str, str]], repository: Path) -> None:
    (packages,) = re.findall(r"packages=\(([^)]*)\)", (repository / ".ci" / "run").read_text())
    installed = " ".join(of(instructions, "RUN"))
    assert [package for package in packages.split() if package not in installed] == []


def test_nothing_secret_is_built_in(instructions: list[tuple[str, str]]) -> None:
    text = " ".join(rest for _, rest in instructions)
    assert re.search(r"(?i)token|password|secret|api[-_]key", text) is None
    assert of(instructions, "ADD") == []
