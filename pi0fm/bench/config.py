"""Options of the measurements of `pi0fm bench`, of `pi0fm flow steps` and `pi0fm profile`.

Owns: the options of every measurement, their ranges and aliases. Does not know: how anything is measured (the module of that name); torch
is not imported, so that --help takes a moment.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pi0fm.bench.harness.measure import PairedOptions, check_least, check_words
from pi0fm.bench.harness.sizes import CASES, PEER_CASES
from pi0fm.data.config import DatasetConfig
from pi0fm.flow.config import FIXED_GRID_SOLVERS
from pi0fm.options import option, refuse_below, required
from pi0fm.policy.load_options import COMPILE, PRECISIONS, refuse_device
from pi0fm.sim import catalog
from pi0fm_client.errors import ConfigError

NETWORKS = ("tiny", "width_512", "pi0_proportions")  # of bench checkpoint
CARD_PARTS = {"right": 150, "training": 220, "extras": 45, "inference": 65}
"""Parts with their time limits in seconds, 8 minutes in total; those that no GPU has measured yet come early."""


@dataclass(frozen=True)
class LoadingOptions(PairedOptions):
    """Options of `pi0fm bench loading`. Raises ConfigError for a value out of range."""

    root: Path | None = option(None, "folder of a LeRobot data set with videos; one is generated when not given")
    frames: int = option(16000, "frames of the generated data set")
    size: int = option(128, "side in pixels of the generated and of the loaded pictures")
    action_horizon: int = option(50, "actions of a sample")
    batch_size: int = option(32, "samples of a batch, on both sides")
    rounds: int = option(3, "runs of both sides of each comparison")
    lerobot_batches: int = option(2, "batches of LeRobot's loader in a round; at least one per worker is taken")
    lerobot_workers: int = option(0, "processes of LeRobot's DataLoader; 0, the cheapest, loads in the calling process")
    memory_batches: int = option(2000, "batches over which memory is sampled; 100000 take about 5 minutes")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, frames=1400, size=16, action_horizon=1, batch_size=1, memory_batches=10, lerobot_batches=1, lerobot_workers=0)
        if self.size % 2:
            raise ConfigError(f"size must be even, as video codecs require, found {self.size}; type --size {self.size + 1}")


@dataclass(frozen=True)
class LearningOptions:
    """Options of `pi0fm bench learning`. Raises ConfigError for a value out of range."""

    task: str = option("button-press-topdown-v3", f"task that both sides learn, {catalog.TASK_FORM}")
    cpu_seconds: float = option(240.0, "processor seconds of each training, over all its threads and processes")
    lerobot_cpu_seconds: float | None = option(None, "processor seconds of LeRobot's trainings; empty takes cpu_seconds, 0 skips them")
    steps: int | None = option(
        None, "optimiser steps of each training, instead of processor seconds: the same policies even on a busy machine"
    )
    seeds: int = option(3, "trainings of each side: K of them, with seeds 0 to K - 1")
    demonstrations: int = option(50, "episodes to record when no data set is named")
    episodes: int = option(20, "start positions for evaluating each policy; none of them was demonstrated")
    first_seed: int = option(1, "seed of the first start position; the others count up from it")
    max_steps: int = option(400, "control steps after which an episode without success is a failure")
    threads: int = option(1, "torch's CPU threads, of both sides")
    config: Path | None = option(None, "training configuration of pi0fm's side; configs/quickstart.yaml when not given")
    dataset: DatasetConfig = option(DatasetConfig, "")
    output_dir: Path = option(Path("outputs/bench-learning"), "folder of learning.json, and of the recorded data set")

    def __post_init__(self) -> None:
        catalog.find(self.task)
        object.__setattr__(self, "task", catalog.report_name(self.task))
        if not 0 < self.cpu_seconds < math.inf:
            raise ConfigError(f"cpu_seconds must be above 0, found {self.cpu_seconds:g}; type --cpu_seconds 240")
        if self.lerobot_cpu_seconds is not None and not 0 <= self.lerobot_cpu_seconds < math.inf:
            raise ConfigError(
                f"lerobot_cpu_seconds must be 0 or more, found {self.lerobot_cpu_seconds:g}; leave it out for cpu_seconds, "
                "or type 0 to train pi0fm's side only"
            )
        check_least(self, steps=1, seeds=1, demonstrations=1, episodes=1, max_steps=1, threads=1, first_seed=0)
        if self.steps is not None and (self.cpu_seconds != LearningOptions.cpu_seconds or self.lerobot_cpu_seconds not in {None, 0}):
            raise ConfigError(
                f"a training ends after steps or processor seconds, found --steps {self.steps} with --cpu_seconds {self.cpu_seconds:g} and "
                f"--lerobot_cpu_seconds {self.lerobot_cpu_seconds}; leave one out (--lerobot_cpu_seconds 0 may stay)"
            )

    def budget(self, side: str) -> float:
        """Processor seconds of one training of `side`, pi0fm or lerobot; infinite where `steps` ends it."""
        if self.steps is not None:
            return math.inf
        return self.lerobot_cpu_seconds if side == "lerobot" and self.lerobot_cpu_seconds is not None else self.cpu_seconds


@dataclass(frozen=True)
class PeerOptions(PairedOptions):
    """Options of both comparisons of speed with LeRobot's PI0. Raises ConfigError for a value out of range."""

    cases: tuple[str, ...] = option(PEER_CASES, f"networks and inputs, of {', '.join(PEER_CASES)}")
    device: str = option("cpu", "device of both sides: cpu or cuda")
    seed: int = option(0, "seed of weights, inputs and noise")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("cases", self.cases, PEER_CASES)
        check_words("device", (self.device,), ("cpu", "cuda"))
        check_least(self, seed=0)


