"""Success rates of pi0fm and LeRobot's PI0 trained on one task: the same demonstrations, network size and processor time.

Owns: the order of the trainings, how each side trains on the shared data, the figures. Does not know: LeRobot's network
(bench/harness/peer), how an episode is run (eval/rollouts/rollout), how demonstrations are recorded (demos).

    seed 0: pi0fm trains -> is evaluated | LeRobot trains -> is evaluated | seed 1: pi0fm ... in one process, one after the other

    build -> [calibration on a copy: seconds per step -> length of the schedule] -> step, step, ... until the seconds are spent
                                 not charged                                          charged

With `steps` instead of processor time a policy is a function of the data, the configuration and the seed, even on a busy machine.

Equal: the number of parameters in use (8 query heads, the only number that LeRobot's PI0 supports), the frames, decoded in memory, the
samples of each step, the batch size, the peak learning rate, the threads, the calibration that stretches each side's schedule over its
budget (the same budget, unless LeRobot is given another), the start positions, the rule of the noise seeds, the execution horizon, 10 Euler
steps.
Charged to each side: making its batches, forward, backward, optimiser, average. Charged to neither: imports, building, decoding,
calibration, evaluation. `LeRobotDataset` would spend about 80 % of a laptop's processor time on queries in Python, which would hide the
difference in learning, so both sides read frames that are decoded in memory.
LeRobot's side is its `lerobot_train` on one process: its optimiser and scheduler presets (AdamW, clipping at 1, warm-up that scales with
the number of steps, cosine to a tenth); the preset's learning rate, 2.5e-5 for 3 billion pretrained parameters, is replaced by the shared
one.
Different, because each side runs as shipped: ours takes bfloat16 where the processor has it, a moving average of the weights and GELU by
the error function; LeRobot's takes float32, the last weights, GELU by the tanh approximation and padded prompts. Steps past an episode's
end are left out of our loss and count in LeRobot's, so the two losses are not comparable.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from pi0fm import options as option_files
from pi0fm import progress
from pi0fm.bench.config import LearningOptions
from pi0fm.bench.harness.cases import FLOW_STEPS
from pi0fm.bench.harness.measure import BenchReport, seconds_of
from pi0fm.bench.harness.steps import Trainer, their_step
from pi0fm.data.columns.lerobot_source import LeRobotSource, open_source
from pi0fm.data.columns.norm_stats import NormStats
from pi0fm.data.loading.loader import Collator, action_chunks
from pi0fm.data.order.counter import slots
from pi0fm.data.order.split import split
from pi0fm.data.pictures.frame_cache import FrameCache, open_cache
from pi0fm.demos.config import DatasetName, DemosConfig
from pi0fm.demos.record import record_here
from pi0fm.eval.config import EvalConfig, camera_specs, plan, refuse_seen_seeds
from pi0fm.eval.evaluate import WorkerSetup, in_this_process, run_episodes, settings_for
from pi0fm.eval.summary import Summary, summarize
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.pi0 import Pi0, parameter_count
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm.processes import cpu_seconds_of_tree
from pi0fm.sim import catalog
from pi0fm.train.config import TrainConfig
from pi0fm.train.data import policy_config
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.allocator import keep_freed_memory
from pi0fm.train.parallel.context import Context
from pi0fm.train.state import TrainState
from pi0fm_client.errors import ConfigError, DatasetError
from pi0fm_client.types import ActionChunk, Observation, Policy

CALIBRATION_STEPS = 10
# Options of a training configuration that a comparison ignores (its workers), and those that it refuses: both sides train from scratch on
# all demonstrations of one task.
PLACEMENT = ("num_workers", "gpus_per_worker", "cpus_per_worker", "max_failures", "ray_address", "ship_code", "resize_seconds")
NOT_COMPARED = (
    *("validation", "mixture", "pretrained", "pretrained_norm_stats", "train_only", "lora", "frozen_bfloat16"),
    *("activation_checkpointing", "augment", "augmentation", "resume"),
)


def measure(options: LearningOptions) -> BenchReport:
    """Record missing demonstrations, train and evaluate both sides. Loss curves are written to learning.json only."""
    base = read_training(options.config or option_files.shipped()["quickstart"])
    if options.dataset.root is None and not options.dataset.repo_id:
        root = options.output_dir / "dataset"
        # in this process: Ray's processes would go on running during the trainings
        demos = DemosConfig(options.task, options.demonstrations, dataset=DatasetName("local/bench-learning", str(root)), num_workers=0)
        record_here(demos)
        options = replace(options, dataset=replace(options.dataset, root=root))
    progress.say("loading LeRobot")
    run = with_lerobots_heads(base, options)
    data = open_shared(run, catalog.prompt_of(options.task))
    judge = make_evaluator(options, run.execution_horizon, data.policy)
    sizes = parameters(data)
    progress.say(f"parameters: pi0fm {sizes['pi0fm']:,}; LeRobot {sizes['lerobot']:,}, of which {sizes['lerobot_used']:,} are used")
    figures, curves = compare(options, run, data, judge)
    background = {"curves": curves, "training": option_files.encode(run)}
    found = {"task": options.task, **figures, "parameters": sizes}
    return BenchReport(found, {"by seed": figures, **{name: found[name] for name in ("task", "parameters")}}, background)


def read_training(path: Path) -> TrainConfig:
    """Read our side's training configuration. Raises ConfigError for options that a comparison cannot honour."""
    tree = {name: value for name, value in option_files.read_files([str(path)]).items() if name not in PLACEMENT}
    run, usual = option_files.decode(TrainConfig, tree), TrainConfig()
    given = [name for name in NOT_COMPARED if getattr(run, name) != getattr(usual, name)]
    if given:
        raise ConfigError(
            f"a comparison trains both sides from scratch on all of one task's demonstrations and evaluates them in the simulator, "
            f"found {', '.join(given)} in --config; leave {'it' if len(given) == 1 else 'them'} out"
        )
    return run


