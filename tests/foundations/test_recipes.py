"""The shipped fine-tuning recipes: each is read strictly, built on the meta device, and fits the card that its header names."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from pi0fm import options
from pi0fm.cluster.training import TrainingRun
from pi0fm.train.plan.memory import GIB, estimate_run

CONFIGS = Path(__file__).parents[2] / "configs"
ROBOTS = {"libero": (2, 8, 7), "aloha": (3, 14, 14), "droid": (2, 8, 8), "so101": (2, 6, 6)}  # cameras, width of state, of actions
GRIPPERS = {"libero": (), "aloha": (6, 13), "droid": (7,), "so101": (5,)}  # action dimensions that stay absolute, where others do not
NAMES = [f"{kind}_{robot}_{how}" for kind in ("pi0", "pi05") for robot in ROBOTS for how in ("full", "lora", "expert")]
SPARE = 0.1  # of a card, for its driver, its allocator's gaps and the kernels


@cache
def recipe(name: str) -> TrainingRun:
    return options.decode(TrainingRun, options.read_yaml(CONFIGS / f"{name}.yaml"))


def header(name: str, field: str) -> str:
    found = re.findall(rf"^# {field} +(.*)$", (CONFIGS / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    assert len(found) == 1, f"{name} needs one line '# {field}'"
    return found[0]


def test_every_recipe_is_there_and_no_other():
    assert sorted(path.stem for path in CONFIGS.glob("pi0*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_its_name_does(name):
    kind, robot, how = name.split("_")
    run = recipe(name)
    network, embodiment = run.network(), run.embodiment
    assert (network.state_input, run.normalization) == (("token", "z_score") if kind == "pi0" else ("prompt", "quantile"))
    assert (len(embodiment.cameras), *embodiment.dims()) == ROBOTS[robot]
    moved = set(range(ROBOTS[robot][2])) - set(GRIPPERS[robot]) if GRIPPERS[robot] else set()
    assert set(embodiment.delta_actions) == moved
    assert {"full": "full", "lora": "full", "expert": "expert_only"}[how] == run.train_only
    assert bool(run.lora.rank) == (how == "lora")
    assert run.pretrained is not None
    assert run.tokenizer == "pretrained", "released weights know one tokenizer, their own"
    assert header(name, "Command") == f"pi0fm train configs/{name}.yaml"
    assert run.output_dir == Path("outputs") / name


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_the_card_of_its_header(name):
    """The header's figure is the estimate, which builds the network on the meta device; a tenth of the card stays free."""
    run = recipe(name)
    found = estimate_run(run, len(run.embodiment.cameras), run.num_workers, torch.device("cuda"))
    card = float(header(name, "Card").removesuffix(" GiB"))
    said = float(header(name, "Memory").split()[0])
    assert said == pytest.approx(found.total / GIB, abs=0.1)
    assert found.total <= (1 - SPARE) * card * GIB


def test_the_networks_of_the_recipes_are_pi0_and_pi05():
    """3.1 and 3.2 thousand million numbers, counted from the estimate's float32 weights."""
    for name, expected in (("pi0_libero_full", 3.129e9), ("pi05_libero_full", 3.245e9)):
        run = recipe(name)
        weights = estimate_run(run, 2, 1, torch.device("cuda")).weights
        assert weights / 4 == pytest.approx(expected, rel=1e-3)
