"""Test of `pi0fm bench learning` from a recorded data set to its last line, with real trainings and a fake arm."""

import json
import math
from pathlib import Path

import demos_help
import jsonschema
import pytest
from learning_help import NETWORK, TASK, SeededArm

from pi0fm import files
from pi0fm.cli.main import main
from pi0fm.demos.record import record
from pi0fm.sim import catalog

pytestmark = [pytest.mark.journey, pytest.mark.long]
BUDGET, SEEDS = 1.0, 2


def by_seed(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": SEEDS, "maxItems": SEEDS}


SIDE = {
    "type": "object",
    "properties": {
        "success": by_seed({"type": ["number", "null"], "minimum": 0, "maximum": 1}),
        "cpu_seconds": by_seed({"type": "number", "minimum": BUDGET}),
        "steps": by_seed({"type": "integer", "minimum": 1}),
        "scheduled_steps": by_seed({"type": "integer", "minimum": 1}),
        "crashes": by_seed({"type": "integer", "minimum": 0}),
    },
    "required": ["success", "cpu_seconds", "steps", "scheduled_steps", "crashes"],
    "additionalProperties": False,
}
RESULT = {
    "type": "object",
    "properties": {
        "task": {"const": TASK},
        "pi0fm": SIDE,
        "lerobot": SIDE,
        "parameters": {"type": "object", "additionalProperties": {"type": "integer"}, "required": ["pi0fm", "lerobot", "lerobot_used"]},
        "machine": {"type": "object", "required": ["processor", "cores"]},
        "versions": {"type": "object", "required": ["pi0fm", "lerobot", "torch"]},
    },
    "required": ["task", "pi0fm", "lerobot", "parameters", "machine", "versions"],
    "additionalProperties": False,
}


def words(tmp_path: Path) -> list[str]:
    root, config = tmp_path / "set", tmp_path / "small.yaml"
    record(demos_help.config(root), demos_help.submit, 1)
    run = {"model": NETWORK, "global_batch_size": 4, "precision": "float32", "execution_horizon": 2, "optimizer": {"learning_rate": 1e-3}}
    files.write_json(config, run)  # JSON is YAML
    options = {
        "task": TASK,
        "cpu-seconds": BUDGET,
        "seeds": SEEDS,
        "episodes": 4,
        "max_steps": 8,
        "config": config,
        "dataset.root": root,
        "dataset.cache_dir": tmp_path / "frames",
        "output_dir": tmp_path / "out",
    }
    return ["bench", "learning", *(f"--{name}={value}" for name, value in options.items())]


def test_both_sides_learn_are_judged_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "open_environment", SeededArm)
    command = words(tmp_path)

    assert main([*command, "--first_seed", "4"]) == 2, "seed 5 was demonstrated"
    assert "--first_seed 9" in capsys.readouterr().err

    assert main(command) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    jsonschema.validate(result, RESULT)
    assert result["parameters"]["lerobot_used"] == result["parameters"]["pi0fm"]
    written = json.loads((tmp_path / "out" / "learning.json").read_text())
    assert {name: written[name] for name in result} == result
    for side in ("pi0fm", "lerobot"):
        assert result[side]["success"] == [0.5] * SEEDS  # start positions 1 to 4, of which the odd ones succeed
        for seed in range(SEEDS):
            curve = written["curves"][side][seed]
            before_the_last, end = [0.0, *curve["cpu_seconds"]][-2:]
            assert before_the_last < BUDGET <= end == result[side]["cpu_seconds"][seed]
            assert len(curve["loss"]) == result[side]["steps"][seed]
            assert all(math.isfinite(loss) for loss in curve["loss"])
    turns = [line for line in captured.err.splitlines() if ", seed " in line and " of 0 to " in line]
    assert [line.partition(" of ")[0] for line in turns] == ["pi0fm, seed 0", "lerobot, seed 0", "pi0fm, seed 1", "lerobot, seed 1"]
    assert "scheduled_steps" in captured.err

    assert main(command) == 1
    assert "a result is never overwritten" in capsys.readouterr().err
