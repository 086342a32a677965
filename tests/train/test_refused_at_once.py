"""Tests of the checks of `pi0fm train` before torch or Ray is loaded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = "torch, ray, pyarrow, transformers, accelerate, lerobot, tensorboard"
CODE = f"""
import sys
from pi0fm.cli.main import main
code = main(sys.argv[1:])
loaded = [name for name in "{HEAVY}".split(", ") if name in sys.modules]
print("loaded:", *loaded, file=sys.stderr)
sys.exit(code)
"""

EVERY = f"""
import contextlib, io, sys
from pi0fm.cli.main import COMMANDS, find, main
named = [(name, *part) for name in COMMANDS for part in [(), *((sub,) for sub in getattr(find((name,)), "SUBCOMMANDS", ()))]]
forms = [("eval", *option) for option in (("--follow.run", "r"), ("--dataset.root", "d"), ("--realtime.delays_ms", "0"))]
known = set()
for words in (*named, *forms):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*words, "--help"])
    loaded = {{name for name in "{HEAVY}".split(", ") if name in sys.modules}} - known
    known |= loaded
    print(*words[:2], "helps" if code == 0 and out.getvalue().startswith("pi0fm " + words[0]) else "fails", *sorted(loaded))
"""


def asked(*words: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of a fresh process, which must load nothing of HEAVY."""
    found = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, timeout=100, check=False, env=os.environ | variables
    )
    *lines, loaded = found.stderr.splitlines()
    assert loaded == "loaded:"
    return found.returncode, found.stdout, "\n".join(lines)


@pytest.mark.parametrize("words", ["--version", "--help", "train --help", "train --help all", "serve --help", "convert --help"])
def test_help_and_version_load_nothing_heavy(words):
    code, out, _ = asked(*words.split())
    assert code == 0 and "pi0fm" in out


def test_no_help_of_any_command_loads_anything_heavy():
    found = subprocess.run([sys.executable, "-c", EVERY], capture_output=True, text=True, timeout=100, check=True)
    lines = found.stdout.splitlines()
    assert {"eval --follow.run helps", "bench card helps", "flow steps helps", "doctor helps"} <= set(lines)
    assert [line for line in lines if not line.endswith(" helps")] == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("nofile.yaml", "no configuration file at nofile.yaml"),
        ("--bogus 3", "unknown option bogus"),
        ("--dataset.root /nowhere", "/nowhere does not exist"),
        ("--dataset.root DATA --pretrained /nowhere", "no bundle at /nowhere"),
        ("--dataset.root DATA --tokenizer /nowhere", "found '/nowhere'"),
        ("--dataset.root DATA --output_dir DATA", "is not a run of pi0fm"),
        ("--dataset.root DATA --num_workers 1 --ray_address 127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
        ("--dataset.root DATA --num_workers 2 --cpus_per_worker 9999", "num_workers are Ray workers that train"),
        ("--dataset.root DATA --batch_size 4 --global_batch_size 8", "--batch_size and --global_batch_size both set global_batch_size"),
        ("--dataset.root DATA --lora.rank -1", "lora.rank must be >= 0"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_heavy_is_loaded(tmp_path, words, line):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text(json.dumps({}))
    output = [] if "output_dir" in words else ["--output_dir", str(tmp_path / "run")]
    code, _, error = asked("train", *words.replace("DATA", str(tmp_path)).split(), *output)
    assert code in (1, 2) and line in error
    assert not (tmp_path / "run").exists()


def test_all_faults_are_told_at_once(tmp_path):
    code, _, error = asked(
        *("train", "--dataset.root", "/nowhere", "--pretrained", "/neither", "--output_dir", str(Path(__file__).parent)),
        *("--num_workers", "1", "--ray_address", "127.0.0.1:1"),
    )
    assert code == 1
    for words in ("/nowhere does not exist", "no bundle at /neither", "is not a run of pi0fm", "no Ray cluster answers"):
        assert words in error


def test_a_taken_port_is_named_before_the_first_worker_waits_at_it(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ("train", "--dataset.root", str(tmp_path), "--output_dir", str(tmp_path / "run"))
        code, _, error = asked(*words, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert code == 2 and f"MASTER_PORT must be free where RANK is 0, found {port}" in error
