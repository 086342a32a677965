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
from pi0fm.policy.best_of import BestOf

CANDIDATES = 8


def measure(results: Results, device: torch.device, whole: bool) -> None:
    """All cases. whole: at full size; else the tiny preset."""
    shared = Inference(results, device, whole)
    shared.attempt(f"best of {CANDIDATES} from one prefix", functools.partial(_best_of, results, shared), 20)
    shared.attempt("log-likelihood", functools.partial(_likelihood, results, shared), 20)


def _best_of(results: Results, shared: Inference) -> None:
    word, rounds = "graph" if shared.device.type == "cuda" else "off", 30 if shared.whole else 2
    policy = shared.policy("pi0", BEST.cameras, word)
    given, taken = random_observations(policy, 1, 0), {}
    for count in (1, CANDIDATES):
        call = functools.partial(policy.infer_best, given, BestOf(count), [0])
        call()
        taken[count] = percentile(host_seconds(call, shared.device, rounds), 0.5)
    ratio = taken[CANDIDATES] / taken[1]
    note = f"{1e3 * taken[CANDIDATES]:.1f} and {1e3 * taken[1]:.1f} ms a whole call, {word}, by medoid"
    results.add(f"best of {CANDIDATES} over one, one prefix", ratio, "x", target="<= 1.1", note=note)


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
