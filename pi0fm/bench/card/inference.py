"""Time of a policy call at full size, from host observation to host actions, and by stage.

Owns: the cases in order of importance, the stages. Does not know: how much time is left (card/results.py).

    host      chain: pictures, prompt, state -> tensors
    device    copy in -> vision -> prefix -> ten evaluations of the velocity -> copy out
    host      inverse chain: actions in robot units

The stages of the device are timed as CUDA graphs of the same operations, to exclude the host's kernel launches; on a CPU directly.
"""

import functools
import gc
import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pi0fm.bench.card.results import Results
from pi0fm.bench.card.work import MEMORY_FOLDER, PLACE, inference_work, least_seconds, with_few_layers
from pi0fm.bench.harness.cases import (
    CAMERAS,
    FLOW_STEPS,
    CallSize,
    make_noise,
    make_observation,
    random_network,
    random_observations,
    random_robot,
)
from pi0fm.bench.harness.cases import random_policy as make_policy
from pi0fm.bench.harness.limits import (
    device_seconds,
    forget_peak,
    host_seconds,
    measure_rates,
    peak_bytes,
    percentile,
    synchronize,
)
from pi0fm.bench.harness.measure import seconds_of
from pi0fm.bench.harness.sizes import Case
from pi0fm.bench.harness.steps import their_sampler
from pi0fm.data.chain import Sample
from pi0fm.machine import throttled_seconds
from pi0fm.models.config import PI0, PI05, TINY, Pi0Config
from pi0fm.models.observation import pixels
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.device import set_threads
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.sampling.cuda_graphs import Recorder
from pi0fm.policy.sampling.noise import starting_noise
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.manifest import WEIGHTS

MODELS = {"pi0": PI0, "pi0.5": PI05}
TRIED = {"pi0": TINY, "pi0.5": replace(TINY, state_input="prompt", time_conditioning="adaptive_norm")}
BEST, FOUR, EIGHT = CallSize(1, 3), CallSize(4, 3), CallSize(8, 3)
TARGETS = {("pi0", "graph"): "p50 <= 15 ms, p99 <= 17", ("pi0", "off"): "<= 90 ms", ("pi0.5", "graph"): "<= 18 ms"}
GIB = 2**30


def measure(results: Results, device: torch.device, whole: bool) -> None:
    """Run all cases. whole: at full size; else with the tiny preset, to try every line of code."""
    Inference(results, device, whole).run()


