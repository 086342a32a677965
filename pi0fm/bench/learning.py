"""pi0fm against LeRobot's own PI0: one task, the same demonstrations, the same size, the same processor time.

Owns: which training comes when, what is alike and what is not, the figures of the whole.
Does not know: simulators (it is handed `judge`), how the demonstrations came about.

    seed 0: pi0fm trains -> is judged | LeRobot trains -> is judged | seed 1: pi0fm ... one process, one after the other

With `steps` instead of processor time a policy is a function of the data, the configuration and the seed, on a busy machine too: that
tells what each part of a recipe brings a step, and the processor seconds that stand beside it what the part costs.

Alike: the parameters that take part (8 query heads on both sides, since LeRobot's PI0 runs no other number), the frames decoded in
memory, the samples of each step, the batch size, the peak learning rate, the threads, the calibration that stretches each side's own
schedule over its budget (the same one, unless LeRobot is given another), the start positions, the rule of the noise seeds, the
execution horizon, 10 Euler steps.
Charged to each: making its batches, forward, backward, optimiser, average. Charged to neither: imports, building, decoding,
calibration, evaluation.
Not alike, because each side runs as shipped: bfloat16 where the processor has it and a moving average of the weights here, float32 and the
last weights there; GELU by the error function here (the preset says so), by its tanh approximation there; padded prompts there;
steps past an episode's end are left out of the loss here and count there, so the two losses are not to be compared with each other.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pi0fm import options, progress
from pi0fm.bench.budget import TrainingPlan, TrainingResult
from pi0fm.bench.learning_config import SIDES, LearningConfig
from pi0fm.bench.lerobot_pi0 import QUERY_HEADS, ShrunkPI0, policy_config, processors, same_size
from pi0fm.bench.lerobot_policy import LeRobotPolicy
from pi0fm.bench.lerobot_training import train_lerobot
from pi0fm.bench.pi0fm_training import train_pi0fm
from pi0fm.bench.shared_data import SharedData, lerobot_batch
from pi0fm.eval.summary import Summary
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.train.config import TrainConfig
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm_client.types import Policy

CALIBRATION_STEPS = 10
FLOW_STEPS = 10  # LeRobot's default, with Euler

Judge = Callable[[Policy], Summary]


@dataclass(frozen=True)
class Outcome:
    """One training of one side, judged."""

    side: str
    seed: int
    result: TrainingResult
    summary: Summary

    @property
    def success(self) -> float | None:
        """Rate over the start positions; None when every episode crashed."""
        return None if self.summary.mean is None else round(self.summary.mean.rate, 4)


def comparable(run: TrainConfig, config: LearningConfig) -> TrainConfig:
    """`run` at a shape that LeRobot's PI0 can take, sampled as LeRobot samples. Raises ConfigError when there is no such shape."""
    heads = {"num_heads": QUERY_HEADS, "head_dim": same_size(run.network()).head_dim}
    model = options.merge(run.model, {"decoder": heads})
    flow = replace(run.flow, solver="euler", num_flow_steps=FLOW_STEPS)
    return replace(run, model=model, flow=flow, dataset=config.dataset, threads=config.threads)


def compare(config: LearningConfig, run: TrainConfig, data: SharedData, judge: Judge) -> list[Outcome]:
    """Train and judge both sides with each seed, in turn. run: what `comparable` returned, and what `data` was opened with."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()  # a setting of the process: pi0fm's training makes it, and LeRobot's is to gain from it as well
    outcomes = []
    for seed in range(config.seeds):
        for side in config.sides:
            plan = TrainingPlan(config.budget(side), run.optimizer.learning_rate, seed, config.steps, CALIBRATION_STEPS)
            progress.say(f"\n{side}, seed {seed} of 0 to {config.seeds - 1}")
            policy, result = _train(side, run, data, plan)
            outcomes.append(Outcome(side, seed, result, judge(policy)))
            del policy
            gc.collect()  # not within the next one's budget
    return outcomes


def parameters(data: SharedData) -> dict[str, int]:
    """Parameters of both sides, and how many of LeRobot's take part.

    Its two language heads, and what of the last backbone layer only feeds the prefix's own output, never get a gradient that is not zero.
    """
    size = same_size(data.policy.model)
    lerobot_config = policy_config(size, data.robot)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        policy = ShrunkPI0(lerobot_config, size)
        raw = lerobot_batch(data.collator(0), 0, 2)
        pictures = {key: value.float() / 255 for key, value in raw.items() if key.startswith("observation.images")}
        loss, _ = policy.forward(processors(lerobot_config, data.lerobot_stats())[0](raw | pictures))
        loss.backward()
    used = sum(weight.numel() for weight in policy.parameters() if weight.grad is not None and bool(weight.grad.any()))
    return {"pi0fm": parameter_count(Pi0(data.policy.model)), "lerobot": parameter_count(policy), "lerobot_used": used}


def figures(outcomes: list[Outcome]) -> dict[str, dict[str, list[Any]]]:
    """For each side, success, CPU-seconds and steps by seed, and what explains them."""
    columns: dict[str, Callable[[Outcome], Any]] = {
        "success": lambda outcome: outcome.success,
        "cpu_seconds": lambda outcome: round(outcome.result.cpu_seconds, 3),
        "steps": lambda outcome: outcome.result.steps,
        "scheduled_steps": lambda outcome: outcome.result.scheduled_steps,
        "crashes": lambda outcome: outcome.summary.crashes,
    }
    by_side = {side: [outcome for outcome in outcomes if outcome.side == side] for side in SIDES}
    return {side: {name: [read(outcome) for outcome in found] for name, read in columns.items()} for side, found in by_side.items()}


def curves(outcomes: list[Outcome]) -> dict[str, list[dict[str, list[float | None]]]]:
    """For each side and seed, the loss of each step and the CPU-seconds spent by then; null stands for a loss that is not finite."""
    return {side: [_curve(outcome.result) for outcome in outcomes if outcome.side == side] for side in SIDES}


def _train(side: str, run: TrainConfig, data: SharedData, plan: TrainingPlan) -> tuple[Policy, TrainingResult]:
    if side == "pi0fm":
        here = train_pi0fm(run, data, plan)
        return here.policy, here.result
    collator, count = data.collator(plan.seed), run.global_batch_size
    size = same_size(data.policy.model)
    trained = train_lerobot(size, data.robot, data.lerobot_stats(), lambda step: lerobot_batch(collator, step * count, count), plan)
    return LeRobotPolicy(trained), trained.result


def _curve(result: TrainingResult) -> dict[str, list[float | None]]:
    losses = [round(loss, 6) if math.isfinite(loss) else None for loss in result.losses]
    return {"cpu_seconds": [round(seconds, 3) for seconds in result.spent], "loss": losses}
