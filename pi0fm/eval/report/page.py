"""Files of an evaluation.

    output_dir/
      report.html     one self-contained file: no link, no script, videos embedded up to EMBEDDED_VIDEO_BYTES
      summary.json    rates, intervals, crashes
      episodes.json   a row for each episode; episodes.parquet the same for tables, without the scores of each call
      videos/         TASK-seed-N.mp4
      episodes.jsonl  the journal (eval/rollouts/journal) of an evaluation that has not ended

Owns: the folder and the page. Does not know: how episodes ran.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pi0fm import files, pages
from pi0fm.eval.report import curve
from pi0fm.eval.rollouts.episode import EpisodeResult
from pi0fm.eval.summary import Summary
from pi0fm_client.errors import OutputError

OWN_FILES = ("report.html", "summary.json", "episodes.json")
JOURNAL, ROWS = "episodes.jsonl", "episodes.parquet"
EMBEDDED_VIDEO_BYTES = 13 * 2**20  # a third more as base64: with 500 rows a page of less than 20 MB


@dataclass(frozen=True)
class ReportContext:
    """Facts on the page in addition to the figures.

    title: the policy. facts: tables by heading, such as {"machine": {"cores": "2"}}. losses: of the policy's training, if known.
    """

    title: str
    command: str = ""
    seconds: float = 0.0
    observation_change: str = "none"
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    losses: Sequence[tuple[int, float]] = ()


def refuse_other_evaluation(output_dir: Path) -> None:
    """Raise OutputError when `output_dir` is not a folder, or holds an evaluation that has ended."""
    if not (output_dir / JOURNAL).exists():
        refuse_ended(output_dir)


def refuse_ended(output_dir: Path, own_files: Sequence[str] = OWN_FILES) -> None:
    """Raise OutputError when `output_dir` is not a folder, or holds the files of an evaluation that has ended."""
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"output_dir must be a folder, found a file at {output_dir}; type --output_dir ANOTHER")
    held = [name for name in own_files if (output_dir / name).exists()]
    if held:
        raise OutputError(f"an evaluation is never overwritten, and {output_dir} holds {held[0]}; type --output_dir ANOTHER")


def keep_video(output_dir: Path, result: EpisodeResult) -> EpisodeResult:
    """Write the video of an episode, if any; return the result with the path, relative to `output_dir`, instead of the bytes."""
    if result.video is None:
        return result
    # the task may be any text, and must not lead out of the folder
    name = f"videos/{re.sub(r'[^A-Za-z0-9._-]+', '_', result.task).lstrip('.')}-seed-{result.seed}.mp4"
    files.write_bytes(output_dir / name, result.video)
    return replace(result, video=None, video_path=name)


def write(output_dir: Path, summary: Summary, rows: Sequence[Mapping[str, Any]], background: ReportContext) -> Path:
    """Write the two JSON files and the page; return the page's path. rows: of `EpisodeResult.row`, with their videos written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    page = render(output_dir, summary, rows, background)
    files.write_json(output_dir / "episodes.json", list(rows))
    with files.new_file(output_dir / ROWS) as file:
        pq.write_table(pa.Table.from_pylist([_plain(row) for row in rows]), file, write_page_checksum=True)
    about = {"seconds": round(background.seconds, 1), "observation_change": background.observation_change, "command": background.command}
    files.write_json(output_dir / "summary.json", summary.json() | about | {"facts": background.facts})
    path = output_dir / "report.html"
    files.write_text(path, page)
    return path


def render(output_dir: Path, summary: Summary, rows: Sequence[Mapping[str, Any]], background: ReportContext) -> str:
    """Render the page, with all text escaped."""
    return pages.render(
        "eval/report/report.html.j2",
        {"loss": curve.draw(background.losses)} if background.losses else {},
        summary=summary,
        rows=rows,
        background=background,
        videos=_embedded(output_dir, rows),
        percent=percent,
    )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a row for a table: scores become their means."""
    means = {f"mean_{name}": each["mean"] for name, each in (row.get("scores") or {}).items()}
    return {name: value for name, value in row.items() if name != "scores"} | means


def percent(rate: float) -> str:
    """Format a rate as `95 %` or `93.3 %`."""
    return f"{100 * rate:.1f}".removesuffix(".0") + " %"


def embedded(video: Path) -> str:
    """Return a video as a data URI."""
    return "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()


def _embedded(output_dir: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each filmed row, failures first, with a data URI, or None once EMBEDDED_VIDEO_BYTES are used up."""
    room = EMBEDDED_VIDEO_BYTES
    videos = []
    for row in sorted((row for row in rows if row["video"] is not None), key=lambda row: row["outcome"] != "failure"):
        path = output_dir / row["video"]
        size = path.stat().st_size
        uri = None
        if size <= room:
            room -= size
            uri = embedded(path)
        videos.append({"row": row, "uri": uri})
    return videos
