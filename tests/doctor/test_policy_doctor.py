"""Tests of `pi0fm doctor` on a configuration, a bundle, a server: every planted fault is named, and a healthy policy has none."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny_dataset
import torch
import yaml
from any_dataset import change_info, data_file, png, set_column, shade, write_set, write_tasks

from pi0fm.cli.main import main
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.lerobot_source import open_source
from pi0fm.data.config import DatasetConfig
from pi0fm.doctor import answers
from pi0fm.doctor.policy import Counterparts, examine, of_bundle, open_counterpart
from pi0fm.flow.config import FlowConfig
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm_client.types import ActionChunk, Observation

BASE, WRIST = "observation.images.base", "observation.images.wrist"
LENGTHS = (44, 36, 42)
STATE, ACTION = "observation.state", "action"


def scene(episode: int, step: int) -> np.ndarray:
    """A picture that moves, with a bright top and a coloured left."""
    picture = shade(episode, step)
    picture[:6] = 220
    picture[:, :8, 0] = 200
    return picture


def columns() -> tuple[np.ndarray, np.ndarray]:
    """A state that wanders; an action a little ahead of it in the first two dimensions, and a gripper that is open or closed."""
    random = np.random.default_rng(3)
    state = np.concatenate([np.cumsum(random.normal(size=(length, 4)), axis=0) for length in LENGTHS]).astype(np.float32)
    action = state[:, :3] + random.normal(0, 0.1, (len(state), 3)).astype(np.float32)
    action[:, 2] = np.where(np.arange(len(state)) % 11 < 5, -1, 1)
    return state, action


def write(root: Path, name: str, values: np.ndarray) -> None:
    set_column(data_file(root), name, pa.array(values.astype(np.float32).tolist(), pa.list_(pa.float32())))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    root = write_set(tmp_path_factory.mktemp("healthy") / "set", LENGTHS, cameras=(BASE, WRIST), picture=scene)
    state, action = columns()
    write(root, STATE, state)
    write(root, ACTION, action)
    stored = [{"bytes": png(255 - scene(k % 3, k % 20)), "path": None} for k in range(len(state))]
    set_column(data_file(root), WRIST, pa.array(stored, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    return root


@pytest.fixture(scope="module")
def trained(healthy, tmp_path_factory) -> Path:
    """A bundle of random weights with the data set's statistics."""
    source = open_source(DatasetConfig(root=healthy), Embodiment(delta_actions=(0, 1)))
    model = replace(tiny_dataset.network(), max_prompt_tokens=40)
    config = PolicyConfig(model, FlowConfig(num_flow_steps=2), source.embodiment, execution_horizon=4, fps=10.0)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trained") / "bundle"
    bundle.save(path, Pi0(model).state_dict(), config, source.norm_stats(4))
    return path


@pytest.fixture
def root(healthy, tmp_path) -> Path:
    return shutil.copytree(healthy, tmp_path / "set")


def kinds(root: Path, path: Path, tmp_path: Path, **change) -> dict[str, str]:
    """Kinds of what is found, less notes, by severity."""
    subject = of_bundle(path, None)
    policy = replace(subject.policy, **change)
    stats = change.pop("stats", subject.stats)
    subject = replace(subject, policy=policy, stats=stats, chain=policy.chain(stats))
    config = DatasetConfig(root=root)
    found = examine(subject, config, open_counterpart(subject, config), Counterparts(load=False, sheet=tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    return {finding.kind: finding.severity for finding in found.findings if finding.severity != "note"}


def doctor(capsys, *words) -> tuple[int, dict, str]:
    code = main(["doctor", *map(str, words)])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]) if said.out else {}, said.err


def test_a_healthy_bundle(healthy, trained, tmp_path, capsys):
    code, found, said = doctor(capsys, trained, "--dataset.root", healthy, "--output_dir", tmp_path / "out")
    assert code == 0 and found["errors"] == 0, said
    assert (tmp_path / "out/sheet.png").stat().st_size > 10_000
    assert (
        re.search(r"[\d.]+ to [\d.]+ ms, median [\d.]+ per chunk on cpu", found["measured"]["inference"])
        and "'pick up the cube\\n'" in found["measured"]["prompt"]
    )
    assert found["measured"]["tokens"].startswith("115 108")  # p, i in bytes, three ids on
    assert not any(kind in said for kind in ("warning", "error"))


def sideways(root: Path, rows, change, name=STATE) -> None:
    """Change some rows of a column."""
    values = dict(zip((STATE, ACTION), columns(), strict=True))[name]
    values[rows] = change(values[rows])
    write(root, name, values)


def other_pictures(root: Path, column: str, picture) -> None:
    stored = [{"bytes": png(picture(k)), "path": None} for k in range(sum(LENGTHS))]
    set_column(data_file(root), column, pa.array(stored, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))


