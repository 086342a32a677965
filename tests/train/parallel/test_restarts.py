"""Tests of workers restarted by torchrun, in one process; real ones: tests/journeys/training/test_kills.py."""

import pytest

from pi0fm.train.parallel import accelerate as parallel
from pi0fm_client.errors import ConfigError

RESTARTED = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "4", "RANK": "0"}


@pytest.fixture
def formed(monkeypatch):
    """The groups that were asked for, as (backend, prefix of the store)."""
    asked = []

    class Store:
        """Takes the place of torchrun's."""

    lent = Store()
    monkeypatch.setattr(parallel, "rendezvous", lambda url: iter([(lent, 2, 4)]) if url == "env://" else None)
    monkeypatch.setattr(parallel, "PrefixStore", lambda prefix, store: (prefix, store))
    monkeypatch.setattr(parallel.torch.distributed, "init_process_group", lambda backend, **words: asked.append((backend, words)))
    return asked, lent


def test_a_second_attempt_keeps_its_names_apart_from_the_first(formed, monkeypatch):
    asked, lent = formed
    for name, value in RESTARTED.items():
        monkeypatch.setenv(name, value)
    parallel._join_after_restart("gloo")
    assert asked == [("gloo", {"store": ("attempt-1", lent), "rank": 2, "world_size": 4})]


@pytest.mark.parametrize("usual", [{"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"WORLD_SIZE": "1"}])
def test_whoever_needs_no_names_of_its_own_is_left_to_accelerate(formed, monkeypatch, usual):
    for name, value in (RESTARTED | usual).items():
        monkeypatch.setenv(name, value)
    parallel._join_after_restart("gloo")
    assert formed[0] == []


def test_several_nodes_are_told_what_helps(formed, monkeypatch):
    for name, value in (RESTARTED | {"GROUP_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        parallel._join_after_restart("gloo")
    assert formed[0] == []
