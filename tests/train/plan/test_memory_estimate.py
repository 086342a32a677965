"""Tests of the estimate against every allocation of a real step, counted by torch's profiler on a CPU."""

import json
from pathlib import Path

import pytest
import small_pi0
import torch

from pi0fm.models.config import LoraConfig, Pi0Config
from pi0fm.models.observation import ModelObservation
from pi0fm.models.parts import part_of
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.train.components import TRAINED, Adaptation, OptimizerConfig, ParallelConfig
from pi0fm.train.config import TrainConfig
from pi0fm.train.ema import Ema
from pi0fm.train.optim import make_optimizer
from pi0fm.train.plan.memory import GIB, MemoryEstimate, estimate, resolve_sharding
from pi0fm.train.start.adaptation import adapt

FACTOR = 1.4  # the estimate lies between the measured peak and this many times it; 1.03 to 1.38 were found
BATCH, CAMERAS = 4, 2
# pi0's proportions, in which neither weights nor activations hide the other
SIZES = {"vocab_size": 512, "max_prompt_tokens": 24, "action_dim": 8, "state_dim": 8, "action_horizon": 16}
LIKE_PI0, LIKE_PI05 = small_pi0.both(
    small_pi0.resized(
        vision={"width": 64, "depth": 4, "num_heads": 4, "mlp_width": 240, "patch_size": 14, "image_size": 84},
        decoder={"backbone": {"width": 96, "mlp_width": 512}, "action_expert": {"width": 48, "mlp_width": 160}}
        | {"depth": 4, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16},
        **SIZES,
    )
).values()
LORA = LoraConfig(rank=4)


def observation() -> ModelObservation:
    return small_pi0.observation(BATCH, CAMERAS, (LIKE_PI0.max_prompt_tokens,) * BATCH, LIKE_PI0)


