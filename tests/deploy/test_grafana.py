"""Tests that the dashboard queries the server's metrics by their labels, and all of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pi0fm.serve.metrics import Metrics
from pi0fm_client.wire import COUNTS

SELECTED = re.compile(r"(pi0fm_\w+?)(?:\{([^}]*)\})?(?=[^\w{]|$)")
CONDITION = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
REFUSED = "key, origin, full, unavailable, observation, deadline, newer, busy, stuck, stopping, internal"
SCRAPED = {"instance", "job", "le"}  # labels that are not ours: of the scrape, and of a histogram's buckets


@pytest.fixture(scope="module")
def dashboard(repository: Path) -> dict[str, Any]:
    return dict(json.loads((repository / "deploy/grafana/pi0fm.json").read_text()))


@pytest.fixture(scope="module")
def series() -> dict[str, dict[str, set[str]]]:
    """What a server shows once everything happened: sample name -> label -> values."""
    metrics = Metrics()
    for stage in ("read", "wait", "infer", "total"):
        metrics.stage.labels(stage)
    for what in COUNTS:
        metrics.robots.labels(what)
    for why in REFUSED.split(", "):
        metrics.refused.labels(why)
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_every_expression_selects_series_that_exist(dashboard: dict[str, Any], series: dict[str, dict[str, set[str]]]) -> None:
    for expression in expressions(dashboard):
        selected = SELECTED.findall(expression)
        assert selected and expression.count("(") == expression.count(")")
        for name, conditions in selected:
            assert name in series, expression
            for label, operator, value in CONDITION.findall(conditions):
                assert label in series[name].keys() | SCRAPED, expression
                if label not in SCRAPED:
                    for word in value.split("|") if "~" in operator else [value]:
                        assert word in series[name][label], f"{word} in {expression}"
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            known = {label for name, _ in selected for label in series[name]} | SCRAPED
            assert set(labels.split(", ")) <= known, expression


def test_every_metric_is_on_a_panel(dashboard: dict[str, Any], series: dict[str, dict[str, set[str]]]) -> None:
    shown = {name for expression in expressions(dashboard) for name, _ in SELECTED.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}


def test_panels_have_room_and_the_source_is_chosen_by_the_user(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel} == {"${datasource}"}
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}
