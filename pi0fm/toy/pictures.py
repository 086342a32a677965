"""Pictures of the trained flows and of each method's cost.

Owns: their computation and drawing. Does not know: how the figures of the comparison were measured; files.

    over_time     p_t on a grid of points at six times: every point is integrated back to noise, as for an NLL
    trajectories  points in the plane from noise to data; one coordinate against time above the density of all points
    field         streamlines of v_t above p_t at three times
    learned       density and samples of each method next to those of the data
    comparison    held-out NLL against seconds of training; distance of samples to data against evaluations
Shape letters: G points along an edge of a grid, T times.
"""

import itertools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pi0fm import pages
from pi0fm.flow.density import DensityOptions, gaussian_log_prob, log_prob
from pi0fm.flow.solver import integrate
from pi0fm.toy.comparison import Comparison, Outcome, grid
from pi0fm.toy.methods import CNF, DIFFUSION, FLOW_MATCHING

GRID, STREAM_GRID, TIME_STEPS = 64, 25, 30
POINTS, TRAJECTORIES, RIVER_LINES = 8000, 260, 28
COLOURS = {FLOW_MATCHING: "#0f766e", CNF: "#c8862b", DIFFUSION: "#5b5fc7"}
NOISE_COLOUR, DATA_COLOUR, STREAM = "#c8862b", "#0f766e", "#4a4f5a"
DENSITY_COLOURS = ("#ffffff", "#dff2ef", "#9fd4cd", "#3f9f94", "#0f766e", "#083f43")
LEGEND_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}


@torch.no_grad()
def over_time(comparison: Comparison) -> bytes:
    """Draw p_t of the first method at six times."""
    figure, axes = pages.panels(6, height=2.15)
    for axis, wanted in zip(axes, (0.0, 0.3, 0.6, 0.8, 0.9, 1.0), strict=True):
        t, extent, density = _density(comparison.outcomes[0], wanted, comparison.dataset.extent)
        _draw_density(axis, density, extent, float(density.max()))
        window = "" if extent == comparison.dataset.extent else f", window ±{extent:.1f}"
        _plane(axis, f"t = {t:.2f}{window}", extent)
    return pages.png(figure)


@torch.no_grad()
def trajectories(comparison: Comparison) -> bytes:
    """Draw points of the first method from noise to data in the plane, and one coordinate of many against time."""
    from matplotlib.collections import LineCollection

    flow = comparison.outcomes[0].method.flow
    times, states = _paths(comparison)
    figure, (plane, river) = pages.panels(2, height=4.7, width_ratios=[1, 1.25])
    few = states[:, :TRAJECTORIES].numpy()
    segments = np.stack([few[:-1], few[1:]], axis=2).reshape(-1, 2, 2)
    colours = _colours("#efd9b8", DATA_COLOUR)(np.repeat(times[:-1], TRAJECTORIES))
    plane.add_collection(LineCollection(list(segments), colors=colours, linewidths=0.7, alpha=0.75))
    plane.scatter(*few[0].T, s=7, color=NOISE_COLOUR, label="noise, t = 0", zorder=3, linewidths=0)
    plane.scatter(*few[-1].T, s=7, color=DATA_COLOUR, label="data, t = 1", zorder=4, linewidths=0)
    _plane(plane, "each point follows dx/dt = v(x, t)", max(comparison.dataset.extent, 3.2 * flow.path.prior_scale))
    pages.legend(plane, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.09), handletextpad=0.1)

    x = states[:, :, 0]
    reach = float(x.abs().quantile(0.999))
    edge = torch.linspace(-reach, reach, 120)
    # a kernel estimate of the density at each time, divided by its maximum: else the sharp end would hide the rest
    columns = torch.stack([torch.exp(-(((edge[:, None] - row) / (0.025 * reach)) ** 2) / 2).mean(1) for row in x])
    columns = (columns / columns.amax(1, keepdim=True)).T
    river.pcolormesh(times, edge.numpy(), columns.numpy(), cmap=_colours(*DENSITY_COLOURS), shading="gouraud")
    river.plot(times, x[:, :RIVER_LINES].numpy(), color=pages.INK, linewidth=0.6, alpha=0.7)
    pages.chart(river, "one coordinate: noise flows into data", "time t (0 noise, 1 data)", "first coordinate of x")
    river.grid(False)
    river.set(xlim=(times[0], times[-1]), ylim=(-reach, reach))
    return pages.png(figure)


