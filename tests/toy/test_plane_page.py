"""The demo's folder and page: self-contained, escaped, whole; only a demo is replaced."""

import json
import re

import pytest
import torch

from pi0fm.cli.flow_demo import figures
from pi0fm.toy import methods, page
from pi0fm.toy.comparison import Comparison, Outcome
from pi0fm.toy.config import DemoConfig
from pi0fm.toy.datasets import dataset_named
from pi0fm.toy.network import PlaneField
from pi0fm.toy.quality import Quality
from pi0fm.toy.training import Mark, Trained
from pi0fm_client.errors import OutputError

EVIL = "<script>alert('x')</script>"
PICTURES = {name: b"\x89PNG " + name.encode() for name in page.PICTURES}


def outcome(method, curve, distances, ancestral=()):
    trained = Trained(PlaneField(torch.Generator().manual_seed(0)), tuple(Mark(*mark) for mark in curve))
    return Outcome(
        method, trained, curve[-1][2], torch.zeros(3, 2), tuple(Quality(*q) for q in distances), tuple(Quality(*q) for q in ancestral)
    )


def comparison(names=("flow", "cnf", "diffusion")):
    config = DemoConfig()
    ours, cnf, diffusion = config.methods()
    each = {
        "flow": outcome(ours, [(0.5, 50, 2.0), (1.0, 100, 1.2), (10.0, 1000, 1.0)], [(4, 0.4), (8, 0.1), (16, 0.05)]),
        "cnf": outcome(cnf, [(1.0, 2, 3.0), (9.0, 18, 1.3), (12.0, 24, 1.25)], [(4, float("inf")), (8, 0.3), (16, 0.06)]),
        "diffusion": outcome(diffusion, [(1.0, 90, 1.4), (10.0, 900, 1.1)], [(4, 1.0), (8, 0.9)], [(10, 0.5), (1000, 0.1)]),
    }
    return Comparison(dataset_named("moons"), tuple(each[name] for name in names), 0.9, 0.03)


def test_the_comparison_counts_to_what_all_reach():
    found = comparison()
    assert found.common_nll == 1.25
    assert found.train_seconds == {"flow_matching": 1.0, "cnf": 12.0, "diffusion": 10.0}
    assert found.speedup == 12.0
    assert found.seconds_to_near == {"flow_matching": 10.0, "cnf": None, "diffusion": None}
    assert found.common_distance == pytest.approx(0.11)
    assert found.evaluations == {"flow_matching": 8, "cnf": 16, "diffusion": 1000}
    assert found.probability_flow_evaluations is None
    assert comparison(["flow"]).speedup is None
    assert comparison(["cnf"]).train_seconds == {"cnf": 12.0}


def test_the_page_loads_nothing_runs_nothing_and_shows_every_picture(tmp_path):
    background = page.Background(f"pi0fm {EVIL}", {"machine": {EVIL: EVIL}})
    path = page.write(tmp_path / "demo", figures(comparison(), DemoConfig()), PICTURES, background)
    text = path.read_text()
    assert "<script" not in text
    assert "<link" not in text
    assert "url(" not in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == len(page.PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "12 &times;" in text
    assert "not reached" in text
    written = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert written["qualities"]["cnf"][0] == {"evaluations": 4, "distance": None}
    assert {file.name for file in path.parent.iterdir()} == set(page.OWN_FILES)


@pytest.mark.parametrize("name", ["flow", "cnf", "diffusion"])
def test_a_single_method_has_a_page_too(name):
    assert page.render(figures(comparison([name]), DemoConfig()), PICTURES, page.Background())


def test_only_a_demo_is_replaced(tmp_path):
    folder = tmp_path / "demo"
    found = figures(comparison(["flow"]), DemoConfig())
    page.write(folder, found, PICTURES, page.Background())
    page.write(folder, found, {**PICTURES, "field": b"new"}, page.Background())
    assert (folder / "field.png").read_bytes() == b"new"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt; type --output_dir ANOTHER"):
        page.refuse_other_folder(folder)
    with pytest.raises(OutputError, match="found a file"):
        page.refuse_other_folder(folder / "notes.txt")
    page.refuse_other_folder(tmp_path / "new")


def test_methods_keep_their_names():
    assert [method.name for method in DemoConfig().methods()] == [methods.FLOW_MATCHING, methods.CNF, methods.DIFFUSION]
