"""`pi0fm flow demo`: flow matching, CNF and diffusion on data in the plane.

Owns: the options, the order compare -> draw -> write, the table, the folder. Does not know: how a method trains, how a picture is drawn.

    output_dir/
      report.html       one file that can be sent by mail: pictures inside, no script, nothing loaded from elsewhere
      demo.json         every figure of the page; removed first and written last, so that a folder with it is complete
      over_time.png trajectories.png field.png learned.png comparison.png
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pi0fm import files, machine, options, pages, progress
from pi0fm.flow.config import FlowConfig
from pi0fm.options import nearest, option
from pi0fm.toy.names import DATASETS, METHODS, PICTURES
from pi0fm_client.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from pi0fm.toy.methods import Method

HELP = "compare flow matching, CNF and diffusion on data in the plane, with figures"
ALIASES: dict[str, str] = {}
SECONDS = 15.0
FLOW_ONLY = ("path", "time_density", "prediction", "loss_weighting")
VERSIONS = ("python", "pi0fm", "torch", "numpy")
LAST_LINE = ("dataset", "nll", "entropy", "train_seconds", "evaluations", "probability_flow_evaluations", "common_nll", "speedup")
PAGE, RESULT = "report.html", "demo.json"
FILES = (RESULT, PAGE, *(f"{name}.png" for name in PICTURES))


@dataclass(frozen=True)
class DemoConfig:
    """Options of `pi0fm flow demo`. Raises ConfigError for an unknown value, a number out of range, an unused option."""

    dataset: str = option("moons", f"data in the plane: {', '.join(DATASETS)}")
    method: str = option("all", f"what to train, or all to compare: all, {', '.join(METHODS)}")
    path: str | None = option(None, "flow matching's path: cond_ot (when left out), cosine, vp, ve")
    time_density: str | None = option(None, "flow matching's training times: uniform (when left out), pi0, logit_normal, likelihood")
    prediction: str | None = option(None, "output of flow matching's network: velocity (when left out), noise, data, score")
    loss_weighting: str | None = option(None, "flow matching's weights: none (when left out), likelihood")
    solver: str = option("midpoint", "ODE solver for sampling, for every method: euler, midpoint, heun, rk4, dopri5")
    seconds: float | None = option(None, f"processor seconds of training for each method, {SECONDS:g} when left out")
    steps: int | None = option(None, "training steps of each method instead of seconds: the same result in every run")
    seed: int = option(0, "seed of weights, data and noise, at least 0")
    output_dir: Path = option(Path("outputs/flow-demo"), "folder of the page and its pictures; an earlier demo there is replaced")

    def __post_init__(self) -> None:
        from pi0fm.flow.solver import check_solver  # torch: seconds, which --help need not wait for

        check_solver(self.solver)
        for name, value, known in (("dataset", self.dataset, DATASETS), ("method", self.method, ("all", *METHODS))):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}: {nearest(value, known)}")
        idle = [name for name in FLOW_ONLY if getattr(self, name) is not None]
        if self.method in ("cnf", "diffusion") and idle:
            raise ConfigError(f"--{idle[0]} is flow matching's, found it with --method {self.method}; leave it out, or type --method flow")
        if self.seconds is not None and self.steps is not None:
            raise ConfigError(f"seconds or steps, not both: found {self.seconds:g} and {self.steps}; leave --seconds or --steps out")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds must be above 0, found {self.seconds:g}; type --seconds {SECONDS:g}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps of training must be at least 1, found {self.steps}; type --steps 2000")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, found {self.seed}; type --seed 0")
        self.methods()  # refuses unknown values of the flow's options

    def methods(self) -> "tuple[Method, ...]":
        """Return the methods to train, flow matching first."""
        from pi0fm.toy import methods

        makers = dict(zip(METHODS, (methods.flow_matching, methods.cnf, methods.diffusion), strict=True))
        words = {"time_density": "uniform"} | {name: value for name in FLOW_ONLY if (value := getattr(self, name)) is not None}
        flow = FlowConfig(solver=self.solver, **words)
        return tuple(make(flow) for name, make in makers.items() if self.method in ("all", name))


Options = DemoConfig


def run(config: DemoConfig) -> dict[str, Any]:
    """Train, compare, draw and write; return the figures of LAST_LINE."""
    import torch

    from pi0fm.toy import datasets
    from pi0fm.toy import pictures as drawing
    from pi0fm.toy.comparison import compare

    refuse_other_folder(config.output_dir)
    seconds = SECONDS if config.seconds is None and config.steps is None else config.seconds
    pictures = {}
    torch.set_num_threads(1)  # so that processor seconds are seconds, and all methods have the same resources
    found = compare(datasets.DATASETS[config.dataset], config.methods(), config.seed, seconds=seconds, steps=config.steps)
    with progress.step("drawing", len(PICTURES)) as bar:
        for name, draw in drawing.PICTURES.items():
            pictures[name] = draw(found)
            bar.advance(note=name)
    versions = machine.describe_versions()
    facts = {
        "machine": machine.describe_machine(),
        "versions": {name: versions[name] for name in VERSIONS},
        "options": {name: str(value) for name, value in options.encode(config).items() if value is not None},
    }
    figures = found.figures()
    path = write(config.output_dir, figures, pictures, {"command": machine.command_line(), "facts": facts})
    _show(figures)
    progress.say(f"report: {path}")
    return {name: figures[name] for name in LAST_LINE} | {"report": str(path)}


def refuse_other_folder(output_dir: Path) -> None:
    """Raise OutputError when `output_dir` is a file, or holds anything else than an earlier demo."""
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"output_dir must be a folder, found a file at {output_dir}; type --output_dir ANOTHER")
    others = sorted(path.name for path in output_dir.iterdir() if path.name not in FILES) if output_dir.exists() else []
    if others:
        raise OutputError(f"only an earlier demo is ever replaced, and {output_dir} holds {others[0]}; type --output_dir ANOTHER")


def write(output_dir: Path, figures: Mapping[str, Any], pictures: Mapping[str, bytes], background: Mapping[str, Any]) -> Path:
    """Write page, pictures and demo.json, replacing an earlier demo; return the page's path.

    background: `command`, and `facts`, tables by heading.
    """
    refuse_other_folder(output_dir)
    text = pages.render("toy/page.html.j2", pictures, figures=figures, background=background, seconds=_seconds, factor=_factor)
    with files.write_faults(output_dir):
        for name in FILES:
            (output_dir / name).unlink(missing_ok=True)
        for name, picture in pictures.items():
            files.write_bytes(output_dir / f"{name}.png", picture)
        files.write_text(output_dir / PAGE, text)
        files.write_json(output_dir / RESULT, {**figures, **background})
    return output_dir / PAGE


def _seconds(value: float | None) -> str:
    """Format `0.41 s`, `12.3 s`, or `not reached`."""
    return "not reached" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def _factor(value: float) -> str:
    """Format `3.4` below ten, `27` from ten."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _show(figures: Mapping[str, Any]) -> None:
    """Print the table of methods to standard error."""
    common, near = figures["common_nll"], figures["near_nll"]
    table = Table("method", box=None, padding=(0, 2), header_style="")
    for heading in ("NLL, nats", "steps", f"to {common:.3f} nats", f"to {near:.3f} nats", "evaluations a sample"):
        table.add_column(heading, justify="right")
    for method in figures["methods"]:
        name = method["name"]
        reached = [_seconds(figures[key][name]) for key in ("train_seconds", "seconds_to_near")]
        steps = f"{figures['trained_steps'][name]:,}"
        table.add_row(method["title"], f"{figures['nll'][name]:.3f}", steps, *reached, str(figures["evaluations"][name]))
    console = Console(stderr=True, highlight=False, width=max(100, Console(stderr=True).width))
    console.print()
    console.print(table)
    line = f"entropy of the data {figures['entropy']:.3f} nats"
    if figures["speedup"] is not None:
        line += f"; flow matching trains {_factor(figures['speedup'])} times faster than the CNF to {common:.3f} nats"
    progress.say(line)