def with_lerobots_heads(run: TrainConfig, options: LearningOptions) -> TrainConfig:
    """`run` with a network shape that LeRobot's PI0 supports and LeRobot's solver. Raises ConfigError when there is no such shape."""
    from pi0fm.bench.harness.peer import at_lerobots_heads  # LeRobot's import alone takes many seconds

    decoder = at_lerobots_heads(run.network()).decoder
    model = option_files.merge(run.model, {"decoder": {"num_heads": decoder.num_heads, "head_dim": decoder.head_dim}})
    flow = replace(run.flow, solver="euler", num_flow_steps=FLOW_STEPS)
    return replace(run, model=model, flow=flow, dataset=options.dataset, threads=options.threads)


@dataclass(frozen=True)
class SharedData:
    """Demonstrations that both sides learn from; `policy` is how pi0fm's side reads them.

    data set -> frames decoded once, copied into memory
                                                 |
    position in the stream -> frame numbers -----+--> Collator      -> pi0fm's Batch
                                                 '--> lerobot_batch -> LeRobot's dict
    """

    source: LeRobotSource
    cache: FrameCache
    stats: NormStats
    policy: PolicyConfig

    def collator(self, seed: int, flow_draws: int = 1) -> Collator:
        """Collator of pi0fm's batches, in the order of `seed`."""
        model = self.policy.model
        return Collator(self.source, self.cache, self.policy.chain(self.stats), model.action_horizon, model.action_dim, seed, flow_draws)

    def lerobot_stats(self) -> dict[str, dict[str, Any]]:
        """Mean and standard deviation in the form of LeRobot's processors; pi0fm's values, before its floor is applied."""
        columns = {"observation.state": self.stats.state, "action": self.stats.action}
        return {key: {"mean": torch.from_numpy(column.mean), "std": torch.from_numpy(column.std)} for key, column in columns.items()}

    def lerobot_batch(self, collator: Collator, first: int, count: int) -> dict[str, Any]:
        """Samples of `collator(first, count)` as a batch of LeRobot's DataLoader: robot units, not normalised.

        `observation.images.NAME` uint8 [B, 3, size, size], `observation.state` [B, S], `action` [B, H, A], `action_is_pad` bool [B, H],
        `task`.
        """
        source = self.source
        frames = source.frames[slots(collator.seed, len(source.frames), first, count).index]
        actions, inside = action_chunks(source.action, source.end, frames, collator.action_horizon)
        pictures = torch.from_numpy(self.cache.gather(frames)).permute(0, 1, 4, 2, 3)
        return {
            **{f"observation.images.{name}": pictures[:, number] for number, name in enumerate(source.embodiment.cameras)},
            "observation.state": torch.from_numpy(source.state[frames]),
            "action": torch.from_numpy(actions),
            "action_is_pad": torch.from_numpy(~inside),
            "task": [source.tasks[task] for task in source.task[frames]],
        }


