"""Flow matching, CNF and diffusion side by side: the same data, network, budget and judge.

Owns: the order train -> judge for each method, and the figures that come of it. Does not know: pictures, pages, files.

    common NLL       the worst of the methods' best held-out NLLs: every method reaches it
    train_seconds    of training until a method's averaged weights are at the common NLL or below, at the marks of its curve
    speedup          train_seconds of the CNF over those of flow matching
    common distance  1.1 times the worst of the methods' sliced Wasserstein distances at their finest: every method reaches it
    evaluations      the fewest of the network, a sample, that stay within the common distance

Times are those of the first mark at or below, for all methods alike.
Shape letters: B points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm import progress
from pi0fm.flow.checks import FlowError
from pi0fm.toy import quality
from pi0fm.toy.config import DemoConfig
from pi0fm.toy.datasets import Dataset, dataset_named
from pi0fm.toy.methods import CNF, DIFFUSION, FLOW_MATCHING, Method
from pi0fm.toy.network import PlaneField
from pi0fm.toy.quality import Quality
from pi0fm.toy.training import Mark, Trained, train

HELD_OUT, CURVE_POINTS, SAMPLES = 4000, 800, 2000
FINE_STEPS, CURVE_STEPS = 40, 16
NEAR = 0.05  # nats
DISTANCE_MARGIN = 1.1


@final
@dataclass(frozen=True)
class Outcome:
    """One trained method, judged.

    nll: of HELD_OUT points, nats. samples: SAMPLES points, sampled at its finest.
    ode: quality by the flow's solver. ancestral: by ancestral sampling, for the diffusion alone.
    """

    method: Method
    trained: Trained
    nll: float
    samples: Float[Tensor, "B 2"]
    ode: tuple[Quality, ...]
    ancestral: tuple[Quality, ...] = ()

    @property
    def sampler(self) -> tuple[Quality, ...]:
        """The method's own way to sample: ancestral for the diffusion, the ODE for the others."""
        return self.ancestral or self.ode


@final
@dataclass(frozen=True)
class Comparison:
    """What was found. Dictionaries are by method name, None for what no mark of the curve reaches.

    entropy: the NLL of the data's own density on the same held-out points. floor: the distance between two sets of data.
    """

    dataset: Dataset
    outcomes: tuple[Outcome, ...]
    entropy: float
    floor: float

    @property
    def common_nll(self) -> float:
        """The worst of the best NLLs of the curves."""
        return max(min(mark.nll for mark in outcome.trained.curve) for outcome in self.outcomes)

    @property
    def best_nll(self) -> float:
        """The best NLL of all curves."""
        return min(mark.nll for outcome in self.outcomes for mark in outcome.trained.curve)

    @property
    def common_distance(self) -> float:
        """DISTANCE_MARGIN times the worst of the distances of the finest samplings."""
        return DISTANCE_MARGIN * max(outcome.sampler[-1].distance for outcome in self.outcomes)

    @property
    def nll(self) -> dict[str, float]:
        """Held-out NLL after the whole training, nats."""
        return {outcome.method.name: outcome.nll for outcome in self.outcomes}

    @property
    def train_seconds(self) -> dict[str, float | None]:
        """Seconds of training to the common NLL."""
        return {outcome.method.name: seconds_to(outcome.trained.curve, self.common_nll) for outcome in self.outcomes}

    @property
    def seconds_to_near(self) -> dict[str, float | None]:
        """Seconds of training to the best NLL plus NEAR."""
        return {outcome.method.name: seconds_to(outcome.trained.curve, self.best_nll + NEAR) for outcome in self.outcomes}

    @property
    def evaluations(self) -> dict[str, int | None]:
        """Evaluations a sample to the common distance, each method sampled its own way."""
        return {outcome.method.name: quality.fewest(outcome.sampler, self.common_distance) for outcome in self.outcomes}

    @property
    def probability_flow_evaluations(self) -> int | None:
        """The diffusion's evaluations by its probability-flow ODE; None also without a diffusion."""
        found = [quality.fewest(outcome.ode, self.common_distance) for outcome in self.outcomes if outcome.method.name == DIFFUSION]
        return found[0] if found else None

    @property
    def speedup(self) -> float | None:
        """How many times longer the CNF trains to the common NLL than flow matching; None unless both were trained."""
        ours, theirs = self.train_seconds.get(FLOW_MATCHING), self.train_seconds.get(CNF)
        return None if ours is None or theirs is None else theirs / ours


def seconds_to(curve: Sequence[Mark], nll: float) -> float | None:
    """Seconds of training at the first mark at or below `nll`; None where there is none."""
    return next((mark.seconds for mark in curve if mark.nll <= nll), None)


def compare(config: DemoConfig) -> Comparison:
    """Train and judge every method of `config`. Raises FlowError when a training leaves the numbers."""
    dataset = dataset_named(config.dataset)
    # Streams apart from the trainings', which start at the seed itself.
    generator = torch.Generator().manual_seed(2**32 + config.seed)
    held_out = dataset.sample(HELD_OUT, generator)
    other, noise = dataset.sample(SAMPLES, generator), torch.randn(SAMPLES, 2, generator=generator)
    outcomes = tuple(_outcome(method, dataset, config, held_out, noise) for method in config.methods())
    entropy = -float(dataset.log_prob(held_out).double().mean())
    return Comparison(dataset, outcomes, entropy, quality.sliced_wasserstein(other, held_out[:SAMPLES]))


def _outcome(method: Method, dataset: Dataset, config: DemoConfig, held_out: Tensor, noise: Tensor) -> Outcome:
    few = held_out[:CURVE_POINTS]

    def held_out_nll(network: PlaneField) -> float:
        try:
            return quality.held_out_nll(method.flow, network, few, CURVE_STEPS)
        except FlowError:
            return math.inf  # a field that is still so rough that no grid follows it; the final NLL has no such excuse

    with progress.step(f"{method.title}: training", 100) as bar:
        shown = 0

        def watch(spent: float, note: str) -> None:
            nonlocal shown
            percent = int(100 * spent)
            if percent > shown:
                bar.advance(percent - shown, note)
                shown = percent

        trained = train(method, dataset, config.budget, config.seed, held_out_nll, watch)
    nll = quality.held_out_nll(method.flow, trained.network, held_out, FINE_STEPS)
    if not math.isfinite(nll):
        raise FlowError(
            f"{method.title}: the held-out NLL must be finite, found {nll}; train longer with --seconds {2 * trained.seconds:.0f}"
        )
    target = held_out[: len(noise)]
    ode, samples = quality.ode_curve(method.flow, trained.network, noise, target)
    ancestral: tuple[Quality, ...] = ()
    if method.name == DIFFUSION:
        ancestral, samples = quality.ancestral_curve(method.flow, trained.network, noise, target, config.seed)
    return Outcome(method, trained, nll, samples, ode, ancestral)
