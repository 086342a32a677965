"""Pictures of one trained flow: its densities over time, its trajectories, its field.

Owns: what is computed for them and how it is drawn. Does not know: the comparison, files.

    density.png       p_t on a grid of points at six times: every point is carried back to noise, exactly as an NLL is
    trajectories.png  points in the plane from noise to data; one coordinate against time above the density of all points
    field.png         streamlines of v_t above p_t at three times
Shape letters: B points, G points along an edge of a grid.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pi0fm.flow import likelihood
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import integrate
from pi0fm.toy import quality, style
from pi0fm.toy.network import PlaneField

GRID, COARSE_GRID, TIME_STEPS = 80, 60, 30
LINES, RIVER_POINTS = 260, 8000


@final
@dataclass(frozen=True)
class Subject:
    """Whose pictures these are. extent: half the width of the window on the data."""

    title: str
    flow: FlowMatching
    network: PlaneField
    extent: float
    seed: int


@torch.no_grad()
def over_time(subject: Subject) -> bytes:
    """p_t at six times."""
    figure, axes = style.panels(6, height=2.15)
    for axis, wanted in zip(axes, (0.0, 0.3, 0.6, 0.8, 0.9, 1.0), strict=True):
        t, extent, density = density_at(subject, wanted, GRID)
        _draw_density(axis, density, extent)
        window = "" if extent == subject.extent else f", window ±{extent:.1f}"
        style.plane(axis, f"t = {t:.2f}{window}", extent)
    return style.png(figure)


@torch.no_grad()
def trajectories(subject: Subject) -> bytes:
    """From noise to data in the plane, and one coordinate against time."""
    from matplotlib.collections import LineCollection

    times, states = paths(subject, RIVER_POINTS)
    figure, (plane, river) = style.panels(2, height=4.7, width_ratios=[1, 1.25])
    few = states[:, :LINES].numpy()
    segments = [few[k : k + 2].transpose(1, 0, 2) for k in range(len(times) - 1)]
    colours = style.two_colours("#efd9b8", style.DATA_COLOUR)
    for k, segment in enumerate(segments):
        plane.add_collection(LineCollection(list(segment), colors=[colours(times[k])], linewidths=0.7, alpha=0.75))
    plane.scatter(*few[0].T, s=7, color=style.NOISE_COLOUR, label="noise, t = 0", zorder=3, linewidths=0)
    plane.scatter(*few[-1].T, s=7, color=style.DATA_COLOUR, label="data, t = 1", zorder=4, linewidths=0)
    style.plane(plane, "each point follows dx/dt = v(x, t)", max(subject.extent, 3.2 * subject.flow.path.prior_scale))
    style.legend(plane, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.09), handletextpad=0.1)
    _draw_river(river, times, states[:, :, 0])
    return style.png(figure)


@torch.no_grad()
def field(subject: Subject) -> bytes:
    """Streamlines of the velocity above the density."""
    figure, axes = style.panels(3, height=3.75)
    velocity = subject.flow.velocity_field(subject.network)
    for axis, wanted in zip(axes, (0.2, 0.6, 0.9), strict=True):
        t, extent, density = density_at(subject, wanted, COARSE_GRID)
        _draw_density(axis, density, extent, vmax_factor=1.6)
        lines = torch.linspace(-extent, extent, 25)
        points = square(lines)
        v = velocity(points, torch.full((len(points),), t)).reshape(25, 25, 2)
        speed = v.norm(dim=2)
        width = (0.3 + 0.9 * speed / speed.max()).numpy()
        axis.streamplot(
            lines.numpy(),
            lines.numpy(),
            v[..., 0].numpy(),
            v[..., 1].numpy(),
            color=style.STREAM,
            linewidth=width,
            density=1.0,
            arrowsize=0.7,
        )
        style.plane(axis, f"t = {t:.2f}, fastest {float(speed.max()):.1f} a unit of time", extent)
    return style.png(figure)


def density_at(subject: Subject, wanted: float, size: int) -> tuple[float, float, Float[Tensor, "G G"]]:
    """(t nearest to `wanted` on the fine grid, half the window, p_t on a size x size grid, first axis y)."""
    flow = subject.flow
    times = quality.grid(flow, TIME_STEPS)
    last = min(range(len(times)), key=lambda k: abs(times[k] - wanted))
    t = times[last]
    extent = max(subject.extent, 2.6 * float(flow.path.sigma(torch.tensor(t))))
    points = square(torch.linspace(-extent, extent, size))
    if last == 0:
        found = likelihood.gaussian_log_prob(points, flow.path.prior_scale)
    else:
        options = likelihood.DensityOptions(times=times[: last + 1], solver="midpoint")
        found = likelihood.log_prob(flow, subject.network, points, options=options)
    return t, extent, found.exp().reshape(size, size)


def paths(subject: Subject, num: int) -> tuple[list[float], Float[Tensor, "T B 2"]]:
    """Times, and the states of `num` points at each of them, by the flow's own solver."""
    flow = subject.flow
    times = quality.grid(flow, 2 * TIME_STEPS)
    noise = torch.randn(num, 2, generator=torch.Generator().manual_seed(subject.seed))
    states = [flow.path.prior_scale * noise]
    velocity = flow.velocity_field(subject.network)
    for pair in itertools.pairwise(times):
        states.append(integrate(velocity, states[-1], list(pair), flow.solver, flow.tolerance))
    return times, torch.stack(states)