def measured(config: Pi0Config, how: Adaptation, draws: int, averaged: bool, computes: torch.dtype, by_row: bool, where: Path) -> int:
    """Bytes at the highest moment of the second step: what is held before it, and the profiler's running sum within it."""
    torch.manual_seed(0)
    model = Pi0(config)
    adapt(model, how, computes)
    model.train()
    optimizer, ema = make_optimizer(OptimizerConfig(), model), Ema(model, 0.9 if averaged else None)
    seen, t = observation(), torch.rand(BATCH * draws, *([config.action_horizon] if by_row else []))
    x_t = torch.randn(BATCH * draws, config.action_horizon, config.action_dim)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=computes == torch.bfloat16):
            loss = model(seen, x_t, t).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(0)

    step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *moments, *ema.average.values()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(where))
    events = [event for event in json.loads(where.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        running += event["args"]["Bytes"]
        peak = max(peak, running)
    assert peak > 0
    return held + peak


CASES = {
    "pi0 full": (LIKE_PI0, Adaptation(), 1, True, torch.float32, False),
    "pi0 full, checkpointed": (LIKE_PI0, Adaptation(activation_checkpointing="full"), 1, True, torch.float32, False),
    "pi0 full, selective": (LIKE_PI0, Adaptation(activation_checkpointing="selective"), 1, True, torch.float32, False),
    "pi05 full, bfloat16, selective": (LIKE_PI05, Adaptation(activation_checkpointing="selective"), 4, False, torch.bfloat16, False),
    "pi0 expert": (LIKE_PI0, Adaptation("expert_only"), 1, True, torch.float32, False),
    "pi05 full, bfloat16": (LIKE_PI05, Adaptation(), 4, False, torch.bfloat16, False),
    "pi05 lora, bfloat16, checkpointed": (LIKE_PI05, Adaptation("frozen_vision", LORA, True, "full"), 1, False, torch.bfloat16, False),
    "pi05 held rows, bfloat16": (LIKE_PI05, Adaptation(), 4, False, torch.bfloat16, True),
    "pi05 held rows, bfloat16, selective": (LIKE_PI05, Adaptation(activation_checkpointing="selective"), 4, False, torch.bfloat16, True),
}


def estimated(config: Pi0Config, how: Adaptation, draws: int, averaged: bool, computes: torch.dtype, by_row: bool) -> MemoryEstimate:
    run = {"cameras": CAMERAS, "micro_batch": BATCH, "flow_draws": draws, "averaged": averaged, "by_row": by_row}
    return estimate(config, how, **run, computes=computes, device="cpu")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, int]:
    """Each case measured once."""
    where = tmp_path_factory.mktemp("traces") / "trace.json"
    return {case: measured(*CASES[case], where) for case in CASES}


@pytest.mark.usefixtures("shapes_unchecked")
def test_the_estimate_is_a_close_upper_bound(peaks):
    ratios = {case: estimated(*CASES[case]).total / peak for case, peak in peaks.items()}
    assert {case: ratio for case, ratio in ratios.items() if not 1 <= ratio <= FACTOR} == {}


def test_checkpointing_and_freezing_lower_the_measured_peak(peaks):
    assert peaks["pi0 full, checkpointed"] < 0.7 * peaks["pi0 full"]
    assert peaks["pi0 full, checkpointed"] < 0.9 * peaks["pi0 full, selective"] and peaks["pi0 full, selective"] < 0.9 * peaks["pi0 full"]
    assert peaks["pi05 full, bfloat16, selective"] < 0.9 * peaks["pi05 full, bfloat16"]
    assert peaks["pi0 expert"] < 0.5 * peaks["pi0 full"]
    assert peaks["pi05 lora, bfloat16, checkpointed"] < 0.4 * peaks["pi05 full, bfloat16"]


def test_parts_by_hand():
    """Every number: 4 bytes of weight, 4 of gradient, 8 of moments, 4 of average; nothing but weights where it is frozen."""
    numbers = parameter_count(Pi0(LIKE_PI0))
    full = estimated(LIKE_PI0, Adaptation(), 1, True, torch.float32, False)
    assert (full.weights, full.gradients, full.moments, full.average, full.casts) == (*(each * numbers for each in (4, 4, 8, 4)), 0)
    trained = sum(parameter.numel() for name, parameter in Pi0(LIKE_PI0).named_parameters() if part_of(name) in TRAINED["expert_only"])
    expert = estimated(LIKE_PI0, Adaptation("expert_only"), 1, False, torch.float32, False)
    assert (expert.weights, expert.gradients, expert.moments, expert.average) == (4 * numbers, 4 * trained, 8 * trained, 0)


def test_more_of_anything_costs_more():
    run = {"cameras": 2, "micro_batch": 4, "computes": torch.float32, "device": "cpu"}
    base = estimate(LIKE_PI0, Adaptation(), **run).total
    more = ({"cameras": 3}, {"micro_batch": 5}, {"flow_draws": 2}, {"accumulates": True})
    assert all(estimate(LIKE_PI0, Adaptation(), **(run | change)).total > base for change in more)


def test_a_state_that_is_cut_is_divided_by_its_workers():
    """Under DDP gradients stand all the time; a cut state gathers what it multiplies, and reduces in float32."""
    run = {"cameras": CAMERAS, "micro_batch": BATCH, "computes": torch.float32, "device": "cpu"}
    alone, ddp = (estimate(LIKE_PI0, Adaptation(), **run, world_size=size) for size in (1, 4))
    assert ddp.weights == alone.weights and ddp.pass_ == alone.activations + alone.gradients > alone.pass_
    cut = {
        how: estimate(LIKE_PI0, Adaptation(), **run, world_size=4, parallel=how)
        for how in (ParallelConfig("gradients"), ParallelConfig("full"), ParallelConfig("full", replicas=2))
    }
    once, full, copies = cut.values()
    for kind in ("weights", "moments", "average", "gradients"):
        assert getattr(full, kind) == getattr(once, kind) == pytest.approx(getattr(ddp, kind) / 4, abs=4)
        assert getattr(copies, kind) == pytest.approx(getattr(ddp, kind) / 2, abs=4)
    assert full.gathered < once.gathered == ddp.weights
    assert full.total < once.total and full.total < copies.total


def test_auto_takes_the_first_that_fits_and_says_so():
    needs = {"none": 64, "gradients": 40, "full": 20}
    given = {room: resolve_sharding(ParallelConfig(), lambda how: needs[how.shard] * GIB, 8, room * GIB) for room in (80, 48, 24, 16)}
    assert [how.shard for how, _ in given.values()] == ["none", "gradients", "full", "full"]
    assert given[48][1] == "parallel.shard gradients: none needs 64.0, gradients needs 40.0 of the 48.0 GiB that a worker has"
    assert resolve_sharding(ParallelConfig("full"), lambda how: 0, 8, 0) == (ParallelConfig("full"), None)
    assert resolve_sharding(ParallelConfig(), lambda how: 0, 1, 0) == (ParallelConfig("none"), None)


def test_the_line_at_the_start_names_the_sum():
    config = TrainConfig(precision="float32", global_batch_size=8, micro_batch_size=4)
    found = config.memory(1, 1, torch.device("cpu"))
    said = f"memory of a worker: about {found.total / 2**20:.1f} MiB (weights {found.weights / 2**20:.1f}, "
    assert str(found).startswith(said)
