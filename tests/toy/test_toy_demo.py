"""Tests of the demo: options refused by name, figures at a common loss, complete self-contained page."""

import errno
import io
import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from pi0fm import options
from pi0fm.cli import flow_demo
from pi0fm.cli.flow_demo import DemoConfig
from pi0fm.toy import names as words
from pi0fm.toy.comparison import Comparison, DistanceAtEvaluations, Outcome
from pi0fm.toy.datasets import DATASETS
from pi0fm.toy.methods import PlaneField
from pi0fm.toy.pictures import PICTURES
from pi0fm.toy.training import NllAtMark
from pi0fm_client.errors import ConfigError, OutputError

EVIL = "<script>alert('x')</script>"
DRAWN = {name: b"\x89PNG " + name.encode() for name in PICTURES}
BACKGROUND = {"command": f"pi0fm {EVIL}", "facts": {"machine": {EVIL: EVIL}}}
FOUND = {  # curve, quality by the ODE, quality by ancestral sampling
    "flow": ([(0.5, 50, 2.0), (1.0, 100, 1.2), (10.0, 1000, 1.0)], [(4, 0.4), (8, 0.1), (16, 0.05)], []),
    "cnf": ([(1.0, 2, float("inf")), (9.0, 18, 1.3), (12.0, 24, 1.25)], [(4, float("inf")), (8, 0.3), (16, 0.06)], []),
    "diffusion": ([(1.0, 90, 1.4), (10.0, 900, 1.1)], [(4, 1.0), (8, 0.9)], [(10, 0.5), (1000, 0.1)]),
}


