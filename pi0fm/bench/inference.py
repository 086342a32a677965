"""Time of ten Euler steps for one observation: LeRobot's PI0 against ours, in one process, with the same weights and noise.

Owns: the timed work of both sides, the two modes, the bounds within which the chunks must agree, the figures of a comparison of speed.
Does not know: how its report is shown.

    timed on both sides    pictures, prompt and state to keys and values once; ten velocities; the chunk, normalised
    timed on ours only     removing masked cameras and unused prompt columns, pictures from uint8 to [-1, 1]
    timed on neither       resizing, tokenizing, normalising, drawing noise, actions to robot units

LeRobot's side is `PI0Pytorch.sample_actions` with the arguments that its `predict_action_chunk` passes on; ours is `LocalPolicy`'s work
on an observation that its chain has prepared. Both are eager, unless `--compile` is given for ours.

    like_for_like   float32 on both sides, torch's default for products, the same threads
    as_shipped      LeRobot's configuration on a CPU is float32; `pi0fm.load` takes bfloat16 for the towers' matrices where the processor
                    multiplies it in hardware, and float32 elsewhere

On a GPU the rows of `pi0fm bench card` follow: networks of full size, for which the comparison has no time.

`ratio` is LeRobot's time / ours, `gemm_ratio` our time / that of our matrix products alone, `roofline_share` the least time by the
machine's limits / ours.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pi0fm import progress
from pi0fm.bench.card import run as card
from pi0fm.bench.config import CardOptions, InferenceOptions
from pi0fm.bench.harness.cases import EULER, make_noise, make_observation
from pi0fm.bench.harness.limits import Rates, measure_rates, products_of, synchronized
from pi0fm.bench.harness.measure import BenchReport, paired_ratio
from pi0fm.bench.harness.sizes import CASES
from pi0fm.bench.harness.steps import their_sampler
from pi0fm.flow.matching import FlowMatching
from pi0fm.models.observation import ModelObservation
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.device import choose_device, inference_dtype
from pi0fm.policy.sampling.sampler import Sampler

MODES = ("like_for_like", "as_shipped")
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Bounds of `displacement_difference`, by the type of our matrices. bfloat16 keeps 8 bits; the errors of 10 steps and 10 layers add up."""


def measure(options: InferenceOptions) -> BenchReport:
    """Time both modes of every case. Raises Pi0fmError when the two sides differ, ConfigError for a missing device."""
    progress.say("loading LeRobot")
    from pi0fm.bench.harness import peer  # LeRobot's import alone takes many seconds

    device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    rates = measure_rates(device, BOUNDS)
    rows: dict[str, dict[str, Any]] = {mode: {} for mode in MODES}
    with progress.step("calls compared", len(options.cases) * len(MODES)) as bar:
        for name in options.cases:
            case = CASES[name]
            pair = peer.build_pair(case, options.seed, device)
            observation, noise = make_observation(case, 1, options.seed), make_noise(case, 1, options.seed).to(device)
            theirs = their_sampler(pair.theirs.model, observation, noise)
            narrow = inference_dtype("auto", device, case.config.decoder.backbone.width)
            for mode, dtype in zip(MODES, (torch.float32, narrow), strict=True):
                ours = SamplerCall.for_network(pair.ours, observation, noise, dtype, options.compile)
                difference = peer.displacement_difference(ours(), theirs(), noise)
                peer.check_alike(f"{name} {mode}", "action chunks", difference, BOUNDS[dtype])
                # products inside compiled kernels cannot be traced; they equal those of the uncompiled network
                plain = ours if options.compile == "off" else SamplerCall.for_network(pair.ours, observation, noise, dtype)
                found = speed(theirs, ours, plain, plain.sampler.model, options.rounds, device, rates)
                rows[mode][name] = found | {"max_abs_difference": difference, "difference_bound": BOUNDS[dtype]}
                bar.advance(1, f"{name} {mode}")
    return with_full_size(speed_report(rows, rates), "inference", device, options.output_dir)


