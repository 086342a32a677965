"""What a log-likelihood costs beside the sampling of the same chunk.

Owns: the three comparisons, and a random policy of the tiny preset for them. Does not know: the command line.

    cached     log_prob of a chunk            : sampling it            both against one cached prefix, the same evaluations
    one pass   sampling with its log_prob     : sampling it            the same
    call       LocalPolicy.log_prob           : LocalPolicy.infer      each with its own prefix, pictures and prompt

All in one process, one thread, interleaved; a random policy costs what a trained one does, since no operation looks at values.
Shape letters: B batch, H action horizon, A action dim.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pi0fm.bench.paired import Ratio, paired_ratio
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.flow.likelihood import push_backward, push_forward
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.flow.solver import FIXED_GRID_SOLVERS, num_evaluations
from pi0fm.models.pi0 import Pi0
from pi0fm.models.presets import preset
from pi0fm.options import nearest, option
from pi0fm.policy import bundle, noise
from pi0fm.policy.bundle import PolicyConfig
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.scores import ScoreOptions
from pi0fm_client.errors import ConfigError
from pi0fm_client.types import Observation

WIDTHS = {"state": 4, "action": 4}


@dataclass(frozen=True)
class DensityConfig:
    """Options of `pi0fm bench density`."""

    bundle: Path | None = option(None, "folder of a policy; a random one of the tiny preset when not given")
    rounds: int = option(40, "times that both sides of a comparison run")
    num_probes: int = option(1, "random probes of the log-likelihood; 0 computes the divergence exactly")
    num_flow_steps: int = option(10, "steps of sampling and log-likelihood alike")
    solver: str = option("euler", "of both: euler, midpoint, heun, rk4")
    batch_size: int = option(1, "chunks in one call")

    def __post_init__(self) -> None:
        for name, least in {"rounds": 1, "num_probes": 0, "num_flow_steps": 1, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be {least} or more, found {getattr(self, name)}; leave it out for the default")
        if self.solver not in FIXED_GRID_SOLVERS:
            known = nearest(self.solver, FIXED_GRID_SOLVERS)
            raise ConfigError(f"--solver must take the same evaluations on both sides, found {self.solver!r}: {known}")

    @property
    def evaluations(self) -> int:
        """Of the network, on each side."""
        return num_evaluations(self.solver, self.num_flow_steps)


@dataclass(frozen=True)
class DensityCosts:
    """The three ratios of the drawing above."""

    cached: Ratio
    one_pass: Ratio
    call: Ratio


def measure(config: DensityConfig) -> DensityCosts:
    """All three, in this process with one thread."""
    torch.set_num_threads(1)
    policy = random_policy(config) if config.bundle is None else _loaded(config.bundle, config)
    observations = [_observation(policy, seed) for seed in range(config.batch_size)]
    options, seeds = ScoreOptions(config.num_probes), list(range(config.batch_size))
    chunks = [chunk.actions for chunk in policy.infer_batch(observations, seeds)]
    inputs = policy.chain.observe(observations).to(policy.device)
    shape = (policy.model.config.action_horizon, policy.model.config.action_dim)
    mask = policy.mask(config.batch_size)
    start = noise.starting_noise(seeds, shape).to(policy.device)
    probes = noise.probes(seeds, config.num_probes, shape)
    density = options.density(None if probes is None else probes.to(policy.device))
    with torch.no_grad(), policy.sampler.precision():
        velocity = policy.model.field(inputs)
        given = policy.flow.sample(velocity, start, mask=mask)

        def sampled() -> object:
            return policy.flow.sample(velocity, start, mask=mask)

        cached = paired_ratio(lambda: push_backward(policy.flow, velocity, given, mask, density), sampled, config.rounds)
        one_pass = paired_ratio(lambda: push_forward(policy.flow, velocity, start, mask, density), sampled, config.rounds)
    call = paired_ratio(
        lambda: policy.log_prob(observations, chunks, seeds, options), lambda: policy.infer_batch(observations, seeds), config.rounds
    )
    return DensityCosts(cached, one_pass, call)


def random_policy(config: DensityConfig) -> LocalPolicy:
    """The tiny preset with initial weights, one camera, state and action of 4, on the CPU in float32."""
    random = np.random.default_rng(0)
    state, action = (column_stats(random.normal(size=(64, width)).astype(np.float32), name) for name, width in WIDTHS.items())
    policy = PolicyConfig(
        model=preset("tiny"),
        flow=FlowConfig(solver=config.solver, num_flow_steps=config.num_flow_steps),
        embodiment=Embodiment(cameras={"base": "observation.images.base"}, state_dim=WIDTHS["state"], robot_action_dim=WIDTHS["action"]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pi0(policy.model)
    chain = policy.chain(NormStats(state, action, 64))
    return LocalPolicy(model, FlowMatching.from_config(policy.flow), chain, policy.metadata(), torch.device("cpu"), torch.float32)


def _loaded(path: Path, config: DensityConfig) -> LocalPolicy:
    return bundle.load(path, num_flow_steps=config.num_flow_steps, solver=config.solver, threads=1)


def _observation(policy: LocalPolicy, seed: int) -> Observation:
    random = np.random.default_rng(seed)
    size = policy.chain.image_size
    images = {name: random.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in policy.chain.embodiment.cameras}
    return Observation(images, random.normal(size=policy.chain.embodiment.dims()[0]).astype(np.float32), "press the button")
