"""All parts of the card's measurements, each in a process of its own that may fail, hang or be killed.

Owns: the processes and their time, the files, what the whole comes to. Does not know: what is measured; it imports no torch.

    part's process    rows -> PART.json, after every row            ended by its own end, or when its time is over
    this process      waits; then reads what is there               output_dir: PART.json, PART.log, card.json
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi0fm import files, progress
from pi0fm.bench.card.config import PARTS, CardConfig
from pi0fm.bench.card.results import Results
from pi0fm_client.errors import ConfigError

RIGHT = "right"
GRACE = 5.0


def measure_card(config: CardConfig) -> dict[str, Any]:
    """Run the parts one after the other: `device`, `parts` by name, `seconds`. Raises ConfigError where the tests are not at hand."""
    tests = Path("tests/gpu")
    if RIGHT in config.bounds() and not tests.is_dir():
        raise ConfigError(f"part {RIGHT} runs {tests} of a checkout, found none in {Path.cwd()}; go there, or leave the part out")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    began, found = time.monotonic(), {}
    for part, seconds in config.bounds().items():
        progress.say(f"{part}: at most {seconds:.0f} s")
        found[part] = _right(config, seconds) if part == RIGHT else _measured(config, part, seconds)
    result = {"device": _device(found), "seconds": round(time.monotonic() - began, 1), "parts": found}
    files.write_json(config.output_dir / "card.json", result)
    return result


def _measured(config: CardConfig, part: str, seconds: float) -> dict[str, Any]:
    path = config.output_dir / f"{part}.json"
    path.unlink(missing_ok=True)
    words = [sys.executable, "-m", "pi0fm.bench.card.run", part, str(path), str(seconds), config.device, str(int(config.whole))]
    code = _ended(words, config.output_dir / f"{part}.log", seconds + GRACE)
    tree: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"part": part, "rows": [], "facts": {}}
    return tree | {"ended": _how(code)}


def _right(config: CardConfig, seconds: float) -> dict[str, Any]:
    """The tests of the CUDA path, several at a time; on a CPU their quick form."""
    log, report = config.output_dir / "right.log", config.output_dir / "right.xml"
    report.unlink(missing_ok=True)
    where = ["-m", "gpu"] if config.device == "cuda" else ["-m", "not gpu"]
    workers = ["-n", "4", "--dist", "worksteal"] if config.device == "cuda" else ["-n", "0"]
    words = [sys.executable, "-m", "pytest", "tests/gpu", "-q", *where, *workers, "-o", f"timeout={seconds:.0f}", f"--junitxml={report}"]
    began = time.monotonic()
    code = _ended(words, log, seconds)
    lines = log.read_text(errors="replace").splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = next(
        (line.strip("= ") for line in reversed(lines) if " passed" in line or " failed" in line or " error" in line), (lines or [""])[-1]
    )
    tree = {"part": RIGHT, "seconds": round(time.monotonic() - began, 1), "ended": _how(code), "summary": last, "failures": failures}
    files.write_json(config.output_dir / "right.json", tree)
    return tree


def _ended(words: Sequence[str], log: Path, seconds: float) -> int | None:
    """The exit code of a program, None when it was ended for its time; all that it started ends with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _how(code: int | None) -> str:
    if code is None:
        return "its time was over"
    return "whole" if code == 0 else f"exit code {code}"


def _device(found: dict[str, Any]) -> str:
    names = [part.get("facts", {}).get("device") for part in found.values()]
    return next((name for name in names if name), "unknown")


def _main(part: str, path: str, seconds: str, device: str, whole: str) -> None:
    """In a part's process."""
    results = Results(part, Path(path), float(seconds))
    import torch

    there = torch.device(device)
    cuda = there.type == "cuda"
    results.facts |= {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "memory_gib": round(torch.cuda.get_device_properties(there).total_memory / 2**30, 1) if cuda else None,
        "whole": bool(int(whole)),
    }
    importlib.import_module(f"pi0fm.bench.card.{part}").measure(results, there, bool(int(whole)))
    results.write(finished=True)


if __name__ == "__main__":
    assert sys.argv[1] in PARTS
    _main(*sys.argv[1:6])