def open_shared(run: TrainConfig, prompt: str) -> SharedData:
    """Episodes of the data set whose task is `prompt`, decoded in memory.

    Raises DatasetError for a data set without such episodes, ConfigError for an embodiment that LeRobot's PI0 does not support.
    """
    if run.embodiment.delta_actions:
        raise ConfigError(
            f"LeRobot's PI0 trains on absolute actions, found embodiment.delta_actions {run.embodiment.delta_actions}; leave it out"
        )
    source = open_source(run.dataset, run.embodiment)
    if prompt not in source.tasks:
        raise DatasetError(f"{source.root} holds no episode of {prompt!r}, found: {'; '.join(source.tasks):.300}; record the task")
    taught = np.unique(source.episode[source.frames][source.task[source.frames] == source.tasks.index(prompt)])
    if not len(taught):
        raise DatasetError(f"{source.root} holds no chosen episode of {prompt!r}; record the task, or choose other dataset.episodes")
    source = open_source(replace(run.dataset, episodes=tuple(taught.tolist())), run.embodiment)
    policy = policy_config(run, source)
    decoded = open_cache(source, run.dataset, policy.model.vision.image_size)
    # copied: in a memory map the first side to read a page would be charged for its page fault
    cache = FrameCache(tuple(np.array(camera) for camera in decoded.cameras))
    return SharedData(source, cache, source.norm_stats(policy.model.action_horizon), policy)


@final
class OurTraining:
    """Training of `train/loop` as shipped, without its files.

    accelerate with bfloat16 where the processor has it, AdamW, warm-up and cosine, the moving average of the weights as the policy.
    Batches are made in the training thread: a loader thread saves wall time, not processor time.
    """

    def __init__(self, run: TrainConfig, data: SharedData, seed: int, scheduled_steps: int) -> None:
        self._run, self._data, self._scheduled_steps = run, data, scheduled_steps
        self._collator = data.collator(seed, run.flow_draws_per_observation)
        parallel = Parallel(Context(), run.precision, run.micro_steps(1), allow_cuda=False)
        state = TrainState.build(data.policy.model, replace(run.state(), seed=seed), None, parallel)
        self._trainer = Trainer(state, parallel, FlowMatching.from_config(run.flow))

    def update(self, step: int) -> float:
        """Make batch number `step`, take the step as in `train.loop`, and return its loss."""
        run = self._run
        first, count = step * run.global_batch_size, run.global_batch_size
        valid = self._collator.valid_elements(first, count)
        batches = (self._collator(first + begin, size) for begin, size in split(count, 0, 1, run.micro_batch_size))
        self._trainer.state.schedule(self._scheduled_steps)
        return float(self._trainer.step(batches, valid))

    def policy(self) -> LocalPolicy:
        """Policy with the averaged weights, as a bundle of this run would load on the CPU."""
        policy, trainer = self._data.policy, self._trainer
        network, chain, parallel = trainer.state.averaged_network(), policy.chain(self._data.stats), trainer.parallel
        return LocalPolicy(network, trainer.flow, chain, policy.metadata(), parallel.device, parallel.compute_dtype)


