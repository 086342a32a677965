r"""Validation on held-out demonstrations: their loss, the error of sampled chunks, and their likelihood.

Owns: `ValidationConfig`, the fixed chunks, probes, noise and times, and the metrics computed from them.
Does not know: which episodes are held out (data/columns/held_out.py), when validation is due (train/watch/schedule.py).

    held-out frames --fixed order--> N chunks --pieces of 8--> piece 0 | piece 1 | piece 2 | piece 3 | ...
                                                               rank 0    rank 1    rank 0    rank 1        W = 2
    piece -> encode_prefix once -> push_backward (averaged weights, float32) -> chunks, nats, entries \
                                -> loss at fixed noise and times             -> sum, count             > one row; ranks add their rows
                                -> chunk sampled from fixed noise, by the inverse chain to robot units -> absolute errors, rows
Only whole chunks have a density. Past an episode's end training inputs are repeated actions with noise, which the loss masks: there is no
clean value for those rows that the network has learned, so chunks that pass the end are left out. The loss covers all chunks.
Every number is a function of (seed, weights, held-out episodes): a resumed run, or another number of workers, gives the same bits, since
the pieces are the same and each row is computed by one worker.
Shape letters: B chunks of a piece, H action horizon, A action dim, K draws of noise.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from pi0fm import progress
from pi0fm.data.chain import Sample
from pi0fm.data.loading.batch import Batch
from pi0fm.data.loading.loader import Collator
from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import SOLVERS
from pi0fm.flow.density import DensityOptions, push_backward
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import Velocity
from pi0fm.models.observation import ModelObservation
from pi0fm.train.components import ValidationConfig
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.state import TrainState

NLL, NLL_PER_DIM, LOSS = "validation_nll", "validation_nll_per_dim", "validation_loss"
ERROR = "validation_error"  # mean absolute, over all rows inside the episode and all dimensions, in robot units
PIECE = 8  # chunks in one forward pass, for any number of workers
LOSS_DRAWS = 4  # pairs of noise and time for each chunk
OTHER_STREAM = 1 << 63  # flipped in the seed, for noise and order that no training sample has


Encode = Callable[[ModelObservation], Velocity]
"""Map from an observation to its velocity: the prefix is encoded once, the velocity is evaluated many times."""


@dataclass(frozen=True)
class Validator:
    """Validator of the fixed chunks of one data set. entry: its name in a mixture, "" without one.

    gathered: context in which `encode` has its weights, entered by every worker. halved: frozen weights and products are bfloat16.
    """

    config: ValidationConfig
    encode: Encode
    flow: FlowMatching
    collator: Collator
    device: torch.device
    entry: str = ""
    gathered: Callable[[], AbstractContextManager[None]] = nullcontext
    halved: bool = False

    def named(self, metric: str) -> str:
        """Return a metric's name in metrics.jsonl, such as `validation_nll`, or `validation_nll/NAME` with a mixture."""
        return f"{metric}/{self.entry}" if self.entry else metric

    @property
    def num_chunks(self) -> int:
        """Number of held-out chunks evaluated."""
        return min(self.config.samples, len(self.collator.source.frames))

    @property
    def num_whole(self) -> int:
        """Number of chunks that end inside their episode, and so have a density."""
        source = self.collator.source
        frames = source.frames[self.collator.samples_at(np.arange(self.num_chunks)).index]
        return int((source.end[frames] - frames >= self.collator.action_horizon).sum())

    def due(self, step: int, steps: int) -> bool:
        """Whether a run of `steps` steps validates after step number `step`, counted from 1."""
        return step > 0 and (step % self.config.every == 0 or step == steps)

    def validate(self, parallel: Parallel, step: int, notice: Callable[[str], None]) -> dict[str, float]:
        """Compute the metrics of the current weights; called by every worker, at the same step.

        notice: called with a line for each piece. A metric that is not finite is named on standard error and left out: a NaN weight must
        not cost the run its checkpoint or its bundle.
        """
        context = parallel.context
        found = summarize(parallel.sum(measure(self, context.rank, context.world_size, notice)))
        metrics = {self.named(name): value for name, value in found.items()}
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken and context.is_first:
            progress.say(f"step {step}: {', '.join(broken)} of the held-out chunks is not finite, and is left out of metrics.jsonl")
        return {name: value for name, value in metrics.items() if name not in broken}


def make_validators(
    config: ValidationConfig, collators: Mapping[str, Collator], state: TrainState, flow: FlowMatching, device: torch.device
) -> tuple[Validator, ...]:
    """Make a validator for each entry of a run, none without validation; they share one averaged network, which follows the state.

    collators: of the held-out episodes, as for training.
    """
    if not config.every:
        return ()
    averaged, draws = state.averaged_network(), LOSS_DRAWS + config.probes
    return tuple(
        Validator(
            config,
            averaged.cached_velocity,  # not wrapped by accelerate, hence in the float32 of its weights
            flow,
            replace(collator, seed=collator.seed ^ OTHER_STREAM, flow_draws=draws),
            device,
            entry,
            lambda: state.gathered(averaged),
            state.config.adaptation.frozen_bfloat16,
        )
        for entry, collator in collators.items()
    )


