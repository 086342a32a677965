"""Tests of a disk that fills up during a run: one line, existing files stay, and the same command finishes when there is space.

Needs the right to mount a small file system; skipped without.
"""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from pi0fm import options
from pi0fm.cli.main import main


@pytest.fixture
def disk(tmp_path):
    """`disk("16k")` gives the disk that size."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no right to mount a disk ({made.stderr.decode().strip()})")
    yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


# where it fills: run.json; the metrics or the first checkpoint; the second checkpoint; the bundle
@pytest.mark.parametrize(("size", "trained"), [("4k", False), ("16k", True), ("1200k", True), ("2400k", True)])
def test_a_disk_that_fills_up(disk, run, tmp_path, capfd, size, trained):
    config = run("disk/run", steps=8, checkpoint_every=3, keep_checkpoints=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options.encode(config) | {"num_workers": 0}))
    disk(size)
    assert main(["train", str(tmp_path / "config.yaml")]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "oom" in said.splitlines()[-1], said  # "No space left on device; make room ..." or "free some room"
    assert config.output_dir.exists() == trained
    disk("40m")
    assert main(["train", str(tmp_path / "config.yaml"), "--resume", "auto"]) == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 8
    left = [path.name for path in Path(config.output_dir).rglob(".*")]
    assert left == []
