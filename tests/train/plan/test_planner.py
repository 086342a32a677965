"""Tests of the plan against measurements: steps of an H100, and the bytes that workers send; and of its arithmetic."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_workers import workers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pi0fm.bench.harness.cases import make_batch
from pi0fm.bench.harness.sizes import Case
from pi0fm.bench.harness.steps import Trainer
from pi0fm.models.config import TINY, LoraConfig
from pi0fm.processes import in_fresh_process
from pi0fm.train.components import FULL, GRADIENTS, NONE, Adaptation, ParallelConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm.train.plan.memory import count_network
from pi0fm.train.plan.network import Group, Network
from pi0fm.train.plan.planner import best_plan, card_named, gpu_counts, known_cards, plan, plan_shardings, possible_shardings
from pi0fm.train.state import StateConfig, TrainState
from pi0fm_client.errors import ConfigError

H100 = card_named("h100")
NVLINK = Network(H100.inside, 12.5e9, H100.latency, 8)
FULL_PI0 = TrainConfig(
    model={"preset": "pi0"}, activation_checkpointing="full", ema_decay=None, precision="bfloat16", parallel=ParallelConfig(NONE)
)


WAYS = {
    "full, checkpointed, no average": (FULL_PI0, 0.02),
    "LoRA 16, checkpointed": (replace(FULL_PI0, lora=LoraConfig(rank=16), frozen_bfloat16=True, ema_decay=0.999), 0.03),
    # nothing is fitted to this one
    "expert only": (
        replace(FULL_PI0, train_only="expert_only", frozen_bfloat16=True, activation_checkpointing="none", ema_decay=0.999),
        0.06,
    ),
}


def test_one_card_is_what_was_measured(repository):
    rows = [
        row for path in (repository / "docs" / "results").glob("gpu_h100_training*.json") for row in json.loads(path.read_text())["rows"]
    ]
    found = Counter[str]()
    for row in rows:
        name, _, batch = row["what"].removeprefix("training, ").rpartition(", batch ")
        if name in WAYS and row["value"]:
            config, within = WAYS[name]
            planned = plan(replace(config, global_batch_size=int(batch)), H100, NVLINK, 1, cameras=3)
            assert planned.samples_per_second == pytest.approx(row["value"], rel=within), row["what"]
            assert planned.memory_gib == pytest.approx(row["details"]["estimate_gib"], rel=0.01)
            found[name] += 1
    assert {name: found[name] >= 2 for name in WAYS} == dict.fromkeys(WAYS, True)


def test_rings():
    network = Network(inside=100.0, between=10.0, latency=1.0, per_machine=8)
    assert network.gather(Group(1, 1), 800) == 0
    assert network.gather(Group(4, 1), 800) == 3 / 4 * 800 / 100 + 2
    assert network.gather(Group(16, 2), 800) == 15 / 16 * 800 / 10 + 4
    assert network.reduce(Group(16, 2), 800) == 2 * network.scatter(Group(16, 2), 800)
    assert network.group(16) == Group(16, 2, 1)
    assert network.group(16, replicas=2) == Group(8, 1, 1)
    assert network.across(16, replicas=2) == Group(2, 2, 8), "eight rings share a machine's network"
    assert network.group(8, replicas=2) == Group(4, 1, 2)
    assert network.across(8, replicas=2) == Group(2, 1, 4)


@pytest.mark.parametrize("card", known_cards())
def test_speed_grows_with_the_network_and_with_machines(card):
    found = {}
    for gbits in (10, 100, 400):
        network = replace(NVLINK, inside=card_named(card).inside, between=gbits * 1e9 / 8)
        for gpus in (8, 64, 512):
            config = replace(FULL_PI0, global_batch_size=8 * gpus, micro_batch_size=8, parallel=ParallelConfig())
            chosen = best_plan(plan_shardings(config, card_named(card), network, gpus, 3))
            assert chosen.fits
            assert sum(chosen.json()["shares"].values()) == pytest.approx(1)
            found[gbits, gpus] = chosen.samples_per_second
        assert found[gbits, 512] > 4 * found[gbits, 64]
    for gpus in (64, 512):
        assert found[10, gpus] < found[100, gpus] <= found[400, gpus], "PCIe of a rtx4090 is no faster than 100 Gb/s"
    assert found[10, 8] == found[400, 8], "one machine needs no network"
    if card == "h100":
        assert found[10, 64] < found[10, 8], "eight machines on a slow network are slower than one"


def test_cost_is_hours_times_cards_times_price():
    found = plan(replace(FULL_PI0, global_batch_size=64, micro_batch_size=8, steps=1000), replace(H100, price=2.0), NVLINK, 8, 3)
    assert found.hours == found.seconds * 1000 / 3600
    assert found.cost == found.hours * 8 * 2.0
    assert found.samples_per_second == 64 / found.seconds


def test_ways_and_counts():
    shardings = [config.parallel for config in possible_shardings(replace(FULL_PI0, parallel=ParallelConfig()), 32, 8)]
    assert [(each.shard, each.replicas) for each in shardings] == [(NONE, 1), (GRADIENTS, 1), (FULL, 1), (GRADIENTS, 4), (FULL, 4)]
    assert [config.parallel.shard for config in possible_shardings(FULL_PI0, 32, 8)] == [NONE]
    assert [config.parallel.shard for config in possible_shardings(replace(FULL_PI0, parallel=ParallelConfig()), 1, 8)] == [NONE]
    assert gpu_counts(12) == [1, 2, 4, 8, 12]
    assert gpu_counts(1) == [1]
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        card_named("h10")


class Sent(TorchDispatchMode):
    """Bytes of every collective, as its whole result counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.sizes[name.removeprefix("c10d::").strip("_")] += max((each.numel() * each.itemsize for each in tensors), default=0)
        return func(*args, **(kwargs or {}))


def sent_by(context: Context) -> dict[str, Counter[str]]:
    """Bytes of one step of this worker, by sharding."""
    found = {}
    for shard in (NONE, GRADIENTS, FULL):
        parallel = Parallel(context, "float32", allow_cuda=False)
        state = TrainState.build(TINY, StateConfig(parallel=ParallelConfig(shard)), None, parallel)
        trainer = Trainer(state, parallel)
        batch = make_batch(Case(TINY, (True,), TINY.max_prompt_tokens, 1), seed=0)
        valid = batch.action_mask.numel() * context.world_size
        trainer.step(iter([batch]), valid)
        with Sent() as sent:
            trainer.step(iter([batch]), valid)
        found[shard] = sent.sizes
    return found


def sent_by_two(place: Path) -> list[dict[str, Counter[str]]]:
    return workers(2, place, sent_by)


@pytest.mark.timeout(200)
def test_workers_send_the_bytes_of_the_plan(tmp_path):
    count = count_network(replace(TINY, action_horizon=1, max_prompt_tokens=1), Adaptation(), torch.float32)
    gathered = sum(unit.gathered for unit in count.units.values())
    for found in in_fresh_process(sent_by_two, tmp_path):  # a fork after another test's backward pass would have none of its threads
        assert found[NONE]["allreduce"] == pytest.approx(count.trained, rel=0.01)
        for shard, times in ((GRADIENTS, 1), (FULL, 2)):
            assert found[shard]["allgather_base"] == pytest.approx(times * gathered, rel=0.05)
            assert found[shard]["reduce_scatter_base"] == pytest.approx(count.trained, rel=0.05)
