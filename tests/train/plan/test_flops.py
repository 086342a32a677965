"""Tests of operations by stage against torch's counts in a real forward and backward pass."""

from dataclasses import replace

import pytest
import torch

from pi0fm.bench.harness.cases import make_batch
from pi0fm.bench.harness.limits import flop_counter
from pi0fm.bench.harness.sizes import Case
from pi0fm.models.config import TINY, LoraConfig
from pi0fm.models.pi0 import Pi0
from pi0fm.train.components import Adaptation
from pi0fm.train.plan.flops import stage_work, training_work
from pi0fm.train.start.adaptation import adapt

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def counted(how: Adaptation, draws: int) -> int:
    """Of one sample, forwards and backwards."""
    torch.manual_seed(0)
    model = adapt(Pi0(TINY), how, torch.float32).train()
    batch = make_batch(Case(TINY, (True,), TINY.max_prompt_tokens, 1), seed=0, flow_draws=draws)
    x_t = torch.randn(draws, TINY.action_horizon, TINY.action_dim)
    with flop_counter() as found:
        model(batch.observation, x_t, torch.full((draws,), 0.5)).square().mean().backward()
    return int(found.get_total_flops())


@pytest.mark.parametrize(
    ("how", "draws"),
    [
        (Adaptation(), 1),
        (Adaptation(), 3),
        (Adaptation("expert_only"), 2),
        (Adaptation("frozen_vision"), 1),
        (Adaptation(lora=LoraConfig(rank=1)), 1),
        (Adaptation(activation_checkpointing="full"), 1),
        (Adaptation("expert_only", activation_checkpointing="full"), 2),
        (Adaptation(activation_checkpointing="selective"), 1),
        (Adaptation("expert_only", activation_checkpointing="selective"), 1),
    ],
)
def test_training_is_what_torch_counts(how, draws):
    work = training_work(TINY, how, cameras=1, flow_draws=draws)
    assert work.forward + work.backward + work.recomputed == pytest.approx(counted(how, draws), rel=0.06)


def test_stages_multiply_by_what_trains():
    once = [stage.flops for stage in stage_work(TINY, 1, TINY.max_prompt_tokens).values()]
    full, expert, lora = (training_work(TINY, how, 1) for how in (Adaptation(), Adaptation("expert_only"), Adaptation(lora=LoraConfig(2))))
    assert full.forward == expert.forward == lora.forward == sum(once)
    assert full.backward == 2 * sum(once)
    assert expert.backward == 2 * once[2]
    assert lora.backward == 2 * once[0] + once[1] + once[2]
    assert replace(full, recomputed=0.0) == full
