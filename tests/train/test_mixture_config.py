"""Tests of a mixture's configuration: every form, combinations with other options, comparison at a resume."""

from pathlib import Path

import pytest
import torch
import yaml

from pi0fm import options
from pi0fm.cli.main import main
from pi0fm.cluster.training import _absolute
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.config import DatasetConfig, MixtureEntry
from pi0fm.models.config import LoraConfig
from pi0fm.train.config import TrainConfig, changed_options
from pi0fm.train.plan.memory import GIB
from pi0fm_client.errors import ConfigError

RECIPE = Path(__file__).parents[2] / "configs" / "mixture_example.yaml"
ENTRIES = {
    "arm": {"dataset": {"root": "sets/arm"}, "embodiment": {"cameras": {"base": "observation.images.top"}}, "weight": 2},
    "crane": {"dataset": {"repo_id": "local/crane"}, "tasks": ["lift", "lower"], "exclude_episodes": [3, 4], "task_weights": {"lift": 2}},
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"mixture": ENTRIES}, sort_keys=False))
    return path


def parse(*words: str) -> TrainingRun:
    return options.parse(TrainingRun, [str(word) for word in words])


def test_a_file_and_options_behind_it(file):
    run = parse(file, "--mixture.crane.weight", "0.5", "--mixture.crane.dataset.root", "007", "--mixture.arm.min_frames", "9")
    arm = MixtureEntry(DatasetConfig(root=Path("sets/arm")), Embodiment(cameras={"base": "observation.images.top"}), 2.0, min_frames=9)
    crane = MixtureEntry(
        DatasetConfig("local/crane", Path("007")),
        weight=0.5,
        tasks=("lift", "lower"),
        exclude_episodes=(3, 4),
        task_weights={"lift": 2.0},
    )
    assert run.mixture == {"arm": arm, "crane": crane}
    assert list(run.entries()) == ["arm", "crane"]
    assert isinstance(run.mixture["arm"].weight, float)


def test_a_worker_of_ray_gets_the_same_from_another_folder(file):
    run = parse(file)
    found = options.decode(TrainingRun, options.encode(_absolute(run)))
    assert found.mixture["arm"].dataset.root == Path.cwd() / "sets/arm"
    assert found.mixture["crane"] == run.mixture["crane"]
    assert list(found.mixture) == ["arm", "crane"]


def test_a_mixture_may_be_written_on_the_command_line_alone():
    run = parse("--mixture.a.dataset.root", "x", "--mixture.b", "{dataset: {repo_id: y}, tasks: 'one,two'}")
    assert run.mixture["a"] == MixtureEntry(DatasetConfig(root=Path("x")))
    assert run.mixture["b"] == MixtureEntry(DatasetConfig("y"), tasks=("one", "two"))