def measure(validator: Validator, rank: int, world_size: int, notice: Callable[[str], None] | None = None) -> Float64[Tensor, "pieces 7"]:
    """Return a row per piece: whole chunks, their nats and entries, sum and count of the loss, sum and count of absolute errors.

    Rows of other ranks' pieces are 0. Nats are NaN where the density is not finite, errors where the chunk is not; the reason is printed.
    """
    firsts = range(0, validator.num_chunks, PIECE)
    rows = torch.zeros(len(firsts), 7, dtype=torch.float64, device=validator.device)
    for number, first in enumerate(firsts):
        if number % world_size != rank:
            continue
        if notice is not None:
            notice(f"validating, chunk {first} of {validator.num_chunks}")
        batch = validator.collator(first, min(PIECE, validator.num_chunks - first)).to(validator.device)
        with torch.no_grad(), torch.autocast(validator.device.type, torch.bfloat16, enabled=validator.halved):
            velocity = validator.encode(batch.observation)
            whole = batch.action_mask.any(2).all(1) & validator.config.likelihood
            nats = _nats(validator, velocity, batch, whole) if validator.config.likelihood else rows.new_zeros(())
            total, count = _loss(validator.flow, velocity, batch)
            off, entries = _error(validator, velocity, batch)
        rows[number] = torch.stack([whole.sum().double(), nats, batch.action_mask[whole].sum().double(), total, count, off, entries])
    return rows


def summarize(rows: Float64[Tensor, "pieces 7"]) -> dict[str, float]:
    """Return the metrics from all rows: mean nats of a whole chunk and of an entry, if there are any; loss; mean absolute error."""
    chunks, nats, entries, total, count, off, judged = rows.sum(0).tolist()
    density = {NLL: nats / chunks, NLL_PER_DIM: nats / entries} if chunks else {}
    return {**density, LOSS: total / count, ERROR: off / judged}


def _nats(validator: Validator, velocity: Velocity, batch: Batch, whole: Bool[Tensor, " B"]) -> Float64[Tensor, ""]:
    """Negative log-likelihood of a piece, summed over its whole chunks: nats of the normalised entries."""
    config = validator.config
    # the sign of a normal number is +1 or -1 with equal odds
    probes = torch.where(batch.noise[:, LOSS_DRAWS:] < 0, -1.0, 1.0).transpose(0, 1)
    density = DensityOptions(probes=probes, num_flow_steps=config.num_flow_steps, solver=config.solver)
    try:
        pushed = push_backward(validator.flow, velocity, batch.actions, batch.action_mask, density)
    except FlowError as error:
        progress.say(f"validation: {error}")
        return torch.full((), math.nan, dtype=torch.float64, device=validator.device)
    return -pushed.log_prob[whole].double().sum()


def _loss(flow: FlowMatching, velocity: Velocity, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum, count) of the training loss, float64; every draw uses the same encoding."""
    sums = torch.zeros(2, dtype=torch.float64, device=batch.actions.device)
    for noise, uniform in zip(batch.noise[:, :LOSS_DRAWS].unbind(1), batch.uniform[:, :LOSS_DRAWS].unbind(1), strict=True):
        t = flow.times(uniform)
        pair = flow.training_pair(batch.actions, t, noise)
        sums += torch.stack(flow.loss(velocity(pair.x_t, t), pair.target, batch.action_mask, t)).double()
    return sums[0], sums[1]


def _error(validator: Validator, velocity: Velocity, batch: Batch) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """(sum, count) of the absolute errors of one sampled chunk each, in robot units; a stochastic solver is replaced by Euler's."""
    flow, chain = validator.flow, validator.collator.chain
    real = batch.action_mask.any(1, keepdim=True).expand_as(batch.action_mask)
    solver = flow.solver if flow.solver in SOLVERS else "euler"
    try:
        sampled = flow.sample(velocity, batch.noise[:, 0], solver=solver, mask=None if validator.collator.padded_noise else real)
    except FlowError as error:
        progress.say(f"validation: {error}")
        sampled = torch.full_like(batch.actions, math.nan)
    state = batch.observation.state.float().cpu().numpy()
    found, recorded = (chain.inverse(Sample(state, each.float().cpu().numpy())).actions for each in (sampled, batch.actions))
    assert found is not None and recorded is not None
    off = torch.from_numpy(np.abs(found - recorded)).double()
    inside = batch.action_mask[..., : off.shape[-1]].cpu()
    sums = torch.stack([off[inside].sum(), inside.sum().double()]).to(batch.actions.device)
    return sums[0], sums[1]