def comparison(names=tuple(FOUND)):
    outcomes = []
    for name, method in zip(FOUND, DemoConfig().methods(), strict=True):
        if name in names:
            curve, ode, ancestral = FOUND[name]
            marks, qualities = (
                tuple(NllAtMark(*mark) for mark in curve),
                [tuple(DistanceAtEvaluations(*point) for point in each) for each in (ode, ancestral)],
            )
            network = PlaneField(torch.Generator().manual_seed(0))
            outcomes.append(Outcome(method, network, marks, curve[-1][2], torch.zeros(3, 2), *qualities))
    return Comparison(DATASETS["moons"], 0, tuple(outcomes), 0.9, 0.03)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--dataset", "moon"], "unknown dataset 'moon': did you mean 'moons'"),
        (["--method", "flows"], "unknown method 'flows': did you mean 'flow'"),
        (["--path", "condot"], "path 'condot': did you mean 'cond_ot'"),
        (["--time_density", "unifrom"], "time_density 'unifrom': did you mean 'uniform'"),
        (["--prediction", "speed"], "unknown flow option prediction 'speed'"),
        (["--loss_weighting", "max"], "unknown flow option loss_weighting 'max'"),
        (["--solver", "rk5"], "solver 'rk5': did you mean 'rk4'"),
        (["--solver", "ancestral"], "solver 'ancestral'"),
        (["--method", "cnf", "--path", "cond_ot"], "--path is flow matching's, found it with --method cnf"),
        (["--method", "diffusion", "--prediction", "noise"], "--prediction is flow matching's"),
        (["--seconds", "0"], "seconds must be above 0, found 0"),
        (["--seconds", "nan"], "option seconds must be a finite number, found 'nan'"),
        (["--steps", "0"], "steps of training must be at least 1, found 0"),
        (["--steps", "9", "--seconds", "9"], "seconds or steps, not both"),
        (["--seed", "-1"], "seed must be at least 0, found -1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(words, line):
    with pytest.raises(ConfigError) as caught:
        options.parse(DemoConfig, words)
    assert line in str(caught.value)


def test_every_word_reaches_the_flow():
    words = ["--path=vp", "--prediction=data", "--time_density=logit_normal", "--loss_weighting=likelihood", "--solver=heun"]
    ours, cnf, diffusion = (method.flow for method in options.parse(DemoConfig, words).methods())
    assert (type(ours.path).__name__, type(ours.time_density).__name__) == ("VPDiffusion", "LogitNormal")
    assert (ours.prediction, ours.loss_weighting, ours.solver) == ("data", "likelihood", "heun")
    assert (type(cnf.path).__name__, cnf.prediction, cnf.solver) == ("CondOT", "velocity", "heun")
    assert (type(diffusion.path).__name__, diffusion.prediction, diffusion.solver) == ("VPDiffusion", "noise", "heun")
    assert [method.name for method in DemoConfig(method="cnf").methods()] == ["cnf"]


def test_the_figures_count_to_what_all_methods_reach():
    found = comparison().figures()
    assert found["common_nll"] == 1.25
    assert found["train_seconds"] == {"flow_matching": 1.0, "cnf": 12.0, "diffusion": 10.0}
    assert found["speedup"] == 12.0
    assert found["seconds_to_near"] == {"flow_matching": 10.0, "cnf": None, "diffusion": None}
    assert found["common_distance"] == pytest.approx(0.11)
    assert found["evaluations"] == {"flow_matching": 8, "cnf": 16, "diffusion": 1000}
    assert found["probability_flow_evaluations"] is None
    assert comparison(["flow"]).figures()["speedup"] is None


def test_the_costs_are_drawn_where_no_grid_followed_a_field():
    found = comparison()
    cnf = replace(found.outcomes[1], curve=(*found.outcomes[1].curve, NllAtMark(13.0, 26, float("inf"))))
    picture = Image.open(io.BytesIO(PICTURES["comparison"](replace(found, outcomes=(found.outcomes[0], cnf)))))
    assert picture.width > 1000
    assert len(picture.convert("RGB").getcolors(100_000)) > 20, "an empty picture has one colour"


def test_the_page_loads_nothing_runs_nothing_and_shows_every_picture(tmp_path):
    path = flow_demo.write(tmp_path / "demo", comparison().figures(), DRAWN, BACKGROUND)
    text = path.read_text()
    assert not re.search(r"<script|<link|url\(|@import|https?://", text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == len(set(sources)) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "12 &times;" in text and "not reached" in text
    written = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert written["qualities"]["cnf"][0] == {"evaluations": 4, "distance": None}
    assert written["facts"] == BACKGROUND["facts"]
    assert {file.name for file in path.parent.iterdir()} == set(flow_demo.FILES)


@pytest.mark.parametrize("name", FOUND)
def test_a_single_method_has_a_page_too(tmp_path, name):
    assert "held-out NLL" in flow_demo.write(tmp_path / "demo", comparison([name]).figures(), DRAWN, BACKGROUND).read_text()


def test_only_a_demo_is_replaced(tmp_path, monkeypatch):
    folder, found = tmp_path / "demo", comparison(["flow"]).figures()
    flow_demo.write(folder, found, DRAWN, BACKGROUND)
    flow_demo.write(folder, found, {**DRAWN, "field": b"new"}, BACKGROUND)
    assert (folder / "field.png").read_bytes() == b"new"
    with monkeypatch.context() as patched, pytest.raises(OutputError, match="must be writable"):
        patched.setattr("pi0fm.files.write_text", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
        flow_demo.write(folder, found, DRAWN, BACKGROUND)
    assert not (folder / "demo.json").exists(), "a folder with demo.json is one whole demo"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt; type --output_dir ANOTHER"):
        flow_demo.refuse_other_folder(folder)
    with pytest.raises(OutputError, match="found a file"):
        flow_demo.refuse_other_folder(folder / "notes.txt")
    flow_demo.refuse_other_folder(tmp_path / "new")


def test_words_of_the_options_are_those_of_data_and_pictures():
    assert (tuple(DATASETS), tuple(PICTURES)) == (words.DATASETS, words.PICTURES)