@dataclass(frozen=True)
class InferenceOptions(PeerOptions):
    """Options of `pi0fm bench inference`. Raises ConfigError for a value out of range."""

    compile: str = option("off", "compilation of our side: off (as shipped), kernels, graph (CUDA only)")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("compile", (self.compile,), COMPILE)
        if self.compile == "graph" and self.device != "cuda":
            raise ConfigError(f"compile graph records CUDA graphs, found device {self.device}; type --device cuda, or --compile kernels")


@dataclass(frozen=True)
class TrainingOptions(PeerOptions):
    """Options of `pi0fm bench training`. Raises ConfigError for a value out of range."""

    cases: tuple[str, ...] = option(PEER_CASES[:2], f"networks and batches, of {', '.join(PEER_CASES)}")
    rounds: int = option(10, "pairs of steps, ours and LeRobot's, behind each ratio")
    flow_draws_cases: tuple[str, ...] = option(("pi0_proportions",), f"cases that compare 8 flow draws with 1, of {', '.join(CASES)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("flow_draws_cases", self.flow_draws_cases, CASES)


@dataclass(frozen=True)
class CheckpointOptions(PairedOptions):
    """Options of `pi0fm bench checkpoint`. Raises ConfigError for a value out of range."""

    case: str = option("tiny", "network: " + ", ".join(NETWORKS))
    batch_size: int = option(32, "samples of a step")
    every: int = option(10, "steps of a block, with a checkpoint after the first; training saves every 1000 by default")
    precision: str = option("auto", "as pi0fm train takes it")
    folder: Path | None = option(None, "folder on the disk to measure; the system's folder for temporary files when not given")
    keep: int = option(2, "checkpoints to keep; older ones are removed, as in training")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("case", (self.case,), NETWORKS)
        check_words("precision", (self.precision,), PRECISIONS)
        check_least(self, batch_size=1, every=2, keep=1)


@dataclass(frozen=True)
class CardOptions:
    """Options of `pi0fm bench card`. Raises ConfigError for a part that is not known, or a time out of range."""

    parts: tuple[str, ...] = option(tuple(CARD_PARTS), "parts to measure, in order; PART=SECONDS sets a part's time limit")
    output_dir: Path = option(Path("outputs/gpu"), "folder of the results, one file per part")
    device: str = option("cuda", "cuda, or cpu for a trial run")
    whole: bool = option(True, "full size; false takes the tiny preset, to try the measurement without a GPU")

    def __post_init__(self) -> None:
        check_words("parts", [word.partition("=")[0] for word in self.parts], CARD_PARTS)
        check_words("device", (self.device,), ("cuda", "cpu"))
        for word in self.parts:
            name, given, seconds = word.partition("=")
            if given and not seconds.isdigit():
                raise ConfigError(f"a part's time must be whole seconds, found {word!r}; type {name}={CARD_PARTS[name]}")
        if self.whole and self.device == "cpu":
            raise ConfigError("full size takes hours on a CPU; type --whole false, or --device cuda")

    def bounds(self) -> dict[str, float]:
        """Time limit in seconds of each requested part, in order."""
        return {name: float(seconds or CARD_PARTS[name]) for name, _, seconds in (word.partition("=") for word in self.parts)}


@dataclass(frozen=True)
class PlanningOptions:
    """Options of `pi0fm bench planning`. Raises ConfigError for a value out of range."""

    processes: tuple[int, ...] = option((1, 2, 4), "numbers of processes that train together")
    turns: int = option(6, "repetitions of the whole measurement")
    steps: int = option(4, "steps of each figure and turn, after the warm-up")
    output_dir: Path | None = option(None, "folder of the result's JSON; nothing is written when not given")

    def __post_init__(self) -> None:
        check_least(self, turns=1, steps=1)
        if not self.processes or min(self.processes) < 1:
            raise ConfigError(f"processes must name counts of 1 or more, found {list(self.processes)}; type --processes [1,2,4]")


@dataclass(frozen=True)
class ServingOptions:
    """Options of `pi0fm bench serving`. Raises ConfigError for a value out of range."""

    seconds: int = option(10, "seconds of each measurement")
    rounds: int = option(3, "measurements of each server with eight robots")
    num_flow_steps: int = option(10, "steps of the policy's solver")
    threads: int = option(1, "CPU threads of an inference, on both servers")

    def __post_init__(self) -> None:
        check_least(self, seconds=1, rounds=1, num_flow_steps=1, threads=1)


@dataclass(frozen=True)
class SoakOptions:
    """Options of `pi0fm bench soak`. Raises ConfigError for a value out of range."""

    seconds: int = option(600, "duration in seconds")
    pause_seconds: int = option(30, "duration in seconds of the pause, once, after a third of the time, in which the model does not answer")

    def __post_init__(self) -> None:
        check_least(self, seconds=20, pause_seconds=1)


@dataclass(frozen=True)
class ScalingOptions:
    """Options of `pi0fm bench scaling`. Raises ConfigError for a value out of range."""

    rounds: int = option(3, "runs of each side, alternating")
    steps: int = option(150, "steps of each of these runs")
    disturbed_steps: int = option(600, "steps of the runs with a kill; they must last beyond it")
    batch_size: int = option(16, "samples of a step, over both workers")
    output_dir: Path | None = option(None, "folder of scaling.json; nothing is written when not given")

    def __post_init__(self) -> None:
        check_least(self, rounds=1, steps=20, disturbed_steps=100, batch_size=4)


@dataclass(frozen=True)
class SimulationOptions(PairedOptions):
    """Options of `pi0fm bench simulation`. Raises ConfigError for a value out of range or an unknown task."""

    tasks: tuple[str, ...] = option(("reach-v3", "pusht/push-t"), f"tasks, each {catalog.TASK_FORM}")
    environments: int = option(8, "environments in one process")
    max_steps: int = option(64, "steps of an episode")
    execution_horizon: int = option(8, "steps between two observations")
    rounds: int = option(6, "runs of both sides of each comparison")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, environments=2, max_steps=1, execution_horizon=1)
        for task in self.tasks:
            suite, name = catalog.find(task)
            suite.check(name, max_steps=self.max_steps)


