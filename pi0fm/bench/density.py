"""What a log-likelihood costs beside the sampling of the same chunk.

Owns: the three comparisons, and a random policy of the tiny preset for them. Does not know: how either is computed.

    cached     log_prob of a chunk            : sampling it            both against one cached prefix, the same evaluations
    one pass   sampling with its log_prob     : sampling it            the same
    call       LocalPolicy.log_prob           : LocalPolicy.infer      each with its own prefix, pictures and prompt

All in one process, one thread, in turns; a random policy costs what a trained one does, since no operation looks at values.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pi0fm.bench.measure import Report, check_least, check_words, paired_ratio
from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.flow.likelihood import push_backward, push_forward
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.flow.solver import FIXED_GRID_SOLVERS, num_evaluations
from pi0fm.models.pi0 import Pi0
from pi0fm.models.presets import preset
from pi0fm.options import option
from pi0fm.policy import bundle, noise
from pi0fm.policy.bundle import PolicyConfig
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.scores import ScoreOptions
from pi0fm_client.types import Observation

ALIASES = {"policy.path": "bundle"}
WIDTH = 4  # of the random policy's state and action


@dataclass(frozen=True)
class Options:
    """Options of `pi0fm bench density`. Raises ConfigError for a value out of range."""

    bundle: Path | None = option(None, "folder of a policy; a random one of the tiny preset when not given")
    rounds: int = option(40, "times that both sides of a comparison run")
    num_probes: int = option(1, "random probes of the log-likelihood; 0 computes the divergence exactly")
    num_flow_steps: int = option(10, "steps of sampling and log-likelihood alike")
    solver: str = option("euler", "of both: euler, midpoint, heun, rk4")
    batch_size: int = option(1, "chunks in one call")

    def __post_init__(self) -> None:
        check_least(self, rounds=1, num_probes=0, num_flow_steps=1, batch_size=1)
        check_words("solver", (self.solver,), FIXED_GRID_SOLVERS)  # another takes other evaluations on each side


def measure(options: Options) -> Report:
    """All three, in this process with one thread; `ratio` is log-likelihood by sampling against one cached prefix."""
    torch.set_num_threads(1)
    if options.bundle is None:
        policy = random_policy(options)
    else:
        policy = bundle.load(options.bundle, num_flow_steps=options.num_flow_steps, solver=options.solver, threads=1)
    observations = [_observation(policy, seed) for seed in range(options.batch_size)]
    scored, seeds = ScoreOptions(options.num_probes), list(range(options.batch_size))
    chunks = [chunk.actions for chunk in policy.infer_batch(observations, seeds)]
    inputs = policy.chain.observe(observations).to(policy.device)
    shape = (policy.model.config.action_horizon, policy.model.config.action_dim)
    mask, start = policy.mask(options.batch_size), noise.starting_noise(seeds, shape).to(policy.device)
    probes = noise.probes(seeds, options.num_probes, shape)
    density = scored.density(None if probes is None else probes.to(policy.device))
    with torch.no_grad(), policy.sampler.precision():
        velocity = policy.model.cached_velocity(inputs)
        given = policy.flow.sample(velocity, start, mask=mask)

        def sampled() -> object:
            return policy.flow.sample(velocity, start, mask=mask)

        cached = paired_ratio(lambda: push_backward(policy.flow, velocity, given, mask, density), sampled, options.rounds)
        one_pass = paired_ratio(lambda: push_forward(policy.flow, velocity, start, mask, density), sampled, options.rounds)
    call = paired_ratio(
        lambda: policy.log_prob(observations, chunks, seeds, scored), lambda: policy.infer_batch(observations, seeds), options.rounds
    )
    return Report(
        {
            **cached.json(),
            "log_prob_seconds": cached.first_seconds,
            "sample_seconds": cached.second_seconds,
            "one_pass": one_pass.json(),
            "call": call.json(),
            "evaluations": num_evaluations(options.solver, options.num_flow_steps),
            **{name: getattr(options, name) for name in ("num_probes", "solver", "batch_size", "rounds")},
            "policy": "random, tiny preset" if options.bundle is None else str(options.bundle),
        }
    )


def random_policy(options: Options) -> LocalPolicy:
    """The tiny preset with initial weights, one camera, state and action of 4, on the CPU in float32."""
    random = np.random.default_rng(0)
    state, action = (column_stats(random.normal(size=(64, WIDTH)).astype(np.float32), name) for name in ("state", "action"))
    policy = PolicyConfig(
        model=preset("tiny"),
        flow=FlowConfig(solver=options.solver, num_flow_steps=options.num_flow_steps),
        embodiment=Embodiment(cameras={"base": "observation.images.base"}, state_dim=WIDTH, robot_action_dim=WIDTH),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pi0(policy.model)
    chain = policy.chain(NormStats(state, action, 64))
    return LocalPolicy(model, FlowMatching.from_config(policy.flow), chain, policy.metadata(), torch.device("cpu"), torch.float32)


def _observation(policy: LocalPolicy, seed: int) -> Observation:
    random = np.random.default_rng(seed)
    size = policy.chain.image_size
    images = {name: random.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in policy.chain.embodiment.cameras}
    return Observation(images, random.normal(size=policy.chain.embodiment.dims()[0]).astype(np.float32), "press the button")
