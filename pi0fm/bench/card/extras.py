"""The cost of a log-likelihood and of several candidates relative to one chunk, and of an asynchronous checkpoint relative to a step.

Owns: best of eight from one prefix, the log-likelihood of a chunk; a checkpoint of a network with few layers and few words, whose cost is
scaled to the whole network: by the bytes of the state, over steps scaled by their operations. Does not know: which candidate is best, how a
checkpoint is written.

Seconds of the checkpoint's case on the H100 of docs/gpu.md, estimated: 4.1 GB of state (of 37.5) at 1 GB/s to memory and 3 GB/s for its
sums, twice: 11; 7 steps of 0.15 before: 1; network, batch and copies: 5. The part: 10 to start, 20 for this, 15 to spare.
"""

import functools
import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from pi0fm.bench.card.inference import BEST, Inference
from pi0fm.bench.card.results import Results
from pi0fm.bench.card.training import TrainingCase, clear, full_batch, prepared
from pi0fm.bench.card.work import LAYERS, MEMORY_FOLDER, PLACE, training_flops, with_few_layers
from pi0fm.bench.harness.cases import CAMERAS, random_observations
from pi0fm.bench.harness.limits import host_seconds, percentile
from pi0fm.bench.harness.measure import seconds_of
from pi0fm.models.config import PI0, TINY
from pi0fm.policy.sampling.best_of import BestOf
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.components import Adaptation
from pi0fm.train.plan.memory import estimate

CANDIDATES = 8
EVERY = 100  # steps between checkpoints, in the target
LONGEST = 8.0  # seconds of steps during one checkpoint, at most


def measure(results: Results, device: torch.device, whole: bool) -> None:
    """Run all cases, the checkpoint first, since no GPU has measured it yet. whole: at full size; else the tiny preset."""
    results.attempt("asynchronous checkpoint", functools.partial(_checkpoint, results, device, whole), 20 if whole else 1, clear)
    clear()
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


def _checkpoint(results: Results, device: torch.device, whole: bool) -> None:
    """Measure the second checkpoint, which reuses page-locked buffers, in full fine-tuning at the training part's batch size."""
    full = PI0 if whole else TINY
    config = with_few_layers(full)
    case = TrainingCase("full", Adaptation(activation_checkpointing="full"), False, ())
    trainer, batch = prepared(config, case, device), full_batch(config, 32 if whole else 2, device)
    given = itertools.repeat(batch), batch.action_mask.numel()

    def step() -> None:
        trainer.step(*given)

    host_seconds(step, device, 2)
    quiet = percentile(host_seconds(step, device, 5), 0.5)
    with tempfile.TemporaryDirectory(prefix="pi0fm-card-", dir=MEMORY_FOLDER) as folder:
        checkpoints, waited = Checkpoints(folder, trainer.parallel, 1), []
        for number in (1, 2):
            state, beside, began = trainer.state, list[float](), time.monotonic()
            state.step = number
            tensors = state.tensors()
            waited.append(seconds_of(functools.partial(checkpoints.save, number, tensors, {"step": number})))
            while checkpoints.saved != number and time.monotonic() - began < LONGEST:
                beside += host_seconds(step, device, 1)
                checkpoints.settle(wait=False)
            written = time.monotonic() - began
            checkpoints.settle()
        size = sum(tensor.nbytes for tensor in tensors.values())
        checkpoints.close()
    cost = waited[1] + sum(beside) - quiet * len(beside)
    needed = estimate(full, case.how, cameras=len(CAMERAS), micro_batch=1, averaged=False, device=device.type)
    entire = needed.weights + needed.moments
    times = training_flops(full, case.how, len(CAMERAS)) / training_flops(config, case.how, len(CAMERAS))
    during = f"{len(beside)} steps during it of {1e3 * percentile(beside, 0.5):.0f} ms, {1e3 * quiet:.0f} ms without"
    note = (
        f"scaled by arithmetic from {size / 1e9:.1f} to {entire / 1e9:.1f} GB and to {times:.1f} times the step of {LAYERS} layers; "
        f"{1e9 * cost / size:.3f} s a GB, to {PLACE}; waited for {waited[1]:.2f} s ({waited[0]:.2f} the first "
        f"time), {written:.1f} s until written, {during}"
    )
    share = cost * entire / size / (EVERY * quiet * times)
    seconds: dict[str, Any] = {"cost_seconds": cost, "waited_seconds": waited, "written_seconds": written, "quiet_ms": 1e3 * quiet}
    what = f"asynchronous checkpoint every {EVERY} steps, scaled"
    results.add(what, 100 * share, "% of a step", target="<= 3", note=note, bytes=size, whole_bytes=entire, step_scale=times, **seconds)