def at_the_edge(k: int) -> np.ndarray:
    picture = scene(1, 4)
    picture[-2:, 2 * (k % 20) : 2 * (k % 20) + 4] = 90
    return picture


def at_20_hz(root: Path) -> None:
    change_info(root, lambda info: info.update(fps=20))
    set_column(data_file(root), "timestamp", pa.array([np.float32(k / 20) for length in LENGTHS for k in range(length)]))


ALL = slice(None)
PLANTED = {
    "a state that is not sent": (lambda root: sideways(root, ALL, lambda v: v * 0), {"dead state": "error"}),
    "a constant action dimension": (lambda root: sideways(root, ALL, lambda v: v * [1, 1, 0], ACTION), {"dead action": "warning"}),
    "a saturated action": (
        lambda root: sideways(root, ALL, lambda v: np.maximum(v, np.quantile(v, 0.7, axis=0)), ACTION),
        {"saturated action": "warning"},
    ),
    "degrees in one episode": (lambda root: sideways(root, slice(44, 80), np.rad2deg), {"units": "error"}),
    "a black camera": (lambda root: other_pictures(root, BASE, lambda k: np.zeros((32, 48, 3), np.uint8)), {"dead camera": "error"}),
    "a frozen camera": (lambda root: other_pictures(root, WRIST, lambda k: scene(1, 4)), {"frozen camera": "error"}),
    "a picture that moves at its edge alone": (lambda root: other_pictures(root, WRIST, at_the_edge), {}),
    "one camera twice": (
        lambda root: [other_pictures(root, c, lambda k: scene(0, k % 20)) for c in (BASE, WRIST)],
        {"doubled camera": "warning"},
    ),
    "an empty sentence": (lambda root: write_tasks(root, {0: "pick up the cube", 1: " "}), {"prompt": "error"}),
    "a sentence that would be cut": (lambda root: write_tasks(root, {0: "pick " * 20, 1: "open"}), {"prompt": "error"}),
    "another rate": (at_20_hz, {"rate": "error"}),
    "data of another robot": (lambda root: sideways(root, ALL, lambda v: 40 + 9 * v), {"foreign statistics": "error", "scale": "error"}),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_of_the_data_is_named(fault, root, trained, tmp_path):
    plant, expected = PLANTED[fault]
    plant(root)
    found = kinds(root, trained, tmp_path)
    assert expected.items() <= found.items(), found


def test_q01_close_to_q99_is_named_and_blown_up_under_an_absolute_rule(root, trained, tmp_path):
    rare = lambda v: np.where(np.arange(len(v))[:, None] == 7, [1, 1, 900, 1], [1, 1, 1e-3, 1] * v)  # noqa: E731
    sideways(root, ALL, rare)
    source = open_source(DatasetConfig(root=root), Embodiment(delta_actions=(0, 1)))
    subject = of_bundle(trained, None)
    for rule, kind in (("relative", "degenerate statistics"), ("absolute", "scale")):
        policy = replace(subject.policy, normalization="quantile", norm_rule=rule, norm_floor=0.001)
        stats = source.norm_stats(4)
        given = replace(subject, policy=policy, stats=stats, chain=policy.chain(stats), trained_here=True)
        found = examine(given, DatasetConfig(root=root), source, Counterparts(load=False, sheet=tmp_path / "s.png"))
        assert kind in {finding.kind for finding in found.findings}, rule


@pytest.mark.parametrize(
    ("names", "severity", "words"),
    [
        (["lift", "pan", "roll", "grip"], "error", "in their order, found dimension 0 to be 'lift', which is 'pan' of the policy"),
        (["pan", "lift", "roll", "hand"], "warning", "by name, found dimension 3 to be 'hand', which is 'grip' of the policy"),
    ],
)
def test_joints_of_another_order_or_name(names, severity, words, root, trained, tmp_path):
    change_info(root, lambda info: info["features"][STATE].update(names={"axes": names}))
    subject = of_bundle(trained, None)
    arm = replace(subject.policy.embodiment, state_names=("pan", "lift", "roll", "grip"))
    subject = replace(subject, policy=replace(subject.policy, embodiment=arm))
    config = DatasetConfig(root=root)
    found = examine(subject, config, open_counterpart(subject, config), Counterparts(load=False, sheet=tmp_path / "sheet.png")).findings
    assert [(each.severity, words in each.text) for each in found if each.kind == "names"] == [(severity, True)]


def test_an_action_that_is_a_difference_already(root, trained, tmp_path):
    sideways(root, ALL, lambda v: np.random.default_rng(0).normal(0, 0.1, v.shape), ACTION)
    assert kinds(root, trained, tmp_path)["relative action"] == "error"


def test_swapped_camera_columns(healthy, trained, tmp_path):
    embodiment = replace(of_bundle(trained, None).policy.embodiment, cameras={"base": WRIST, "wrist": BASE})
    assert kinds(healthy, trained, tmp_path, embodiment=embodiment)["swapped cameras"] == "error"


@pytest.mark.parametrize("fault", ["missing statistic", "missing weight", "misshaped weight", "NaN in a weight"])
def test_a_bundle_that_is_not_whole(fault, trained, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from pi0fm.policy.saved.manifest import write_manifest

    broken = shutil.copytree(trained, tmp_path / "bundle")
    if fault == "missing statistic":
        stats = json.loads((broken / "norm_stats.json").read_text())
        del stats["action"]["q99"]
        (broken / "norm_stats.json").write_text(json.dumps(stats))
    else:
        weights = load_file(broken / "model.safetensors")
        name = next(name for name, tensor in weights.items() if tensor.ndim == 2)
        if fault == "missing weight":
            del weights[name]
        else:
            weights[name] = weights[name].t().contiguous() if fault == "misshaped weight" else weights[name] * float("nan")
        save_file(weights, broken / "model.safetensors")
    write_manifest(broken)
    code, _, said = doctor(capsys, broken)
    expected = {"missing statistic": "lacks action.q99", "NaN in a weight": "must be finite", "missing weight": "missing (1)"}
    assert code == 1 and expected.get(fault, "of another shape (1)") in said


def test_a_configuration_shows_its_batch_memory_and_exit_code(root, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    network = {"model": tiny_dataset.NETWORK | {"max_prompt_tokens": 40}, "execution_horizon": 4, "num_workers": 0, "precision": "float32"}
    path.write_text(yaml.safe_dump(network))
    words = (root, path, "--output_dir", tmp_path / "out")
    code, found, said = doctor(capsys, *words)
    assert code == 0 and "memory of a worker: about" in found["seen"]["measured"]["training"], said
    assert "TFLOP; on one card" in found["seen"]["measured"]["step"]
    other_pictures(root, BASE, lambda k: np.zeros((32, 48, 3), np.uint8))
    code, found, said = doctor(capsys, *words)
    assert code == 1 and found["seen"]["errors"] == 1 and "camera 'base' must show the scene" in said.splitlines()[-1]


def test_options_that_do_not_go_together(healthy, trained, capsys):
    assert doctor(capsys, healthy, "--server", "ws://127.0.0.1:1")[0] == 2
    assert doctor(capsys, healthy, "--suite", "metaworld")[0] == 2
    assert doctor(capsys, trained, "run.yaml")[0] == 2


def test_a_server_of_another_bundle(healthy, trained, tmp_path, capsys, start_server):
    policy = bundle.load(trained)
    server = start_server(policy)
    words = ("--dataset.root", healthy, "--output_dir", tmp_path)
    code, found, said = doctor(capsys, trained, "--server", server.url, "--load", "false", *words)
    assert code == 0 and "round trip" in found["measured"]["server"], said
    code, found, said = doctor(capsys, server.url, *words)
    assert code == 0 and "round trip" in found["measured"]["server"], said
    other = tmp_path / "other"
    config = replace(of_bundle(trained, None).policy, fps=50.0)
    bundle.save(other, policy.model.state_dict(), config, bundle.read(trained)[1])
    code, found, said = doctor(capsys, other, "--server", server.url)
    assert code == 1 and "serves the bundle" in said and "fps of" in said


@pytest.mark.parametrize(
    ("seconds", "severity"),
    [([0.1, 0.1, 0.1, 0.1, 0.1], None), ([0.1, 9.0, 9.0, 9.0, 9.0], "note"), ([2.1, 2.2, 3.0, 2.2, 9.0], "warning")],
    ids=["fast", "delayed by others", "too slow"],
)
@pytest.mark.parametrize("observations", [1, 8])
def test_a_speed_is_warned_of_where_every_call_was_too_slow(monkeypatch, seconds, severity, observations):
    clock, left = [0.0], [50.0, *seconds]
    monkeypatch.setattr(answers.time, "perf_counter", lambda: clock[0])

    def infer(observation):
        clock[0] += left.pop(0)
        return ActionChunk(np.zeros((20, 2), np.float32))

    asked = [Observation({}, np.zeros(2, np.float32), "press")] * observations
    found, measured = answers.answer_findings(infer, asked, {"fps": 10, "action_horizon": 20}, np.zeros((4, 2), np.float32), "the policy")
    assert measured == pytest.approx(seconds), "the first call warms up, and a single observation is asked again"
    assert [(each.kind, each.severity) for each in found] == ([("speed", severity)] if severity else [])
    if severity:
        assert f"{1e3 * min(seconds):.1f} to 9000.0 ms, median" in found[0].text and "for a chunk of 2000 ms" in found[0].text
