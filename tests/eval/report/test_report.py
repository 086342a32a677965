"""Tests of the report: the page is self-contained, escaped, complete; the folder is never overwritten."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pi0fm.eval.report import curve, video
from pi0fm.eval.report import page as report
from pi0fm.eval.report.page import ReportContext
from pi0fm.eval.rollouts.episode import EpisodeResult
from pi0fm.eval.summary import summarize
from pi0fm_client.errors import ConfigError, OutputError

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def film():
    return video.encode([np.full((32, 32, 3), 20 * k, np.uint8) for k in range(4)], 20.0)


def written(folder, film, **background):
    results = [
        EpisodeResult("push", 1, "success", 31, 0.5, video=film),
        EpisodeResult("push", 2, "failure", 400, 2.5),
        EpisodeResult(EVIL, 1, "crash", 3, 0.1, error=f"ValueError: {EVIL}"),
        EpisodeResult(EVIL, 2, "success", 7, 0.1, video=film),
    ]
    rows = [report.keep_video(folder, result).row() for result in results]
    summary = summarize(results, ("push", EVIL))
    path = report.write(folder, summary, rows, ReportContext(**({"title": EVIL, "command": f"pi0fm eval {EVIL}"} | background)))
    return Page(path.read_text()), path


def test_the_page_loads_nothing_and_runs_nothing(tmp_path, film):
    losses = [(step, 1.0 / step) for step in range(1, 900)]
    page, path = written(tmp_path, film, losses=losses, facts={"machine": {EVIL: EVIL}})
    assert not page.all("script") and not page.all("link")
    text = path.read_text()
    assert not re.search(r"https?://|url\(|@import", text)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(not attributes.get(name, "data:").startswith(("http", "//", "/")) for name in ("src", "href"))
    assert EVIL in page.text, "the name is shown, as text"
    assert "<script" not in text


def test_videos_are_inside_and_on_disk(tmp_path, film):
    page, _ = written(tmp_path, film)
    sources = [attributes["src"] for attributes in page.all("video")]
    assert [base64.b64decode(source.removeprefix("data:video/mp4;base64,")) for source in sources] == [film, film]
    rows = json.loads((tmp_path / "episodes.json").read_text())
    assert [(tmp_path / row["video"]).read_bytes() for row in rows if row["video"]] == [film, film]
    assert {path.parent for path in tmp_path.rglob("*.mp4")} == {tmp_path / "videos"}


def test_a_video_beyond_the_bound_is_named_instead(tmp_path, film, monkeypatch):
    monkeypatch.setattr(report, "EMBEDDED_VIDEO_BYTES", len(film))
    page, _ = written(tmp_path, film)
    assert len(page.all("video")) == 1
    assert "too large for this page" in page.text


def test_the_table_shows_every_episode_and_crashes_loudly(tmp_path, film):
    page, _ = written(tmp_path, film)
    assert len(page.all("tr")) == 5
    assert "1 episode crashed" in page.text and "ValueError" in page.text
    assert [attributes["class"] for attributes in page.all("section")].count("card alarm") == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["success"] == {"push": 0.5, EVIL: 1.0} and summary["crashes"] == 1


def test_an_evaluation_is_never_overwritten(tmp_path, film):
    report.refuse_other_evaluation(tmp_path)
    report.refuse_other_evaluation(tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    report.refuse_other_evaluation(tmp_path)
    written(tmp_path, film)
    (tmp_path / "episodes.jsonl").write_text("{}")  # an evaluation that ended while it wrote its report goes on
    report.refuse_other_evaluation(tmp_path)
    (tmp_path / "episodes.jsonl").unlink()
    with pytest.raises(OutputError, match=r"never overwritten.*--output_dir ANOTHER"):
        report.refuse_other_evaluation(tmp_path)
    with pytest.raises(OutputError, match="found a file"):
        report.refuse_other_evaluation(tmp_path / "notes.txt")


def test_percent():
    assert [report.percent(rate) for rate in (1.0, 0.95, 14 / 15, 0.0)] == ["100 %", "95 %", "93.3 %", "0 %"]


def test_losses_skip_other_lines_and_a_torn_last_one_and_a_resumed_step_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 9.0}\n\n{"step": 2, "lr": 1}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert curve.read_losses(path) == [(1, 2.0), (2, 1.5)]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no metrics at"), ("{}\n", "no line with a step and a loss"), ('nonsense\n{"step": 1, "loss": 1}\n', "line 1 is 'nonsense'")],
)
def test_metrics_that_are_none_are_refused(tmp_path, content, words):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        curve.read_losses(path)


@pytest.mark.parametrize(
    "losses", [[(5, 0.3)], [(1, 0.5), (2, 0.5)], [(s, 2.0 ** -(s / 1000)) for s in range(0, 10000, 7)], [(1, 0.0), (9, 3.0)]]
)
def test_the_loss_is_a_picture_inside_the_page(tmp_path, film, losses):
    page, _ = written(tmp_path, film, losses=losses)
    (image,) = page.all("img")
    picture = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))))
    assert picture.width > 2 * picture.height
    assert len(image["src"]) < 100_000
    teal = [color for _, color in picture.convert("RGB").getcolors(100_000) if color[1] > 90 > color[0]]
    assert len(losses) == 1 or teal, "the running mean is drawn"


def test_without_losses_there_is_no_picture(tmp_path, film):
    page, _ = written(tmp_path, film)
    assert not page.all("img")
    assert "Training loss" not in page.text


def test_the_running_mean_is_of_the_window_that_exists_and_a_long_fall_has_a_logarithmic_axis(monkeypatch):
    drawn = []
    monkeypatch.setattr(curve.pages, "png", lambda figure: drawn.append(figure) or b"")
    curve.draw([(step, float(step)) for step in range(1, 81)])
    curve.draw([(1, 10.0), (2, 9.0)])
    (rising,), (flat,) = drawn[0].axes, drawn[1].axes
    assert (rising.get_yscale(), flat.get_yscale()) == ("log", "linear")
    logged, smooth = (line.get_ydata() for line in rising.lines)
    assert list(logged) == list(range(1, 81))
    assert list(smooth[[0, 1, 2, 40, 79]]) == pytest.approx([2.0, 2.5, 3.0, 41.0, 79.0])
