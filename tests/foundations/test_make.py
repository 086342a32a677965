"""Tests of `make` without a .venv: the search for an interpreter that starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORTED = '#!/bin/sh\nexec {real} "$@"\n'
SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"
EXACT = '#!/bin/sh\ncase "$*" in *sys.argv*3.10) exit 0;; *sys.executable*) echo /opt/3.10;; *) exit 1;; esac\n'
OLD = '#!/bin/sh\ncase "$*" in *\'(3, 12)\'*) exit 1;; *) exec {real} "$@";; esac\n'


@pytest.fixture
def clone(tmp_path: Path, repository: Path) -> Path:
    """A folder with .ci/find-python and bin/, and nothing else on PATH but a shell."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(repository / ".ci" / "find-python", tmp_path / ".ci")
    return tmp_path


def put(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script.format(real=sys.executable))
    path.chmod(0o755)


def find(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(clone / "bin"), "HOME": str(clone / "home")}
    return subprocess.run(
        ["/bin/sh", ".ci/find-python", *words], cwd=clone, env=environment, capture_output=True, text=True, timeout=50, check=False
    )


def test_a_shim_that_does_not_start_is_passed_over(clone: Path) -> None:
    put(clone / "bin" / "python3.12", SHIM)
    put(clone / "bin" / "python3.13", SHIM)
    put(clone / "bin" / "python3", SUPPORTED)
    found = find(clone)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{sys.executable}\n", "")


def test_a_version_of_pyenv_is_found_though_nothing_on_path_is(clone: Path) -> None:
    put(clone / "bin" / "python3", SHIM)
    put(clone / "home" / ".pyenv" / "versions" / "3.12.9" / "bin" / "python", SUPPORTED)
    assert find(clone).returncode == 0


def test_the_environment_that_is_there_comes_first(clone: Path) -> None:
    put(clone / ".venv" / "bin" / "python", SUPPORTED)
    assert find(clone).stdout == ".venv/bin/python\n"


def test_an_old_python_serves_only_to_fetch_uv(clone: Path) -> None:
    put(clone / "bin" / "python3", OLD)
    if any(os.access(path, os.X_OK) for path in ("/usr/bin/python3.12", "/usr/bin/python3.13", "/usr/local/bin/python3")):
        pytest.skip("this machine has a supported Python at a fixed place, which is rightly found")
    assert find(clone).returncode == 1
    assert find(clone, "any").stdout == f"{sys.executable}\n"


def test_a_python_of_one_version_is_found_for_the_robots_client(clone: Path) -> None:
    put(clone / "bin" / "python3", SUPPORTED)
    assert find(clone, "3.10").returncode == 1
    put(clone / "bin" / "python3.10", EXACT)
    assert find(clone, "3.10").stdout == "/opt/3.10\n"


def test_the_targets_of_the_readme_exist(repository: Path) -> None:
    for target in ("quickstart", "test", "unit", "journeys", "lint", "types", "contracts", "clean"):
        done = subprocess.run(["make", "--dry-run", target], cwd=repository, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == 0, done.stderr
