"""What the demo leaves behind: report.html, demo.json and the pictures.

    output_dir/
      report.html       one file that can be sent by mail: pictures inside, no script, nothing loaded from elsewhere
      demo.json         every figure of the page; written last
      over_time.png trajectories.png field.png learned.png comparison.png

Owns: the folder and the page. Does not know: how anything was trained or drawn.
Everything is made before anything is written; each file is written aside and renamed. demo.json goes first and comes last, so that a
folder with demo.json is a whole demo of one run.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from pi0fm import files
from pi0fm_client.errors import OutputError

PAGE, RESULT = "report.html", "demo.json"
PICTURES = ("over_time", "trajectories", "field", "learned", "comparison")
OWN_FILES = (PAGE, RESULT, *(f"{name}.png" for name in PICTURES))


@dataclass(frozen=True)
class Background:
    """What a reader needs beside the figures. facts: tables by heading, such as {"machine": {"cores": "2"}}."""

    command: str = ""
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def refuse_other_folder(output_dir: Path) -> None:
    """Raise OutputError when `output_dir` is a file, or holds anything that is not of such a demo."""
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"output_dir must be a folder, found a file at {output_dir}; type --output_dir ANOTHER")
    others = sorted(path.name for path in output_dir.iterdir() if path.name not in OWN_FILES) if output_dir.exists() else []
    if others:
        raise OutputError(f"only an earlier demo is ever replaced, and {output_dir} holds {others[0]}; type --output_dir ANOTHER")


def write(output_dir: Path, figures: Mapping[str, Any], pictures: Mapping[str, bytes], background: Background) -> Path:
    """Write the pictures, the page and demo.json in the place of an earlier demo; the page's path.

    figures: what demo.json holds and the page shows; see cli/flow_demo.py. pictures: PNG files by a name of PICTURES.
    """
    refuse_other_folder(output_dir)
    page = render(figures, pictures, background)
    for name in (RESULT, *OWN_FILES):
        (output_dir / name).unlink(missing_ok=True)
    for name, picture in pictures.items():
        files.write_bytes(output_dir / f"{name}.png", picture)
    path = output_dir / PAGE
    files.write_text(path, page)
    files.write_json(output_dir / RESULT, dict(figures) | {"command": background.command, "facts": background.facts})
    return path


def render(figures: Mapping[str, Any], pictures: Mapping[str, bytes], background: Background) -> str:
    """The page. Everything that comes from outside is escaped; nothing is loaded from anywhere."""
    loader = jinja2.PackageLoader("pi0fm.toy", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["seconds"] = seconds
    environment.filters["factor"] = factor
    uris = {name: "data:image/png;base64," + base64.b64encode(picture).decode() for name, picture in pictures.items()}
    return environment.get_template("page.html.j2").render(figures=figures, pictures=uris, background=background)


def seconds(value: float | None) -> str:
    """`0.41 s`, `12.3 s`, or `not reached`."""
    return "not reached" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def factor(value: float) -> str:
    """`3.4` below ten, `27` from there on."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