def test_without_a_mixture_the_data_set_is_an_entry_without_a_name():
    config = TrainConfig(dataset=DatasetConfig("x"), embodiment=Embodiment("arm"), camera_sources={"base": "corner:8x8"})
    assert config.entries() == {"": MixtureEntry(DatasetConfig("x"), Embodiment("arm"), camera_sources={"base": "corner:8x8"})}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--dataset.repo_id", "x"],
            r"^dataset\.repo_id is of one data set, .* mixture of arm, crane; type --mixture\.arm\.dataset\.repo_id",
        ),
        (["--dataset.root", "x"], r"^dataset\.root is of one data set"),
        (["--dataset.cache_limit_gib", "2"], r"^dataset\.cache_limit_gib is of one data set"),
        (["--embodiment.name", "x"], r"^embodiment\.name is of one data set"),
        (["--embodiment.cameras.base", "x"], r"^embodiment\.cameras\.base is of one data set"),
        (["--camera_sources.base", "x:8x8"], r"^camera_sources\.base is of one data set.*--mixture\.arm\.camera_sources\.base"),
        (["--mixture.arm.wieght", "2"], r"^unknown option mixture\.arm\.wieght: did you mean 'mixture\.arm\.weight'"),
        (["--mixture.arm.dataset.rot", "x"], r"^unknown option mixture\.arm\.dataset\.rot: did you mean 'mixture\.arm\.dataset\.root'"),
        (["--mixture.arm.weight", "0"], "a mixture's weight must be > 0, found 0"),
        (["--mixture.arm.weight", "1e8"], "within a factor of a million"),
        (["--mixture.arm.weight", "much"], "option mixture.arm.weight must be a finite number, found 'much'"),
        (["--mixture.arm", "3"], r"^option mixture\.arm is a group: expected options in it, found 3; options here: dataset, .*weight"),
        (["--mixture", "3"], r"^option mixture is a group: expected mixture\.NAME, found 3"),
        (
            ["--mixture.third.weight", "2"],
            r"^mixture\.third must name a data set, found none; type --mixture\.third\.dataset\.repo_id NAME",
        ),
        (["--mixture", "{my arm: {dataset: {repo_id: x}}}"], "names are letters, digits and _, found 'my arm'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(file, words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(file, *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["--mixture.arm.dataset.cache_dir", "elsewhere", "--mixture.arm.dataset.video_decoder", "pyav"], []),
        (["--mixture.arm.weight", "3"], ["mixture.arm.weight was 2.0, now 3.0"]),
        (["--mixture.crane.min_frames", "3"], ["mixture.crane.min_frames was 1, now 3"]),
        (
            ["--mixture.crane.embodiment.delta_actions", "0,1", "--mixture.crane.dataset.root", "x"],
            ["mixture.crane.embodiment.delta_actions was [], now [0, 1]"],
        ),
        (["--mixture.third.dataset.root", "x"], ["mixture was 'arm, crane', now 'arm, crane, third'"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value else "nothing",
)
def test_what_a_resume_holds_against_it(file, words, expected):
    assert changed_options(options.encode(parse(file)), options.encode(parse(file, *words))) == expected


def test_an_older_run_without_mixtures_or_an_option_of_them_is_the_same(file):
    run = options.encode(TrainConfig(dataset=DatasetConfig("x")))
    older = {name: value for name, value in run.items() if name != "mixture"}
    assert changed_options(older, run) == []
    mixed = options.encode(parse(file))
    older = mixed | {"mixture": {name: {**entry} for name, entry in mixed["mixture"].items()}}
    del older["mixture"]["arm"]["camera_sources"]
    assert changed_options(older, mixed) == []
    found = changed_options(run, mixed)
    assert "mixture was '', now 'arm, crane'" in found
    assert len(found) == 1


def test_help_lists_an_entrys_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["train", "--help", "all"]) == 0
    out = capsys.readouterr().out
    for name in ("--mixture ", "--mixture.NAME.dataset.root", "--mixture.NAME.embodiment.cameras", "--mixture.NAME.weight_column"):
        assert name in out


def test_the_recipe_is_read_strictly_and_fits_its_card():
    run = options.decode(TrainingRun, options.read_yaml(RECIPE))
    text = RECIPE.read_text()
    assert list(run.mixture) == ["aloha", "so101"]
    assert [entry.embodiment.dims() for entry in run.mixture.values()] == [(14, 14), (6, 6)]
    network = run.network()
    assert all(max(entry.embodiment.dims()) <= min(network.state_dim, network.action_dim) for entry in run.mixture.values())
    cameras = {camera for entry in run.mixture.values() for camera in entry.embodiment.cameras}
    found = run.memory(len(cameras), 1, torch.device("cuda"))
    (said,) = [line for line in text.splitlines() if line.startswith("# Memory")]
    (card,) = [line for line in text.splitlines() if line.startswith("# Card")]
    assert float(said.split()[2]) == pytest.approx(found.total / GIB, abs=0.1)
    assert found.total <= 0.9 * float(card.split()[2]) * GIB
    assert "# Command    pi0fm train configs/mixture_example.yaml" in text
    assert run.pretrained is not None
    assert run.lora == LoraConfig()
