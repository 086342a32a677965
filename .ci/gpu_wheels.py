"""Fill .gpu-wheels/ with the pure-Python packages that a bare GPU machine lacks and pi0fm needs, at the versions of uv.lock."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "beartype",  # tests
    *("starlette", "anyio", "uvicorn", "h11", "click", "websockets"),  # server
    *("lerobot", "einops", "draccus", "mergedeep", "toml", "typing-inspect", "mypy-extensions"),  # the peer
)
PURE = ("--no-deps", "--only-binary=:all:", "--platform", "any", "--implementation", "py", "--python-version", "3.12")


def main() -> None:
    """Download, and print how large they are."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    versions = {package["name"]: package.get("version") for package in packages}
    place = ROOT / ".gpu-wheels"
    shutil.rmtree(place, ignore_errors=True)
    wanted = [f"{name}=={versions[name]}" for name in NAMES]
    subprocess.run([_python_with_pip(), "-m", "pip", "download", "--quiet", "--dest", str(place), *PURE, *wanted], check=True)
    wheels = list(place.glob("*.whl"))
    print(f"{len(wheels)} wheels in {place.name}, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB")


def _python_with_pip() -> str:
    """This Python, or one on PATH; an environment that uv made has no pip."""
    for python in (sys.executable, "python3", "python"):
        if shutil.which(python) and subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            return python
    raise SystemExit("downloading wheels needs pip, found none for this Python nor for python3; install python3-pip")


if __name__ == "__main__":
    main()
