"""Tests of a prompt's text against LeRobot 0.6.1's processors, unusual prompts included."""

import numpy as np
import pytest
import torch
from lerobot.lerobot_types import TransitionKey
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.utils.constants import OBS_STATE

from pi0fm.data.prompt import PromptTokenizer, load_tokenizer

PROMPTS = ["press the button", " open_the drawer ", "two  spaces\nand a line", "ends\n", "öffne_es"]
STATES = np.random.default_rng(0).uniform(-1.2, 1.2, (len(PROMPTS), 5)).astype(np.float32)
STATES[0, :3] = -1.0, 1.0, 0.0


def ours(with_state: bool, dialect: str) -> list[str]:
    asked = PromptTokenizer(load_tokenizer("byt5", 384), 200, with_state, dialect)
    return [asked.text(prompt, state) for prompt, state in zip(PROMPTS, STATES, strict=True)]


def test_pi0():
    assert ours(False, "lerobot") == Pi0NewLineProcessor().complementary_data({"task": PROMPTS})["task"]


@pytest.mark.parametrize("dialect", ["lerobot", "openpi"])
def test_pi05_in_which_both_peers_write_the_same(dialect):
    step = Pi05PrepareStateTokenizerProcessorStep()
    given = {TransitionKey.OBSERVATION: {OBS_STATE: torch.from_numpy(STATES)}, TransitionKey.COMPLEMENTARY_DATA: {"task": list(PROMPTS)}}
    assert ours(True, dialect) == step(given)[TransitionKey.COMPLEMENTARY_DATA]["task"]
