"""Tests of pi0fm's wheel outside the checkout: package, client, configuration files, and a quickstart."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest


def run(python: Path, *words: str, folder: Path, seconds: int = 50) -> str:
    """Standard output of the installed package in a folder that holds nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, whose dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=repository, capture_output=True, check=True, timeout=50)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files, so the checkout, are not read
    return python


def test_package_client_and_recipes_are_those_of_the_wheel(installed: Path, repository: Path, tmp_path: Path) -> None:
    code = "import json, pi0fm, pi0fm_client; from pi0fm import options; " + (
        "print(json.dumps([pi0fm.__file__, pi0fm_client.__file__, *map(str, options.shipped().values())]))"
    )
    found = [Path(name) for name in json.loads(run(installed, "-c", code, folder=tmp_path))]
    assert all(path.is_relative_to(installed.parents[1]) for path in found)
    assert {path.name for path in found[2:]} == {path.name for path in (repository / "configs").iterdir()}


def test_quickstart_and_a_row_of_recipes_are_found_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, "-m", "pi0fm.cli.main", "quickstart", "--help", folder=tmp_path)
    assert shown.startswith("pi0fm quickstart")
    code = (
        "from pi0fm.options import read_files; print(read_files(['configs/quickstart.yaml'])['steps'], len(read_files(['pi05', 'libero'])))"
    )
    assert int(run(installed, "-c", code, folder=tmp_path).split()[0]) > 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_short_quickstart_of_the_installed_package(installed: Path, tmp_path: Path) -> None:
    short = ["--tasks", "handle-press-v3", "--demonstrations", "1", "--steps", "2", "--episodes", "1", "--served_episodes", "1"]
    result = run(installed, "-m", "pi0fm.cli.main", "quickstart", *short, folder=tmp_path, seconds=600)
    assert Path(tmp_path, json.loads(result.splitlines()[-1])["bundle"], "manifest.json").is_file()
