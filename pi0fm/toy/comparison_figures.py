"""Pictures of the comparison: what each method learned, and what it cost.

Owns: their drawing. Does not know: how the figures in them were measured; files.

    learned.png     density and samples of each method beside the data's own
    comparison.png  held-out NLL against seconds of training; distance of samples to data against evaluations
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pi0fm.toy import flow_figures, style
from pi0fm.toy.comparison import Comparison, Outcome
from pi0fm.toy.flow_figures import GRID, Subject
from pi0fm.toy.methods import DIFFUSION
from pi0fm.toy.quality import Quality


def subject(comparison: Comparison, outcome: Outcome, seed: int) -> Subject:
    """Whose single pictures are drawn."""
    return Subject(outcome.method.title, outcome.method.flow, outcome.trained.network, comparison.dataset.extent, seed)


@torch.no_grad()
def learned(comparison: Comparison, seed: int) -> bytes:
    """Density above, samples below: the data first, then each method."""
    outcomes, extent = comparison.outcomes, comparison.dataset.extent
    columns = 1 + len(outcomes)
    figure, axes = style.panels(columns, 2, width=2.6 * columns, height=5.6)
    generator = torch.Generator().manual_seed(seed)
    edge = torch.linspace(-extent, extent, GRID)
    truth = comparison.dataset.log_prob(flow_figures.square(edge)).exp().reshape(GRID, GRID)
    largest = float(truth.max())
    flow_figures.draw_density(axes[0], truth, extent, largest)
    style.plane(axes[0], f"data: entropy {comparison.entropy:.3f}", extent)
    _points(axes[columns], comparison.dataset.sample(len(outcomes[0].samples), generator), style.INK, "samples of the data", extent)
    for k, outcome in enumerate(outcomes, 1):
        _, window, density = flow_figures.density_at(subject(comparison, outcome, seed), 1.0, GRID)
        flow_figures.draw_density(axes[k], density, window, largest)
        style.plane(axes[k], f"{outcome.method.title}: NLL {outcome.nll:.3f}", extent)
        title = f"{outcome.ancestral[-1].evaluations} ancestral steps" if outcome.method.name == DIFFUSION else "samples by the ODE"
        _points(axes[columns + k], outcome.samples, style.COLOURS[outcome.method.name], title, extent)
    return style.png(figure)


def curves(comparison: Comparison) -> bytes:
    """NLL against seconds of training, distance against evaluations."""
    figure, (left, right) = style.panels(2, height=4.9)
    _training(left, comparison)
    _sampling(right, comparison)
    return style.png(figure)


def _training(axis: Any, comparison: Comparison) -> None:
    marks = [mark for outcome in comparison.outcomes for mark in outcome.trained.curve]
    for outcome in comparison.outcomes:
        curve, colour = outcome.trained.curve, style.COLOURS[outcome.method.name]
        axis.plot(
            [m.seconds for m in curve], [m.nll for m in curve], "o-", color=colour, markersize=4, linewidth=2, label=outcome.method.title
        )
    axis.axhline(comparison.entropy, color=style.INK, linewidth=1, linestyle="--", label=f"entropy of the data, {comparison.entropy:.3f}")
    if len(comparison.outcomes) > 1:
        axis.axhline(comparison.common_nll, color=style.SOFT, linewidth=1, linestyle=":", label=f"common NLL, {comparison.common_nll:.3f}")
    style.chart(axis, "Held-out NLL while training", "processor seconds of training", "nats")
    axis.set_xscale("log")
    lowest = min(comparison.entropy, *(mark.nll for mark in marks))
    # A first mark may be far off: the window holds every last mark, and at most 1.5 nats above the lowest of all else.
    last = max(outcome.trained.curve[-1].nll for outcome in comparison.outcomes)
    highest = max(last, min(max(mark.nll for mark in marks), lowest + 1.5))
    room = 0.06 * (highest - lowest)
    axis.set_ylim(lowest - room, highest + room)
    plain(axis.xaxis)
    style.legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _sampling(axis: Any, comparison: Comparison) -> None:
    for outcome in comparison.outcomes:
        colour = style.COLOURS[outcome.method.name]
        if outcome.ancestral:
            _line(axis, outcome.ancestral, colour, "o-", f"{outcome.method.title}, ancestral")
            _line(axis, outcome.ode, colour, "o--", f"{outcome.method.title}, probability-flow ODE", alpha=0.6)
        else:
            _line(axis, outcome.ode, colour, "o-", f"{outcome.method.title}, {outcome.method.flow.solver}")
    axis.axhline(comparison.floor, color=style.INK, linewidth=1, linestyle="--", label="two sets of data")
    axis.axhline(comparison.common_distance, color=style.SOFT, linewidth=1, linestyle=":", label="common distance")
    style.chart(axis, "Samples: distance to held-out data", "evaluations of the network a sample", "sliced Wasserstein-2")
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain(axis.xaxis)
    plain(axis.yaxis)
    style.legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _line(axis: Any, curve: Sequence[Quality], colour: str, marks: str, label: str, alpha: float = 1.0) -> None:
    finite = [point for point in curve if point.distance < float("inf")]
    x, y = [point.evaluations for point in finite], [point.distance for point in finite]
    axis.plot(x, y, marks, color=colour, markersize=4, linewidth=2, alpha=alpha, label=label)


def plain(axis: Any) -> None:
    """0.1, 0.2, 0.5, 1 on a logarithmic axis instead of powers; nothing between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _points(axis: Any, x: Tensor, colour: str, title: str, extent: float) -> None:
    axis.scatter(*x.numpy().T, s=2.2, color=colour, alpha=0.55, linewidths=0)
    style.plane(axis, title, extent)
