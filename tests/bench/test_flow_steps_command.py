"""`pi0fm flow steps`: from a bundle to a table, a figure and one line of JSON; and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from smooth_network import smooth_in_time

from pi0fm.cli.main import main
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.models.pi0 import Pi0
from pi0fm.policy import bundle
from pi0fm.train.data import policy_config


@pytest.fixture(scope="module")
def saved(learning_run, tmp_path_factory):
    """A random policy that names no task of a simulator."""
    run = learning_run()
    source = open_source(run.dataset, run.embodiment)
    policy = replace(policy_config(run, source), demonstration_seeds={})
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("steps") / "bundle"
    model = Pi0(policy.model)
    smooth_in_time(model)
    bundle.save(path, model.state_dict(), policy, source.norm_stats(policy.model.action_horizon))
    return path


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_bundle_becomes_a_table_a_figure_and_a_line(saved, recorded_root, learning_run, tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["--root", recorded_root, "--dataset.cache_dir", learning_run().dataset.cache_dir, "--output_dir", folder]
    words += ["--observations", 3, "--evaluations", "4,8,16,32", "--dopri5_tolerances", "0.01", "--reference_steps", 64]
    assert main(["flow", "steps", str(saved), *map(str, words), "--tolerance", "1.0", "--device", "cpu", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert set(result["error"]) == {"euler", "midpoint", "heun", "rk4", "dopri5"}
    assert list(result["error"]["euler"]) == ["4", "8", "16", "32"]
    for solver in ("euler", "midpoint", "heun", "rk4"):
        falling = list(result["error"][solver].values())
        assert falling[-1] < falling[0]
    best = result["cheapest"]
    assert best["rms"] <= 1.0
    assert best["options"] == f"--solver {best['solver']} --num_flow_steps {best['num_flow_steps']}"
    assert best["options"] in captured.err
    written = json.loads((folder / "steps.json").read_text())
    assert {name: written[name] for name in result} == result
    assert len(written["rows"]) == 4 * 4 + 2
    assert all(len(row["robot_rms_per_chunk"]) == 3 for row in written["rows"])
    assert (folder / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert main(["flow", "steps", "--bundle", str(saved), "--output_dir", str(folder)]) == 1
    assert "a table is never overwritten" in capsys.readouterr().err


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_tolerance_that_nothing_reaches_is_said(saved, recorded_root, learning_run, tmp_path, capsys):
    words = ["--root", recorded_root, "--dataset.cache_dir", learning_run().dataset.cache_dir, "--output_dir", tmp_path / "out"]
    words += [
        "--observations",
        1,
        "--evaluations",
        "1",
        "--dopri5_tolerances",
        "0.01",
        "--reference_steps",
        4,
        "--tolerance",
        "1e-12",
        "--threads",
        1,
    ]
    assert main(["flow", "steps", str(saved), *map(str, words)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["cheapest"] == {"tolerance": 1e-12, "solver": None}
    assert "no setting reaches 1e-12: type a larger --tolerance" in captured.err


def test_a_bundle_without_a_simulator_asks_for_a_data_set(saved, tmp_path, capsys):
    assert main(["flow", "steps", str(saved), "--output_dir", str(tmp_path / "out"), "--threads", "1"]) == 2
    assert "type --dataset.root DIRECTORY" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "pi0fm: option bundle is required: folder of the policy"),
        (["b", "--tolerance", "0"], "pi0fm: tolerance must be above 0, found 0"),
        (["b", "--dopri5_tolerances", "0.1,-1"], "pi0fm: dopri5_tolerances must be above 0"),
        (["b", "--observations", "0"], "pi0fm: observations must be >= 1 and seed >= 0, found 0 and 0"),
        (["b", "--evaluations", "0,4"], "pi0fm: evaluations must be numbers >= 1"),
        (["b", "--reference_steps", "50"], "pi0fm: reference_steps must be even and at least the largest of evaluations, 100"),
        (["b", "--reference_steps", "129"], "pi0fm: reference_steps must be even"),
        (["b", "c"], "pi0fm: expected an option like --steps 100, found 'c'; one bundle may stand first"),
    ],
)
def test_wrong_words_are_one_line(capsys, words, line):
    assert main(["flow", "steps", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def test_a_folder_that_is_a_file_is_left_alone(capsys, tmp_path):
    (tmp_path / "out").write_text("thesis")
    assert main(["flow", "steps", "b", "--output_dir", str(tmp_path / "out")]) == 1
    assert "output_dir must be a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "thesis"


def test_help_shows_where_the_bundle_stands(capsys):
    assert main(["flow", "steps", "--help"]) == 0
    assert capsys.readouterr().out.startswith("pi0fm flow steps BUNDLE [--option value ...]: the error of a chunk")
