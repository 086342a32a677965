"""The cost of scores and of several candidates relative to one chunk, at full size.

Owns: best of eight from one prefix, the log-likelihood of a chunk. Does not know: which candidate is best.
"""

import functools
from collections.abc import Callable

import torch

from pi0fm.bench.card.inference import BEST, Inference
from pi0fm.bench.card.results import Results
from pi0fm.bench.cases import random_observations
from pi0fm.bench.limits import host_seconds, percentile
from pi0fm.models.pi0 import CachedVelocity
from pi0fm.models.prefix_cache import KeyValue, PrefixCache
from pi0fm.policy.cuda_graphs import Recorder
from pi0fm.policy.noise import starting_noise

CANDIDATES = 8


def measure(results: Results, device: torch.device, whole: bool) -> None:
    """All cases. whole: at full size; else the tiny preset."""
    shared = Inference(results, device, whole)
    shared.attempt(f"best of {CANDIDATES} from one prefix", functools.partial(_best_of, results, shared), 20)
    shared.attempt("log-likelihood", functools.partial(_likelihood, results, shared), 20)


def _best_of(results: Results, shared: Inference) -> None:
    word = "kernels" if shared.device.type == "cuda" else "off"
    policy = shared.policy("pi0", BEST.cameras, word)
    shape, rounds = (policy.model.config.action_horizon, policy.model.config.action_dim), 30 if shared.whole else 2
    seen = policy.chain.observe(random_observations(policy, 1, 0)).to(shared.device)
    taken = {}
    for count in (1, CANDIDATES):
        noise = starting_noise(range(count), shape).to(shared.device)
        mask = policy.mask(count)

        def chunks(count: int = count, noise: torch.Tensor = noise, mask: torch.Tensor = mask) -> torch.Tensor:
            with torch.inference_mode(), policy.sampler.precision():
                field = CachedVelocity(policy.model, repeated(policy.model.encode_prefix(seen), count), seen.state.expand(count, -1))
                return policy.flow.sample(field, noise, mask=mask, check=False)

        call: Callable[[], object] = Recorder(shared.device)(chunks) if shared.device.type == "cuda" else chunks
        call()
        taken[count] = percentile(host_seconds(call, shared.device, rounds), 0.5)
    ratio = taken[CANDIDATES] / taken[1]
    note = f"{1e3 * taken[CANDIDATES]:.1f} and {1e3 * taken[1]:.1f} ms on the device, {word}"
    results.add(f"best of {CANDIDATES} over one, one prefix", ratio, "x", target="<= 1.1", note=note)


def repeated(cache: PrefixCache, times: int) -> PrefixCache:
    """The same prefix for several rows of actions."""
    layers = tuple(KeyValue(*(each.repeat_interleave(times, dim=0) for each in layer)) for layer in cache.layers)
    return PrefixCache(layers, cache.mask.repeat_interleave(times, dim=0), cache.length.repeat_interleave(times))


def _likelihood(results: Results, shared: Inference) -> None:
    policy = shared.policy("pi0", BEST.cameras, "off")
    given, rounds = random_observations(policy, 1, 0), 10 if shared.whole else 2
    chunk = policy.infer_batch(given, [0])[0].actions
    calls: dict[str, Callable[[], object]] = {
        "a chunk": lambda: policy.infer_batch(given, [0]),
        "a chunk with its log-likelihood": lambda: policy.infer_batch(given, [0], scores=True),
        "the log-likelihood of a chunk": lambda: policy.log_prob(given, chunk[None], [0]),
    }
    taken = {}
    for name, call in calls.items():
        call()
        taken[name] = percentile(host_seconds(call, shared.device, rounds), 0.5)
        results.add(f"{name}, eager", 1e3 * taken[name], "ms", note=f"{taken[name] / taken['a chunk']:.2f} x a chunk")