class Inference:
    """Cases of the inference part, which share networks, compiled policies and the device's rates."""

    def __init__(self, results: Results, device: torch.device, whole: bool) -> None:
        self.results, self.device, self.whole = results, device, whole
        set_threads(None)  # as `pi0fm.load` does
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rates = measure_rates(device, whole=whole)
        self.networks: dict[str, Pi0] = {}
        self.policies: dict[tuple[str, int, str], LocalPolicy] = {}
        self.modes = ("off", "graph", "kernels") if device.type == "cuda" else ("off", "kernels")
        self.p50: dict[tuple[str, str, CallSize], float] = {}

    def run(self) -> None:
        """Run all cases, those never measured before first; report those for which no time is left."""
        self.results.add("copy rate", self.rates.bytes_per_second / 1e9, "GB/s", note="read and written")
        product = self.rates.flops_per_second[torch.bfloat16] / 1e12
        self.results.add("bfloat16 product rate", product, "TFLOP/s", note="8192 x 8192 x 8192, random")
        fast = self.modes[1]
        for mode in (fast, "off"):
            self.call("pi0", mode, BEST)
        self.attempt("LeRobot's PI0, 3 cameras, batch 1", self.lerobot, 25)
        self.attempt("first answer from a bundle", self.first_answer, 10)
        for size, mode in itertools.product((CallSize(1, 2), CallSize(1, 1)), (fast, "off")):
            self.call("pi0", mode, size)
        for mode in (fast, "off"):
            self.call("pi0.5", mode, BEST)
        self.attempt_stages("pi0", "off")
        self.attempt_stages("pi0", fast)
        for mode in (fast, "off"):
            self.call("pi0", mode, EIGHT)
        one, eight = (self.p50.get(("pi0", fast, size)) for size in (BEST, EIGHT))
        if one and eight:
            self.results.add(f"pi0, batch {EIGHT.batch} over batch 1, {fast}", EIGHT.batch * one / eight, "x", target=">= 1.3")
        self.attempt_stages("pi0.5", fast)
        for mode in (fast, "off"):
            self.call("pi0", mode, FOUR)
        for mode, size in itertools.product(self.modes[2:], (BEST, EIGHT)):
            self.call("pi0", mode, size)

    def attempt(self, what: str, case: Callable[[], None], seconds: float) -> None:
        """Run `case` if enough time is left. seconds: its duration at full size."""
        self.results.attempt(what, case, seconds if self.whole else 1, self.clear)

    def call(self, name: str, mode: str, size: CallSize) -> None:
        """Time whole calls of one case."""
        what, known = f"{name}, {size}, {mode}", (name, size.cameras, mode) in self.policies
        self.attempt(what, functools.partial(self._call, what, name, mode, size), 5 if known or mode == "off" else 20)

    def _call(self, what: str, name: str, mode: str, size: CallSize) -> None:
        forget_peak(self.device)
        made = seconds_of(lambda: self.policy(name, size.cameras, mode))
        policy, seeds = self.policy(name, size.cameras, mode), list(range(size.batch))
        given = itertools.cycle([random_observations(policy, size.batch, seed) for seed in range(4)])

        def call() -> None:
            policy.infer_batch(next(given), seeds)

        first = seconds_of(call)
        once = host_seconds(call, self.device, 5 if self.whole else 3)[-1]
        gc.collect()
        gc.freeze()  # as pi0fm serve does before it is ready
        rounds = max(10, min(300, int(3.0 / once))) if self.whole else 3
        before = _host_counts()
        taken = host_seconds(call, self.device, rounds)
        host = {name: value - before[name] for name, value in _host_counts().items()}
        p50, p99 = percentile(taken, 0.5), percentile(taken, 0.99)
        self.p50[name, mode, size] = p50
        config = policy.model.config
        work = inference_work(config, size.batch, size.cameras, config.max_prompt_tokens, FLOW_STEPS)
        limit = sum(least_seconds(work, self.rates).values())
        self.results.add(
            what,
            1e3 * p50,
            "ms",
            limit_share=limit / p50,
            target=TARGETS.get((name, mode), "") if size == BEST else "",
            note=f"p99 {1e3 * p99:.1f} ms; {size.batch / p50:.0f} a second",
            p99_ms=1e3 * p99,
            calls=rounds,
            limit_ms=1e3 * limit,
            made_seconds=made,
            first_call_seconds=first,
            slowest_ms=[1e3 * seconds for seconds in sorted(taken)[-5:]],
            peak_gib=peak_bytes(self.device) / GIB,
            threads=torch.get_num_threads(),
            **host,
        )

    def attempt_stages(self, name: str, mode: str) -> None:
        """Time the stages of a call with one observation."""
        what = f"{name}, {BEST}, {mode}, by stage"
        if (name, BEST.cameras, mode) in self.policies:
            self.attempt(what, functools.partial(self._stages, what, name, mode), 8)

    def _stages(self, what: str, name: str, mode: str) -> None:
        policy = self.policy(name, BEST.cameras, mode)
        sampler, config, given = policy.sampler, policy.model.config, random_observations(policy, 1, 0)
        shape, rounds = (config.action_horizon, config.action_dim), 50 if self.whole else 2
        inputs, noise = policy.chain.observe(given), starting_noise([0], shape)
        seen, there = inputs.to(self.device), noise.to(self.device)
        mask, chunk = policy.mask(1), noise.numpy()
        with torch.inference_mode(), sampler.precision():
            field = sampler.cached_velocity(seen)
        host = functools.partial(host_seconds, device=self.device, rounds=rounds)
        device = functools.partial(self.staged, sampler.precision, rounds)
        found = {
            "chain": host(lambda: policy.chain.observe(given)),
            "noise": host(lambda: starting_noise([0], shape)),
            "copy in": host(lambda: (inputs.to(self.device), noise.to(self.device))),
            "vision": device(lambda: policy.model.vision(pixels(seen.images.flatten(0, 1)))),
            "encode": device(lambda: sampler.cached_velocity(seen)),
            "steps": device(lambda: sampler.flow.sample(field, there, mask=mask, check=False)),
            "copy out": host(lambda: there.float().cpu().numpy()),
            "inverse chain": host(lambda: policy.chain.inverse(Sample(inputs.state.numpy(), chunk))),
        }
        ms = {stage: 1e3 * percentile(seconds, 0.5) for stage, seconds in found.items()}
        ms["prefix"] = ms.pop("encode") - ms["vision"]
        work = inference_work(config, 1, BEST.cameras, config.max_prompt_tokens, FLOW_STEPS)
        limits = {stage: 1e3 * seconds for stage, seconds in least_seconds(work, self.rates).items()}
        note = ", ".join(
            f"{stage} {value:.2f}" + (f" (limit {limits[stage]:.2f})" if stage in limits else "") for stage, value in ms.items()
        )
        total = sum(ms.values())
        self.results.add(what, total, "ms", limit_share=sum(limits.values()) / total, note=note, stages_ms=ms, limits_ms=limits)

    def staged(self, precision: Callable[[], torch.autocast], rounds: int, call: Callable[[], object]) -> list[float]:
        """Device seconds of a call, without the host's kernel launches."""

        def whole() -> Tensor:
            with torch.inference_mode(), precision():
                answer = call()
            return answer if isinstance(answer, Tensor) else torch.empty(())  # the recorder asks for a tensor

        if self.device.type != "cuda":
            return host_seconds(whole, self.device, rounds)
        return device_seconds(Recorder(self.device)(whole), self.device, rounds)

    def policy(self, name: str, cameras: int, mode: str) -> LocalPolicy:
        """Get a policy, built at its first use; policies of a model share its weights, those of a mode also the compiled code."""
        key = (name, cameras, mode)
        if key not in self.policies:
            made = make_policy(self.network(name), cameras, self.device, self.dtype, mode)
            earlier = [policy for (other, _, word), policy in self.policies.items() if (other, word) == (name, mode)]
            if earlier:  # another number of cameras with the same sampler
                made.sampler = earlier[0].sampler
            self.policies[key] = made
        return self.policies[key]

    def network(self, name: str) -> Pi0:
        """Get a network with random weights, built on the device at its first use."""
        if name not in self.networks:
            began = time.perf_counter()
            config: Pi0Config = (MODELS if self.whole else TRIED)[name]
            self.networks[name] = random_network(config, self.device)
            synchronize(self.device)
            self.results.facts[f"{name} made in seconds"] = round(time.perf_counter() - began, 2)
        return self.networks[name]

    def lerobot(self) -> None:
        """Time LeRobot's network, eager, from tensors on the device; ours is timed from the robot's observation to its actions."""
        from pi0fm.bench.card import peer  # LeRobot, where it can be imported

        if not self.whole:  # LeRobot has no small network: only the import can be tried
            peer.imported()
            return
        case = Case(PI0, (True,) * len(CAMERAS), PI0.max_prompt_tokens, training_batch=1)
        call = their_sampler(peer.network(self.device, "bfloat16"), make_observation(case, 1, 0), make_noise(case, 1, 0).to(self.device))
        for name, autocast in (("dtype bfloat16", False), ("dtype bfloat16, autocast", True)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                taken = device_seconds(call, self.device, 15, warm_up=2)
            p50 = percentile(taken, 0.5)
            note = ", ".join(f"{p50 / ours:.2f} x ours {word}" for word in self.modes if (ours := self.p50.get(("pi0", word, BEST))))
            self.results.add(f"LeRobot's PI0, {BEST}, {name}", 1e3 * p50, "ms", target=">= 3 x graph, >= 1.3 x off", note=note)

    def first_answer(self) -> None:
        """Time what precedes a served policy's first answer, with few layers: the weights to the device, and recording."""
        full: Pi0Config = PI0 if self.whole else TINY
        config, mode = with_few_layers(full), self.modes[1] if self.device.type == "cuda" else self.modes[0]
        network = random_network(config, self.device)
        robot, stats = random_robot(config, BEST.cameras)
        with tempfile.TemporaryDirectory(prefix="pi0fm-card-", dir=MEMORY_FOLDER) as folder:
            path = Path(folder) / "bundle"
            bundle.save(path, network.state_dict(), robot, stats)
            size = (path / WEIGHTS).stat().st_size
            began = time.perf_counter()
            policy = bundle.load(path, device=str(self.device), compile=mode)
            synchronize(self.device)
            loaded = time.perf_counter() - began
        first = seconds_of(lambda: policy.infer_batch(random_observations(policy, 1, 0), [0]))
        with torch.device("meta"):
            whole = 4 * sum(parameter.numel() for parameter in Pi0(full).parameters())
        note = (
            f"scaled by bytes from {size / 1e9:.2f} to {whole / 1e9:.2f} GB, from {PLACE}; "
            f"{size / loaded / 1e9:.2f} GB/s with hashing and {mode}; then {first:.1f} s for the answer of few layers"
        )
        self.results.add("load of a bundle, scaled", loaded * whole / size, "s", note=note, load_seconds=loaded, first_call_seconds=first)

    def clear(self) -> None:
        """Release memory after a failure."""
        gc.collect()
        forget_peak(self.device)


def _host_counts() -> dict[str, float]:
    """Count what may delay a call on the host: other processes, and a container whose quota of processors is used up."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "preempted": usage.ru_nivcsw,
        "major_page_faults": usage.ru_majflt,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "throttled_seconds": throttled_seconds(),
    }
