"""Tests of the comparisons in `pi0fm bench checkpoint` and `pi0fm bench density`, independent of this machine's speed."""

from dataclasses import replace

import pytest
import tiny_dataset

from pi0fm.bench import checkpoint, density
from pi0fm.bench.checkpoint import Block
from pi0fm.bench.config import CheckpointOptions, LikelihoodOptions
from pi0fm.bench.harness.measure import PairedRatio
from pi0fm.models.config import preset


def test_blocks_are_alike_but_for_one_checkpoint(monkeypatch, tmp_path):
    """Two blocks of three steps: six steps, one checkpoint behind the first, removed with its folder at the end."""
    taken, saved = [], []
    monkeypatch.setitem(checkpoint.CASES, "tiny", replace(checkpoint.CASES["tiny"], config=tiny_dataset.network()))
    monkeypatch.setattr(checkpoint.Trainer, "step_on", lambda self, _: lambda: (taken.append(1), self.state.advance()))

    class Spied(checkpoint.Checkpoints):
        def save(self, step, tensors, facts):
            saved.append((len(taken), step, facts["step"]))
            super().save(step, {name: tensors[name] for name in sorted(tensors)[:3]}, facts)

    monkeypatch.setattr(checkpoint, "Checkpoints", Spied)
    options = CheckpointOptions(every=3, rounds=1, batch_size=1, precision="float32", folder=tmp_path)
    found = checkpoint.measure(options).figures
    assert len(taken) == 12
    assert sorted(saved) in ([(1, 1, 1), (10, 10, 10)], [(4, 4, 4), (7, 7, 7)])  # the warming round, then the one that counts
    assert found["step_seconds"] > 0 and found["blocking_seconds"] > 0 and 1 <= found["steps_until_written"] <= 3
    assert found["bytes"] > 1000 and found["parameters"] > 1000
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoints_share_of_a_step():
    """Blocks of 50 steps, 2 % and 4 % slower; the checkpoint takes 4 of the 50, and would be one of 1000 steps in training."""
    wall, with_one, without = PairedRatio(1.02, (1.01, 1.03), 5.1, 5.0), Block(5.2, 0.02, 4), Block(5.0, 0.0, 0)
    found = checkpoint.figures_of(CheckpointOptions(every=50), wall, [with_one], [without])
    names = ("slowdown", "cpu_slowdown", "slowdown_every_1000", "slowdown_while_written", "step_seconds", "blocking_seconds")
    assert [found[name] for name in names] == pytest.approx([0.02, 0.04, 0.001, 0.25, 0.1, 0.02])
    assert found["interval"] == pytest.approx([0.01, 0.03])


@pytest.mark.usefixtures("shapes_unchecked")  # the checks would be most of the time
def test_both_sides_of_a_density_take_the_same_evaluations(monkeypatch):
    """Every comparison runs each side; the network's calls are counted."""
    calls, counts = [], []

    def counting(first, second, rounds):
        for work in (first, second):
            before = len(calls)
            work()
            counts.append(len(calls) - before)
        return PairedRatio(1.0, (0.9, 1.1), 1.0, 1.0)

    def spied(*given, **options):
        policy = make(*given, **options)
        assert policy.model.config == preset("tiny")
        policy.model.action_out.register_forward_hook(lambda *_: calls.append(1))
        return policy

    make = density.random_policy
    monkeypatch.setattr(density, "paired_ratio", counting)
    monkeypatch.setattr(density, "random_policy", spied)
    found = density.measure(LikelihoodOptions(num_flow_steps=2, solver="heun", rounds=3)).figures
    assert counts == [4] * 6
    assert (found["ratio"], found["interval"], found["evaluations"], found["rounds"]) == (1.0, (0.9, 1.1), 4, 3)
    assert set(found) >= {"log_prob_seconds", "sample_seconds", "one_pass", "call", "num_probes", "policy"}
