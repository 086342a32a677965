"""All parts of the card's measurements, each in a process of its own that may fail, hang or be killed.

Owns: the processes and their time, the files, what the whole comes to. Does not know: what is measured; it imports no torch.

    part's process    rows -> PART.json, after every row            ended by its own end, or when its time is over
    this process      waits; then reads what is there               output_dir: PART.json, card.json, card.log
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi0fm import files, progress
from pi0fm.bench.card.config import PARTS, CardConfig
from pi0fm.bench.card.results import Results
from pi0fm_client.errors import ConfigError

RIGHT, LOG = "right", "card.log"
GRACE = 5.0  # seconds between a part's own end and that by force
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


def measure_card(config: CardConfig) -> dict[str, Any]:
    """Run the parts one after the other: `device`, `parts` by name, `seconds`. Raises ConfigError where the tests are not at hand."""
    tests = Path("tests/gpu")
    if RIGHT in config.bounds() and not tests.is_dir():
        raise ConfigError(f"part {RIGHT} runs {tests} of a checkout, found none in {Path.cwd()}; go there, or leave the part out")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / LOG).unlink(missing_ok=True)
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
    code, said = _ended(words, config.output_dir / LOG, seconds + GRACE)
    tree: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"part": part, "rows": [], "facts": {}}
    if code:
        tree["last_words"] = said[-5:]
    return tree | {"ended": _how(code)}


def _right(config: CardConfig, seconds: float) -> dict[str, Any]:
    """The tests of the CUDA path, several at a time; on a CPU their quick form. Those that ended before the time was over count."""
    where = ["-m", "gpu", "-n", "4", "--dist", "worksteal"] if config.device == "cuda" else ["-m", "not gpu", "-n", "0"]
    words = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "--tb=short", *where, "-o", f"timeout={seconds:.0f}"]
    began = time.monotonic()
    code, said = _ended(words, config.output_dir / LOG, seconds)
    ends = [found for line in said if (found := _OUTCOME.search(line)) and "tests/gpu" in line]
    counts = Counter(found[0].lower() for found in ends)
    failures = sorted({word for found in ends if found[0] in ("FAILED", "ERROR") for word in found.string.split() if "::" in word})
    reasons = [line for line in said if line.startswith("E  ")][:20]
    tree = {
        "part": RIGHT,
        "seconds": round(time.monotonic() - began, 1),
        "ended": _how(code),
        "summary": ", ".join(f"{count} {word}" for word, count in counts.items()) or (said or ["nothing was said"])[-1],
        "failures": failures,
        "reasons": reasons,
    }
    files.write_json(config.output_dir / "right.json", tree)
    return tree


def _ended(words: Sequence[str], log: Path, seconds: float) -> tuple[int | None, list[str]]:
    """The exit code of a program and its lines; None when it was ended for its time; all that it started ends with it."""
    before = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, log.read_bytes()[before:].decode(errors="replace").splitlines()


def _how(code: int | None) -> str:
    if code is None:
        return "its time was over"
    return "whole" if code == 0 else f"exit code {code}"


def _device(found: dict[str, Any]) -> str:
    names = [part.get("facts", {}).get("device") for part in found.values()]
    return next((name for name in names if name), "") or _asked()


def _asked() -> str:
    """The name that the driver gives the first device."""
    if shutil.which("nvidia-smi") is None:
        return "CPU"
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines() or ["unknown"])[0].strip()


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