@dataclass(frozen=True)
class LikelihoodOptions(PairedOptions):
    """Options of `pi0fm bench density`. Raises ConfigError for a value out of range."""

    bundle: Path | None = option(None, "folder of a policy; a random one of the tiny preset when not given")
    rounds: int = option(40, "runs of both sides of each comparison")
    num_probes: int = option(1, "random probes of the log-likelihood; 0 computes the divergence exactly")
    num_flow_steps: int = option(10, "flow steps of sampling and of the log-likelihood")
    solver: str = option("euler", "solver of both: euler, midpoint, heun, rk4")
    batch_size: int = option(1, "chunks in one call")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, num_probes=0, num_flow_steps=1, batch_size=1)
        check_words("solver", (self.solver,), FIXED_GRID_SOLVERS)  # an adaptive one takes unequal evaluations on the two sides


@dataclass(frozen=True)
class StepsOptions:
    """Options of `pi0fm flow steps`. Raises ConfigError for a value out of range."""

    bundle: Path = required("folder of the policy, as pi0fm train wrote it")
    dataset: DatasetConfig = option(DatasetConfig, "")
    output_dir: Path = option(Path("outputs/flow-steps"), "folder of steps.json and steps.png")
    tolerance: float = option(0.05, "largest accepted RMS error of a chunk, in normalised units")
    observations: int = option(8, "observations: from the data set if one is named, else from the simulator at undemonstrated seeds")
    evaluations: tuple[int, ...] = option((1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 64, 100), "budgets of the fixed-grid solvers")
    dopri5_tolerances: tuple[float, ...] = option((1e-1, 1e-2, 1e-3, 1e-4), "tolerances of dopri5; the bundle's is added")
    reference_steps: int = option(256, "RK4 steps of the reference solution, an even number")
    seed: int = option(0, "seed of the noise that every chunk starts from")
    device: str | None = option(None, "cpu, cuda or cuda:N; the best one that works when not given")
    threads: int | None = option(None, "CPU threads; torch's choice when not given")

    def __post_init__(self) -> None:
        for name, values in (("tolerance", (self.tolerance,)), ("dopri5_tolerances", self.dopri5_tolerances)):
            if not all(0 < each < math.inf for each in values):
                raise ConfigError(f"{name} must be above 0, found {getattr(self, name)}; type --{name} 0.01")
        check_least(self, observations=1, seed=0)
        refuse_below(self, threads=1)
        refuse_device(self.device)
        if not self.evaluations or min(self.evaluations) < 1:
            raise ConfigError(f"evaluations must be numbers >= 1, found {self.evaluations}; type --evaluations 4,8,16")
        if self.reference_steps % 2 or self.reference_steps < max(self.evaluations):
            raise ConfigError(
                f"reference_steps must be even and at least the largest of evaluations, {max(self.evaluations)}, so that the reference "
                f"is finer than everything compared with it; found {self.reference_steps}"
            )


