"""Tests of the attention mask against the drawing in joint_decoder.py, cell by cell."""

import torch

from pi0fm.models.joint_decoder import residual, suffix_attention_mask


def test_mask_is_the_drawing():
    prefix = torch.tensor([[True, True, False]])
    found = suffix_attention_mask(prefix, 3, 1)[0, 0]
    expected = torch.tensor(
        [
            # prefix          state  actions
            [1, 1, 0, 1, 0, 0],  # state
            [1, 1, 0, 1, 1, 1],  # action
            [1, 1, 0, 1, 1, 1],  # action
        ],
        dtype=torch.bool,
    )
    assert torch.equal(found, expected)


def test_without_a_state_token_all_actions_see_each_other():
    assert suffix_attention_mask(torch.ones(2, 4, dtype=torch.bool), 3, 0).all()


def test_residual_with_and_without_gate():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert residual(x, y, None).tolist() == [11.0, 22.0]
    assert residual(x, y, torch.tensor([0.5, 0.0])).tolist() == [6.0, 2.0]
