import os
import subprocess
import sys
from pathlib import Path

LIGHT = """
import sys
from pathlib import Path
from demos_help import config
from pi0fm import options
from pi0fm.cluster.recording import record_demonstrations
from pi0fm.demos.config import DemosConfig
tree = {"tasks": "handle-press-v3", "episodes": 1, "cameras": "base=corner2:32x32", "noise": 0.0, "num_workers": 0}
result = record_demonstrations(options.decode(DemosConfig, tree | {"dataset": {"root": sys.argv[1]}}))
assert result["episodes"] == 1, result
print(sorted({"lerobot", "torch", "datasets", "ray"} & set(sys.modules)))
"""


def test_simulating_encoding_and_writing_load_no_lerobot_and_no_torch(tmp_path: Path, repository: Path) -> None:
    environment = {"PYTHONPATH": str(repository / "tests" / "support")}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "set")], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