@final
class LeRobotTraining:
    """LeRobot's `update_policy` on one process: forward, backward, clip, optimiser, scheduler, in this order."""

    def __init__(self, run: TrainConfig, data: SharedData, seed: int, scheduled_steps: int) -> None:
        from pi0fm.bench.harness import peer

        state_dim, action_dim = data.source.embodiment.dims()
        robot = peer.RobotFeatures(tuple(data.source.embodiment.cameras), state_dim, action_dim)
        config = peer.policy_config(data.policy.model, robot, run.optimizer.learning_rate)
        torch.manual_seed(seed)  # initial weights, then noise and times
        self._data, self._count, self._first, self._collator = data, run.global_batch_size, 0, data.collator(seed)
        self._policy = peer.ShrunkPI0(config, data.policy.model)
        self._processors = peer.processors(config, data.lerobot_stats())
        preset = config.get_optimizer_preset()
        optimizer = preset.build(self._policy.get_optim_params())
        self._step = their_step(lambda: self.loss(self._first, self._count), optimizer, preset.grad_clip_norm)
        self._scheduler = config.get_scheduler_preset().build(optimizer, scheduled_steps)

    def update(self, step: int) -> float:
        """Take a step on the same samples as step number `step` of our side, and return its loss."""
        self._policy.train()
        self._first = step * self._count
        loss = self._step()
        self._scheduler.step()
        return loss

    def loss(self, first: int, count: int) -> torch.Tensor:
        """Loss of samples of the stream: pictures from bytes to [0, 1], then LeRobot's processor steps (newline, tokens, normalisation)."""
        raw = self._data.lerobot_batch(self._collator, first, count)
        pictures = {key: value.float() / 255 for key, value in raw.items() if key.startswith("observation.images")}
        loss: torch.Tensor = self._policy.forward(dict(self._processors[0](raw | pictures)))[0]
        return loss

    def used(self) -> tuple[int, int]:
        """Number of parameters, and of those that get a nonzero gradient.

        The two language heads, and the part of the last backbone layer that only feeds the prefix's output, do not.
        """
        self.loss(0, 2).backward()
        used = sum(weight.numel() for weight in self._policy.parameters() if weight.grad is not None and bool(weight.grad.any()))
        return parameter_count(self._policy), used

    def policy(self) -> "LeRobotPolicy":
        """Policy with the last weights."""
        return LeRobotPolicy(self._policy, self._processors)


@final
class LeRobotPolicy:
    """LeRobot's PI0 as a `Policy`, for one evaluation of both sides: its `predict_action_chunk`, prefix cache and 10 Euler steps."""

    def __init__(self, policy: Any, processors: Any) -> None:
        self._policy = policy.eval()
        self._before, self._after = processors

    @property
    def metadata(self) -> Mapping[str, Any]:
        """`action_horizon`, `robot_action_dim`, `state_dim`, `cameras` (name -> LeRobot's key), `embodiment`."""
        config = self._policy.config
        return {
            "action_horizon": config.chunk_size,
            "robot_action_dim": config.output_features["action"].shape[0],
            "state_dim": config.input_features["observation.state"].shape[0],
            "cameras": {key.rpartition("observation.images.")[2]: key for key in config.image_features},
            "embodiment": "lerobot",
        }

    def infer_batch(self, observations: Sequence[Observation], noise_seeds: Sequence[int] | None = None) -> list[ActionChunk]:
        """Infer a chunk for each observation, a function of seed and observation; with None LeRobot draws the noise."""
        began, config = time.perf_counter(), self._policy.config
        batch: dict[str, Any] = {"task": [seen.prompt for seen in observations]}
        batch["observation.state"] = torch.from_numpy(np.stack([seen.state for seen in observations])).float()
        for name, key in self.metadata["cameras"].items():
            batch[key] = torch.from_numpy(np.stack([seen.images[name] for seen in observations])).permute(0, 3, 1, 2).float() / 255
        noise = None
        if noise_seeds is not None:
            shape = (config.chunk_size, config.max_action_dim)
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in noise_seeds])
        actions = np.asarray(self._after(self._policy.predict_action_chunk(self._before(batch), noise=noise)), dtype=np.float32)
        milliseconds = (time.perf_counter() - began) * 1e3
        return [ActionChunk(chunk, {"infer_ms": milliseconds}) for chunk in actions]


SIDES: dict[str, type[OurTraining | LeRobotTraining]] = {"pi0fm": OurTraining, "lerobot": LeRobotTraining}


def train(
    side: str, run: TrainConfig, data: SharedData, seed: int, cpu_seconds: float, steps: int | None
) -> tuple[Policy, int, list[float], list[float]]:
    """Train from scratch until `cpu_seconds` of the process tree are spent or `steps` done; at most one step exceeds the budget.

    Returns the policy, the length of the learning-rate schedule (later steps keep the last rate), the losses, and the seconds used by the
    end of each step. The caller's random state does not change.
    """
    with torch.random.fork_rng(devices=[]):
        make = SIDES[side]
        scheduled = steps or steps_in_budget(make(run, data, seed, CALIBRATION_STEPS + 1).update, cpu_seconds)
        training = make(run, data, seed, scheduled)
        losses, spent = train_for(side, training.update, cpu_seconds, steps)
    return training.policy(), scheduled, losses, spent