@torch.no_grad()
def field(comparison: Comparison) -> bytes:
    """Draw streamlines of the first method's velocity above the density at three times."""
    figure, axes = pages.panels(3, height=3.75)
    method, network = comparison.outcomes[0].method, comparison.outcomes[0].network
    velocity = method.flow.velocity_field(network)
    for axis, wanted in zip(axes, (0.2, 0.6, 0.9), strict=True):
        t, extent, density = _density(comparison.outcomes[0], wanted, comparison.dataset.extent)
        _draw_density(axis, density, extent, 1.6 * float(density.max()))
        edge = np.linspace(-extent, extent, STREAM_GRID)
        v = velocity(_square(extent, STREAM_GRID), torch.full((STREAM_GRID**2,), t)).reshape(STREAM_GRID, STREAM_GRID, 2)
        speed = v.norm(dim=2)
        width = (0.3 + 0.9 * speed / speed.max()).numpy()
        axis.streamplot(edge, edge, *v.permute(2, 0, 1).numpy(), color=STREAM, linewidth=width, arrowsize=0.7)
        _plane(axis, f"t = {t:.2f}, fastest {float(speed.max()):.1f} per unit of time", extent)
    return pages.png(figure)


@torch.no_grad()
def densities(comparison: Comparison) -> bytes:
    """Draw density above samples: the data first, then each method."""
    outcomes, dataset = comparison.outcomes, comparison.dataset
    columns = 1 + len(outcomes)
    figure, axes = pages.panels(columns, 2, width=2.6 * columns, height=5.6)
    truth = dataset.log_prob(_square(dataset.extent, GRID)).exp().reshape(GRID, GRID)
    sample = dataset.sample(len(outcomes[0].samples), torch.Generator().manual_seed(comparison.seed))
    columns_drawn = [(truth, dataset.extent, f"data: entropy {comparison.entropy:.3f}", sample, pages.INK, "samples of the data")]
    for outcome in outcomes:
        _, extent, density = _density(outcome, 1.0, dataset.extent)
        title = f"{outcome.ancestral[-1].evaluations} ancestral steps" if outcome.ancestral else "samples by the ODE"
        name = f"{outcome.method.title}: NLL {outcome.nll:.3f}"
        columns_drawn.append((density, extent, name, outcome.samples, COLOURS[outcome.method.name], title))
    for above, below, (density, extent, name, points, colour, title) in zip(axes[:columns], axes[columns:], columns_drawn, strict=True):
        _draw_density(above, density, extent, float(truth.max()))
        _plane(above, name, dataset.extent)
        below.scatter(*points.numpy().T, s=2.2, color=colour, alpha=0.55, linewidths=0)
        _plane(below, title, dataset.extent)
    return pages.png(figure)