@dataclass(frozen=True)
class ProfileSteps:
    """Numbers of steps of a run to measure."""

    warm_up: int = option(3, "steps before the clock starts")
    steps: int = option(10, "timed steps; two more are counted and traced")

    def __post_init__(self) -> None:
        for name in ("warm_up", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"profile.{name} must be 1 or more, found {getattr(self, name)}; leave it out for the default")


@dataclass(frozen=True)
class Question:
    """The options of a measurement. aliases: other names of them. positional: the one that may stand first without its name."""

    options: type[Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    positional: str | None = None


QUESTIONS = {
    "loading": Question(LoadingOptions, {"chunk_size": "action_horizon", "dataset.root": "root"}),
    "learning": Question(LearningOptions, {"tasks": "task", "repo_id": "dataset.repo_id", "root": "dataset.root"}),
    "inference": Question(InferenceOptions, {"num_threads": "threads"}),
    "training": Question(TrainingOptions, {"num_threads": "threads"}),
    "checkpoint": Question(CheckpointOptions, {"checkpoint_every": "every", "keep_checkpoints": "keep"}),
    "card.run": Question(CardOptions),
    "planning": Question(PlanningOptions),
    "serving": Question(ServingOptions),
    "soak": Question(SoakOptions),
    "scaling": Question(ScalingOptions),
    "simulation": Question(SimulationOptions),
    "density": Question(LikelihoodOptions, {"policy.path": "bundle"}),
    "flow_steps": Question(
        StepsOptions, {"repo_id": "dataset.repo_id", "root": "dataset.root", "policy.path": "bundle"}, positional="bundle"
    ),
}
"""By the module of pi0fm.bench that answers."""