def train_for(name: str, update: Callable[[int], float], cpu_seconds: float, steps: int | None) -> tuple[list[float], list[float]]:
    """Call `update` until `cpu_seconds` are spent or `steps` done; returns its losses, and the seconds used by the end of each step."""
    losses: list[float] = []
    spent = [0.0]
    shown, unit, whole = 0, *(("CPU-seconds", math.ceil(cpu_seconds)) if steps is None else ("steps", steps))
    began = cpu_seconds_of_tree()
    with progress.step(f"{name}, {unit}", whole) as bar:
        while spent[-1] < cpu_seconds and (steps is None or len(losses) < steps):
            losses.append(update(len(losses)))
            spent.append(cpu_seconds_of_tree() - began)
            reached = min(int(spent[-1]), whole) if steps is None else len(losses)
            bar.advance(reached - shown, f"step {len(losses)}, loss {losses[-1]:.3f}")
            shown = reached
    return losses, spent[1:]


def steps_in_budget(update: Callable[[int], float], cpu_seconds: float) -> int:
    """Estimate the number of steps in `cpu_seconds` from a few of `update`; the first, slowed by allocation, is not counted."""
    update(0)
    used = seconds_of(lambda: [update(step) for step in range(1, CALIBRATION_STEPS + 1)], cpu_seconds_of_tree)
    return max(1, round(cpu_seconds * CALIBRATION_STEPS / used))


def compare(
    options: LearningOptions, run: TrainConfig, data: SharedData, judge: Callable[[Policy], Summary]
) -> tuple[dict[str, dict[str, list[Any]]], dict[str, list[Any]]]:
    """Train and evaluate both sides in turn with each seed; returns each side's figures by seed, and its loss curves.

    run: returned by `with_lerobots_heads`, and used to open `data`. A success of None means that every episode crashed.
    """
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # a process-wide setting of pi0fm train; LeRobot's side gains from it as well
    names = ("success", "cpu_seconds", "steps", "scheduled_steps", "crashes")
    figures: dict[str, dict[str, list[Any]]] = {side: {name: [] for name in names} for side in SIDES}
    curves: dict[str, list[Any]] = {side: [] for side in SIDES}
    for seed, side in itertools.product(range(options.seeds), SIDES):
        if side == "lerobot" and options.lerobot_cpu_seconds == 0:
            continue
        progress.say(f"\n{side}, seed {seed} of 0 to {options.seeds - 1}")
        policy, scheduled, losses, spent = train(side, run, data, seed, options.budget(side), options.steps)
        summary = judge(policy)
        success = None if summary.mean is None else round(summary.mean.rate, 4)
        row = (success, round(spent[-1], 3), len(losses), scheduled, summary.crashes)
        for name, value in zip(names, row, strict=True):
            figures[side][name].append(value)
        finite = [round(loss, 6) if math.isfinite(loss) else None for loss in losses]
        curves[side].append({"cpu_seconds": [round(seconds, 3) for seconds in spent], "loss": finite})
        del policy
        gc.collect()  # here, so that the next budget is not charged for it
    return figures, curves


def parameters(data: SharedData) -> dict[str, int]:
    """Number of parameters of both sides, and of LeRobot's that are used."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        lerobot, used = LeRobotTraining(TrainConfig(), data, 0, 1).used()
    return {"pi0fm": parameter_count(Pi0(data.policy.model)), "lerobot": lerobot, "lerobot_used": used}


def make_evaluator(options: LearningOptions, execution_horizon: int, policy: PolicyConfig) -> Callable[[Policy], Summary]:
    """Build the evaluation of both sides. Raises ConfigError for start positions that were demonstrated."""
    config = EvalConfig(
        policy="both sides",
        tasks=(options.task,),
        episodes=options.episodes,
        first_seed=options.first_seed,
        max_steps=options.max_steps,
        execution_horizon=execution_horizon,
        videos="none",
    )
    metadata = policy.metadata()
    refuse_seen_seeds(config, metadata)
    cameras = camera_specs(config, metadata, catalog.find(options.task)[0])
    open_environment = partial(catalog.open_environment, cameras=cameras, max_steps=options.max_steps)

    def judge(judged: Policy) -> Summary:
        setup = WorkerSetup(lambda: judged, open_environment, settings_for(config, metadata), config.environments_per_worker)
        results = run_episodes(plan(config), setup, in_this_process)
        for result in results:
            if result.error is not None:
                progress.say(f"CRASHED seed {result.seed}: {result.error}")
        return summarize(results, (options.task,))

    return judge