def costs(comparison: Comparison) -> bytes:
    """Draw NLL against seconds of training, and distance against evaluations."""
    figure, (left, right) = pages.panels(2, height=4.9)
    found = comparison.figures()
    for outcome in comparison.outcomes:
        title, colour = outcome.method.title, COLOURS[outcome.method.name]
        seconds, _, nll = zip(*outcome.curve, strict=True)
        left.plot(seconds, nll, "o-", color=colour, markersize=4, linewidth=2, label=title)
        curves = [(outcome.ode, "o-", outcome.method.flow.solver)]
        if outcome.ancestral:
            curves = [(outcome.ode, "o--", "probability-flow ODE"), (outcome.ancestral, "o-", "ancestral")]
        for curve, marks, sampler in curves:
            right.plot(*zip(*curve, strict=True), marks, color=colour, markersize=4, linewidth=2, label=f"{title}, {sampler}")
    left.axhline(comparison.entropy, color=pages.INK, linewidth=1, linestyle="--", label=f"entropy of the data, {comparison.entropy:.3f}")
    if len(comparison.outcomes) > 1:
        left.axhline(found["common_nll"], color=pages.SOFT, linewidth=1, linestyle=":", label=f"common NLL, {found['common_nll']:.3f}")
    # early marks may be far off: the window holds the last marks, and others up to 1.5 nats above the lowest
    finite = [[mark.nll for mark in outcome.curve if math.isfinite(mark.nll)] for outcome in comparison.outcomes]
    lowest = min(comparison.entropy, *itertools.chain(*finite))
    highest = max([min(max(itertools.chain([lowest], *finite)), lowest + 1.5), *(curve[-1] for curve in finite if curve)])
    left.set_ylim(lowest - 0.06 * (highest - lowest), highest + 0.06 * (highest - lowest))
    pages.chart(left, "Held-out NLL while training", "processor seconds of training", "nats")
    right.axhline(comparison.floor, color=pages.INK, linewidth=1, linestyle="--", label="two sets of data")
    right.axhline(found["common_distance"], color=pages.SOFT, linewidth=1, linestyle=":", label="common distance")
    pages.chart(right, "Samples: distance to held-out data", "evaluations of the network per sample", "sliced Wasserstein-2")
    left.set_xscale("log")
    right.set(xscale="log", yscale="log")
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        pages.plain_log(axis)
    for axis in (left, right):
        pages.legend(axis, **LEGEND_BELOW)
    return pages.png(figure)


PICTURES = {"over_time": over_time, "trajectories": trajectories, "field": field, "learned": densities, "comparison": costs}


def _density(outcome: Outcome, wanted: float, extent: float) -> tuple[float, float, Float[Tensor, "G G"]]:
    """Return (t nearest to `wanted` on the fine grid, half the window, p_t on a grid whose first axis is y)."""
    flow = outcome.method.flow
    times = grid(flow, TIME_STEPS)
    last = min(range(len(times)), key=lambda k: abs(times[k] - wanted))
    extent = max(extent, 2.6 * float(flow.path.sigma(torch.tensor(times[last]))))
    points = _square(extent, GRID)
    if last == 0:
        found = gaussian_log_prob(points, flow.path.prior_scale)
    else:
        options = DensityOptions(times=times[: last + 1], solver="midpoint")
        found = log_prob(flow, outcome.network, points, options=options)
    return times[last], extent, found.exp().reshape(GRID, GRID)


def _paths(comparison: Comparison) -> tuple[list[float], Float[Tensor, "T B 2"]]:
    """Return times, and the states of POINTS points at each of them, by the flow's solver."""
    flow, network = comparison.outcomes[0].method.flow, comparison.outcomes[0].network
    times = grid(flow, 2 * TIME_STEPS)
    states = [flow.path.prior_scale * torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(comparison.seed))]
    velocity = flow.velocity_field(network)
    for pair in itertools.pairwise(times):
        states.append(integrate(velocity, states[-1], list(pair), flow.solver, flow.tolerance))
    return times, torch.stack(states)


def _square(extent: float, size: int) -> Float[Tensor, "G2 2"]:
    """Return all points of a square grid, y outermost."""
    edge = torch.linspace(-extent, extent, size)
    return torch.cartesian_prod(edge, edge).flip(1)


def _draw_density(axis: Any, density: Float[Tensor, "G G"], extent: float, largest: float) -> None:
    """Draw a density as colour, on a power scale from 0 to `largest`, which shows thin parts."""
    from matplotlib.colors import PowerNorm

    window, norm = (-extent, extent, -extent, extent), PowerNorm(0.6, 0, largest)
    axis.imshow(density.numpy(), origin="lower", extent=window, cmap=_colours(*DENSITY_COLOURS), norm=norm, interpolation="bilinear")


def _plane(axis: Any, title: str, extent: float) -> None:
    """Show a square window [-extent, extent]^2 without ticks."""
    axis.set_title(title, fontsize=10, color=pages.INK, pad=6)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_color(pages.LINE)


def _colours(*colours: str) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("through", list(colours))
