"""Tests of a device out of memory: the run ends in one line, whose options fit; a saved run continues bitwise."""

import re

import pytest
import small_runs
import torch

from pi0fm.train import loop
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.watch.out_of_memory import OutOfMemoryError
from pi0fm_client.errors import ConfigError

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\n of which")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("error", [CUDA, HOST, MemoryError()], ids=["cuda", "host", "python"])
def test_a_full_device_is_said_in_one_line_and_the_run_goes_on_with_what_it_says(configure, tmp_path, monkeypatch, error):
    config, real, calls = configure(tmp_path / "run", checkpoint_every=2, steps=4), loop.train_step, iter(range(3))

    def full(*arguments):
        if next(calls, None) is None:
            raise error
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(OutOfMemoryError) as caught:
        small_runs.start(config)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("cpu is full (")
    assert re.search(r"memory of a worker: about \S+ MiB \(weights .*moments .*activations", line)
    for words in (
        "--micro_batch_size 4 (about",
        "--activation_checkpointing full",
        "--resume true",
        "--train_only expert_only",
        "--lora.rank 16",
    ):
        assert words in line
    monkeypatch.undo()
    found = small_runs.start(configure(tmp_path / "run", checkpoint_every=2, steps=4, resume="true", activation_checkpointing="full"))
    assert small_runs.differing(found, small_runs.start(configure(tmp_path / "whole", steps=4))) == []


def test_what_cannot_fit_is_refused_before_pictures_are_decoded_with_options_that_fit(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_data", lambda *_: pytest.fail("pictures were opened"))
    config = configure(tmp_path / "run")
    needed = config.memory(1, 1, torch.device("cpu")).total
    monkeypatch.setattr(Parallel, "room", lambda self: int(needed / 1.4))
    with pytest.raises(ConfigError, match=r"a worker needs about .* found .* for each; type --") as fault:
        small_runs.start(config)
    assert "--resume" not in str(fault.value) and "expert_only" in str(fault.value)
    monkeypatch.setattr(Parallel, "room", lambda self: 1000)
    with pytest.raises(ConfigError, match="fits with none of pi0fm's options"):
        small_runs.start(config)


@pytest.mark.usefixtures("shapes_unchecked")
def test_another_error_of_a_step_passes(configure, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        small_runs.start(configure(tmp_path / "run"))
