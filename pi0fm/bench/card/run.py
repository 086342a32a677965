"""Measurements of pi0 at full size on one GPU in eight minutes: each part in a separate process that may fail, hang or be killed.

Owns: the processes and their time limits, the files. Does not know: what is measured; it imports no torch.

    part's process    rows -> PART.json, after every row            ends by itself, or is killed at its time limit
    this process      waits; then reads PART.json                   output_dir: PART.json, card.json, card.log
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi0fm import files, progress
from pi0fm.bench.card.results import Results
from pi0fm.bench.config import CARD_PARTS, CardOptions
from pi0fm.bench.harness.measure import BenchReport
from pi0fm_client.errors import ConfigError

RIGHT, LOG = "right", "card.log"
RESULT = None  # a later run replaces the files of an earlier one
GRACE = 5.0  # seconds beyond its time limit in which a part may end by itself
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


def measure(options: CardOptions) -> BenchReport:
    """Run the parts one after the other. Raises ConfigError where tests/gpu is missing."""
    tests = Path("tests/gpu")
    if RIGHT in options.bounds() and not tests.is_dir():
        raise ConfigError(f"part {RIGHT} runs {tests} of a checkout, found none in {Path.cwd()}; go there, or leave the part out")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / LOG).unlink(missing_ok=True)
    began, found = time.monotonic(), {}
    for part, seconds in options.bounds().items():
        progress.say(f"{part}: at most {seconds:.0f} s")
        found[part] = _right(options, seconds) if part == RIGHT else _measured(options, part, seconds)
        for line in (*found[part].get("failures", ()), *found[part].get("reasons", ()), *found[part].get("last_words", ())):
            progress.say(f"  {line}")
    result = {"device": _device(found), "seconds": round(time.monotonic() - began, 1), "parts": found}
    files.write_json(options.output_dir / "card.json", result)
    rows = {name: part.get("rows", []) for name, part in found.items()}
    figures = {
        "device": result["device"],
        "seconds": result["seconds"],
        "ended": {name: part["ended"] for name, part in found.items()},
        "right": found.get(RIGHT, {}).get("summary", "not run"),
        "figures": {row["what"]: row["value"] for part in rows.values() for row in part if row["value"] is not None},
        "results": str(options.output_dir),
    }
    tables = {name: {row["what"]: _shown(row) for row in part} for name, part in rows.items() if part}
    return BenchReport(figures, tables | {name: value for name, value in figures.items() if name != "figures"})


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    figure = "" if row["value"] is None else f"{row['value']:g} {row['unit']}"
    share = "" if row["limit_share"] is None else f"{100 * row['limit_share']:.0f} %"
    return {"figure": figure, "of the limit": share, "target": row["target"], "note": row["note"]}


def _measured(options: CardOptions, part: str, seconds: float) -> dict[str, Any]:
    path = options.output_dir / f"{part}.json"
    path.unlink(missing_ok=True)
    words = [sys.executable, "-m", "pi0fm.bench.card.run", part, str(path), str(seconds), options.device, str(int(options.whole))]
    code, said = _ended(words, options.output_dir / LOG, seconds + GRACE)
    tree: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"part": part, "rows": [], "facts": {}}
    return tree | {"ended": _how(code), "last_words": said[-5:] if code else []}


def _right(options: CardOptions, seconds: float) -> dict[str, Any]:
    """Run the tests of the CUDA path in parallel, on a CPU their quick form; those that end within the time limit count."""
    where = ["-m", "gpu", "-n", "4", "--dist", "worksteal"] if options.device == "cuda" else ["-m", "not gpu", "-n", "0"]
    words = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "--tb=short", *where, "-o", f"timeout={seconds:.0f}"]
    began = time.monotonic()
    code, said = _ended(words, options.output_dir / LOG, seconds)
    ends = [found for line in said if (found := _OUTCOME.search(line)) and "tests/gpu" in line]
    counts = Counter(found[0].lower() for found in ends)
    tree = {
        "part": RIGHT,
        "seconds": round(time.monotonic() - began, 1),
        "ended": _how(code),
        "summary": ", ".join(f"{count} {word}" for word, count in counts.items()) or (said or ["no output"])[-1],
        "failures": sorted({word for found in ends if found[0] in ("FAILED", "ERROR") for word in found.string.split() if "::" in word}),
        "reasons": [line for line in said if line.startswith("E  ")][:20],
    }
    files.write_json(options.output_dir / "right.json", tree)
    return tree


def _ended(words: Sequence[str], log: Path, seconds: float) -> tuple[int | None, list[str]]:
    """Run a program to its end or time limit; returns its exit code (None at the limit) and its lines, and kills its process group."""
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
        return "time limit reached"
    return "whole" if code == 0 else f"exit code {code}"


def _device(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Name of the device as a part found it, else as the driver names the first device."""
    names = [part.get("facts", {}).get("device") for part in found.values()]
    if any(names) or shutil.which("nvidia-smi") is None:
        return next(filter(None, names), "CPU")
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines() or ["unknown"])[0].strip()


def _main(part: str, path: str, seconds: str, device: str, whole: str) -> None:
    """Measure `part` in this process."""
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
    assert sys.argv[1] in CARD_PARTS
    _main(*sys.argv[1:6])
