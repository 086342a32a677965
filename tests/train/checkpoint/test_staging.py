"""Tests of copies on the host: equal numbers through small pieces, the same memory again, nothing that training can change."""

import pytest
import torch

from pi0fm.train.checkpoint.staging import HostCopies, copy_in_pieces

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool)


def state(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    kept = {str(kind): (torch.randn(5, 7, generator=random) * 9).to(kind) for kind in KINDS}
    return kept | {"step": torch.tensor(2.5 + seed), "empty": torch.empty(0, 4), "turned": torch.randn(6, 3, generator=random).T}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("size", [1, 8, 60, 64, 1000, 10**6])
def test_numbers_pass_through_pieces_of_any_size(size):
    """On a card the pieces are page-locked; a tensor is cut between them anywhere, also inside a number."""
    given = state(0)
    targets = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in given.items()}
    pieces = tuple(torch.full((size,), 255, dtype=torch.uint8) for _ in range(2))
    copy_in_pieces([(given[name], targets[name]) for name in given], pieces)
    assert equal(targets, given)


def test_copies_reuse_their_memory_and_do_not_follow_the_state():
    copies, given = HostCopies(), state(1)
    first = copies.of(given)
    for value in given.values():
        value.zero_()
    assert equal(first, state(1))
    again = copies.of(state(2))
    assert equal(again, state(2))
    assert {name: value.data_ptr() for name, value in first.items()} == {name: value.data_ptr() for name, value in again.items()}
