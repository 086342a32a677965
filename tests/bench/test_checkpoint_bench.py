"""What `pi0fm bench checkpoint` counts and refuses; the measurement itself, with the tiny network, is a journey."""

from dataclasses import replace

import pytest
import tiny_dataset

from pi0fm.bench import checkpoint
from pi0fm.bench.checkpoint import CheckpointConfig, CheckpointCost
from pi0fm.bench.paired import Ratio
from pi0fm.cli import bench, bench_checkpoint
from pi0fm_client.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("every", 1, "--every must be 2 or more"), ("rounds", 0, "--rounds must be 1 or more"), ("case", "tinny", "did you mean 'tiny'")],
)
def test_options_out_of_range_are_refused(name, value, words):
    with pytest.raises(ConfigError, match=words):
        CheckpointConfig(**{name: value})


def test_the_last_line_says_the_share_of_a_step(monkeypatch, capsys):
    """Blocks of 50 steps, 2 % and 4 % slower; the checkpoint takes 4 of the 50, and would be one of 1000 steps in training."""
    cost = CheckpointCost(Ratio(1.02, 1.01, 1.03, 5.1, 5.0), Ratio(1.04, 1.03, 1.05, 5.2, 5.0), 0.02, 4.0, 46 * 2**20, 3)
    monkeypatch.setattr(bench_checkpoint, "measure", lambda config: cost)
    last = bench_checkpoint.run(CheckpointConfig(every=50))
    assert (last["slowdown"], last["interval"], last["bytes"], last["blocking_seconds"]) == (0.02, [0.01, 0.03], 46 * 2**20, 0.02)
    assert (last["cpu_slowdown"], last["slowdown_every_1000"], last["slowdown_while_written"]) == (0.04, 0.001, 0.25)
    assert last["step_seconds"] == 0.1
    shown = capsys.readouterr().err
    assert "2.00 %" in shown and "0.10 %" in shown and "after 4 steps, of which each was slower by 25.0 %" in shown


def test_blocks_are_alike_but_for_one_checkpoint(monkeypatch, tmp_path):
    """Two blocks of three steps: six steps, one checkpoint behind the first, removed with its folder at the end."""
    taken, saved = [], []
    small = replace(checkpoint.case_named("tiny"), config=tiny_dataset.network())
    monkeypatch.setattr(checkpoint, "case_named", lambda _: small)
    monkeypatch.setattr(checkpoint, "step_of", lambda *_: lambda: taken.append(1))

    class Spied(checkpoint.Checkpoints):
        def save(self, step, tensors, facts):
            saved.append((len(taken), step, facts["step"]))
            super().save(step, {name: tensors[name] for name in sorted(tensors)[:3]}, facts)

    monkeypatch.setattr(checkpoint, "Checkpoints", Spied)
    cost = checkpoint.measure(CheckpointConfig(every=3, rounds=1, batch_size=1, precision="float32", folder=tmp_path))
    assert len(taken) == 12 and saved == [(1, 1, 1), (7, 7, 7)]  # the warming round, then the one that counts
    assert cost.wall.first_seconds > 0 and cost.blocking > 0 and 1 <= cost.steps <= 3 and cost.bytes > 1000
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_listed():
    assert bench.SUBCOMMANDS["checkpoint"] == bench_checkpoint.HELP
    assert bench_checkpoint.Options is CheckpointConfig