def _draw_river(axis: Any, times: Sequence[float], x: Tensor) -> None:
    """The first coordinate of every point against time: density as colour, a few points as lines."""
    bins = torch.linspace(*_span(x), 161)
    columns = torch.stack([torch.histc(row, 160, float(bins[0]), float(bins[-1])) for row in x])
    # A blur over a few bins and instants: counts of a few thousand points are rough.
    columns = _blurred(columns)
    # Every instant by its own largest value: else the sharp end would hide the rest.
    columns = columns / columns.amax(1, keepdim=True)
    axis.pcolormesh(list(times), ((bins[1:] + bins[:-1]) / 2).numpy(), columns.T.numpy(), cmap=style.density_map(), shading="gouraud")
    axis.plot(list(times), x[:, :28].numpy(), color=style.INK, linewidth=0.6, alpha=0.7)
    style.chart(axis, "one coordinate: noise flows into data", "time t (0 noise, 1 data)", "first coordinate of x")
    axis.grid(False)
    axis.set(xlim=(times[0], times[-1]), ylim=(float(bins[0]), float(bins[-1])))


def _blurred(counts: Tensor) -> Tensor:
    """Averages with Gaussian weights along both axes; the ends repeat."""
    taps = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * 1.6**2))
    taps = taps / taps.sum()
    padded = F.pad(counts[None, None], (4, 4, 4, 4), mode="replicate")
    smooth: Tensor = F.conv2d(F.conv2d(padded, taps.reshape(1, 1, 1, 9)), taps.reshape(1, 1, 9, 1))
    return smooth[0, 0]


def _span(x: Tensor) -> tuple[float, float]:
    """The window of all points but a few far ones."""
    reach = float(x.abs().flatten().kthvalue(int(0.999 * x.numel())).values)
    return -reach, reach


def square(edge: Tensor) -> Tensor:
    """All points [G * G, 2] of a square grid, y outermost."""
    y, x = torch.meshgrid(edge, edge, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def _draw_density(axis: Any, density: Tensor, extent: float, vmax_factor: float = 1.0) -> None:
    draw_density(axis, density, extent, vmax_factor * float(density.max()))


def draw_density(axis: Any, density: Float[Tensor, "G G"], extent: float, largest: float) -> None:
    """A density as colour, on a scale from 0 to `largest`; its root, so that thin parts show."""
    from matplotlib.colors import PowerNorm

    window = (-extent, extent, -extent, extent)
    axis.imshow(
        density.numpy(), origin="lower", extent=window, cmap=style.density_map(), norm=PowerNorm(0.6, 0, largest), interpolation="bilinear"
    )
