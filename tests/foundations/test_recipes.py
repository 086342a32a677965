"""Tests of the shipped configurations: every combination decodes strictly, builds on the meta device, and fits its GPU."""

import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from pi0fm import options
from pi0fm.cli.training import train
from pi0fm.cluster.training_run import TrainingRun
from pi0fm.train.plan.memory import GIB
from pi0fm_client.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = ("pi0", "pi05")
ROBOTS = {"libero": (2, 8, 7), "aloha": (3, 14, 14), "droid": (2, 8, 8), "so101": (2, 6, 6)}  # cameras, width of state, of actions
GRIPPERS = {"libero": (), "aloha": (6, 13), "droid": (7,), "so101": (5,)}  # action dimensions that stay absolute, where others do not
WAYS = ("full", "lora", "expert")
ROWS = list(product(MODELS, ROBOTS, WAYS))
# action horizon, execution horizon, global batch: as openpi trains them, where it does
LENGTHS = {
    ("pi0", "libero"): (50, 10, 32),
    ("pi05", "libero"): (10, 5, 256),
    ("pi0", "aloha"): (50, 25, 32),
    ("pi05", "aloha"): (50, 25, 64),
    ("pi0", "droid"): (10, 8, 32),
    ("pi05", "droid"): (15, 8, 32),
    ("pi0", "so101"): (50, 25, 32),
    ("pi05", "so101"): (50, 25, 32),
}
SPARE = 0.1  # of a card, for its driver, its allocator's gaps and the kernels


@cache
def recipe(*row: str) -> TrainingRun:
    return options.parse(TrainingRun, row, named_by_row=train.NAMED_BY_ROW)


def header(name: str, field: str) -> str:
    found = re.findall(rf"^# {field} +(.*)$", (CONFIGS / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    assert len(found) == 1, f"{name} needs one line '# {field}'"
    return found[0]


def stated_memory(way: str) -> dict[tuple[str, str], float]:
    """GiB by model and robot, from the table at the top of a way's file."""
    lines = re.findall(r"^# +(\w+) +pi0 ([\d.]+) +pi05 ([\d.]+)$", (CONFIGS / f"{way}.yaml").read_text(), flags=re.MULTILINE)
    return {(model, robot): float(said) for robot, *both in lines for model, said in zip(MODELS, both, strict=True)}


def test_every_file_is_there_and_no_other():
    assert {path.stem for path in CONFIGS.iterdir()} == {"tiny", *MODELS, *ROBOTS, *WAYS, "quickstart", "mixture_example"}
    assert all(stated_memory(way).keys() == set(product(MODELS, ROBOTS)) for way in WAYS)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_row_is_what_its_names_say(row):
    model, robot, way = row
    run = recipe(*row)
    network, embodiment = run.network(), run.embodiment
    assert (network.state_input, run.normalization) == (("token", "z_score") if model == "pi0" else ("prompt", "quantile"))
    assert (len(embodiment.cameras), *embodiment.dims()) == ROBOTS[robot]
    assert (network.action_horizon, run.execution_horizon, run.global_batch_size) == LENGTHS[model, robot]
    moved = set(range(ROBOTS[robot][2])) - set(GRIPPERS[robot]) if GRIPPERS[robot] else set()
    assert set(embodiment.delta_actions) == moved
    assert {"full": "full", "lora": "full", "expert": "expert_only"}[way] == run.train_only
    assert bool(run.lora.rank) == (way == "lora") == (run.ema_decay is None)
    assert run.pretrained == Path("outputs") / f"{model}_base"
    assert run.tokenizer == "pretrained", "released weights know one tokenizer, their own"
    assert run.output_dir == Path("outputs") / "_".join(row)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_row_fits_the_card_that_its_file_names(row):
    """The stated figure is the estimate, which builds the network on the meta device; a tenth of the card stays free."""
    run = recipe(*row)
    found = run.memory(len(run.embodiment.cameras), 1, torch.device("cuda"))
    model, robot, way = row
    assert stated_memory(way)[model, robot] == pytest.approx(found.total / GIB, abs=0.1)
    assert found.total <= (1 - SPARE) * float(header(way, "Card").removesuffix(" GiB")) * GIB


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_tiny_network_trains_on_every_robot(robot):
    run = recipe("tiny", robot)
    network = run.network()
    assert max(run.embodiment.dims()) <= min(network.action_dim, network.state_dim) <= 16
    assert run.pretrained is None and run.tokenizer == "byt5"


@pytest.mark.parametrize("name", ["tiny", *MODELS, *ROBOTS, *WAYS])
def test_the_command_in_a_file_is_a_row_with_that_file_in_it(name, repository, monkeypatch):
    monkeypatch.chdir(repository)
    words = header(name, "In a row").split(", or ")[0].split()
    assert words[:2] == ["pi0fm", "train"] and f"configs/{name}.yaml" in words
    options.parse(TrainingRun, words[2:], train.ALIASES)


def test_the_networks_of_the_recipes_are_pi0_and_pi05():
    """3.1 and 3.2 thousand million numbers, counted from the estimate's float32 weights."""
    for model, expected in (("pi0", 3.129e9), ("pi05", 3.245e9)):
        weights = recipe(model, "libero", "full").memory(2, 1, torch.device("cuda")).weights
        assert weights / 4 == pytest.approx(expected, rel=1e-3)


def test_a_recipe_of_an_older_version_is_answered_with_its_row():
    with pytest.raises(
        ConfigError, match=r"no configuration file at configs/pi05_libero_lora\.yaml; recipes are composed, type pi05 libero lora"
    ):
        recipe("configs/pi05_libero_lora.yaml")