@dataclass(frozen=True)
class SamplerCall:
    """A call of our sampler: one chunk [B, H, A] from `observation`, which is on the host as the chain leaves it."""

    sampler: Sampler
    observation: ModelObservation
    noise: Tensor

    @classmethod
    def for_network(
        cls, model: Pi0, observation: ModelObservation, noise: Tensor, dtype: torch.dtype, compile: str = "off"
    ) -> "SamplerCall":
        """Build the call on a copy of the model. dtype: of the matrices. compile: a word of `policy.load_options.COMPILE`."""
        return cls(Sampler(copy.deepcopy(model), FlowMatching.from_config(EULER), noise.device, dtype, compile), observation, noise)

    def __call__(self) -> Tensor:
        """Sample the chunk."""
        return self.sampler(self.observation.trimmed(), self.noise, torch.ones_like(self.noise, dtype=torch.bool))


def speed(
    theirs: Callable[[], object],
    ours: Callable[[], object],
    plain: Callable[[], object],
    model: nn.Module,
    rounds: int,
    device: torch.device,
    rates: Rates,
) -> dict[str, Any]:
    """Figures of one comparison. plain: `ours` as a call whose products can be traced; model: the network whose weights it reads."""
    products, their_products = products_of(plain, model.parameters()), products_of(theirs)
    their_call, our_call, bare_call = (synchronized(call, device) for call in (theirs, ours, products.run))
    ratio, over_products = paired_ratio(their_call, our_call, rounds), paired_ratio(our_call, bare_call, rounds)
    seconds, least, flops = ratio.second_seconds, rates.seconds(products.flops, products.weight_bytes), products.flops.total()
    return {
        **ratio.json(),
        "seconds": seconds,
        "peer_seconds": ratio.first_seconds,
        "gemm_ratio": over_products.median,
        "gemm_interval": over_products.interval,
        "products_seconds": over_products.second_seconds,
        "gflop": flops / 1e9,
        "peer_gflop": their_products.flops.total() / 1e9,
        "weight_megabytes": products.weight_bytes / 1e6,
        "gflop_per_second": flops / seconds / 1e9,
        "roofline_seconds": least,
        "roofline_share": least / seconds,
    }


def speed_report(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]], rates: Rates, figures: Mapping[str, Any] | None = None
) -> BenchReport:
    """Report of `rows`, by mode and case, followed by `figures`."""

    def column(mode: str, name: str) -> dict[str, Any]:
        return {case: row[name] for case, row in rows[mode].items()}

    speeds = {str(dtype).removeprefix("torch."): speed / 1e9 for dtype, speed in rates.flops_per_second.items()}
    rest = {"roofline": {"gflop_per_second": speeds, "gigabytes_per_second": rates.bytes_per_second / 1e9}, **(figures or {})}
    found = {mode: column(mode, "ratio") for mode in MODES} | {"intervals": {mode: column(mode, "interval") for mode in MODES}}
    found |= {name: column("like_for_like", name) for name in ("gemm_ratio", "max_abs_difference")}
    return BenchReport(found | {"figures": rows} | rest, shown={**rows, **rest})


def with_full_size(report: BenchReport, part: str, device: torch.device, output_dir: Path | None) -> BenchReport:
    """Add the rows of this part of `pi0fm bench card` to a GPU's report; a CPU's stays as it is. output_dir: the part's folder `card`."""
    if device.type != "cuda":
        return report
    with tempfile.TemporaryDirectory() as unwanted:
        whole = card.measure(CardOptions((part,), Path(output_dir or unwanted) / "card", device.type))
    table = (whole.shown or {}).get(part, whole.figures["ended"])
    return BenchReport({**report.figures, "full_size": whole.figures["figures"]}, {**(report.shown or {}), "full size": table})
