"""The cost of a log-likelihood relative to sampling the same chunk.

Owns: the three comparisons. Does not know: how either is computed.

    cached     log_prob of a chunk            : sampling it            both with one cached prefix and as many evaluations
    one pass   sampling with its log_prob     : sampling it            the same
    call       LocalPolicy.log_prob           : LocalPolicy.infer      each encodes pictures and prompt
"""

import torch

from pi0fm.bench.config import LikelihoodOptions
from pi0fm.bench.harness.cases import random_network, random_observations, random_policy
from pi0fm.bench.harness.measure import BenchReport, paired_ratio
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import push_backward, push_forward
from pi0fm.flow.solver import num_evaluations
from pi0fm.models.config import preset
from pi0fm.policy.sampling import noise
from pi0fm.policy.sampling.scores import ScoreOptions
from pi0fm.policy.saved import bundle


def measure(options: LikelihoodOptions) -> BenchReport:
    """Run the comparisons in this process; `ratio` is time of the log-likelihood / time of sampling, with one cached prefix."""
    torch.set_num_threads(options.threads)
    cpu, flow = torch.device("cpu"), FlowConfig(solver=options.solver, num_flow_steps=options.num_flow_steps)
    if options.bundle is None:
        policy = random_policy(random_network(preset("tiny"), cpu), 1, cpu, torch.float32, flow=flow, joints=4)
    else:
        policy = bundle.load(options.bundle, num_flow_steps=options.num_flow_steps, solver=options.solver, threads=options.threads)
    observations = random_observations(policy, options.batch_size, seed=0, prompt="press the button")
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
    return BenchReport(
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
