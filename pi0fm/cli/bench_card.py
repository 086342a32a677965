"""`pi0fm bench card`: what one GPU makes of pi0 at full size, in eight minutes, and its table."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pi0fm.bench.card.config import CardConfig

HELP = "one GPU in eight minutes: whether it computes right, inference and training at full size, their share of its limits"
Options = CardConfig
ALIASES: dict[str, str] = {}


def run(config: CardConfig) -> dict[str, Any]:
    """Measure, print the table, return a short form of it."""
    from pi0fm.bench.card.run import measure_card

    result = measure_card(config)
    _print(result)
    rows = [row for part in result["parts"].values() for row in part.get("rows", [])]
    return {
        "device": result["device"],
        "seconds": result["seconds"],
        "ended": {name: part["ended"] for name, part in result["parts"].items()},
        "right": result["parts"].get("right", {}).get("summary", "not run"),
        "figures": {row["what"]: row["value"] for row in rows if row["value"] is not None},
        "results": str(config.output_dir),
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="", title=f"{result['device']}, {result['seconds']:.0f} s")
    for heading in ("what", "figure", "of the limit", "target", "note"):
        table.add_column(heading, overflow="fold")
    for name, part in result["parts"].items():
        table.add_row(name, "", "", "", f"{part['ended']}, {part.get('seconds', 0):.0f} s")
        if "summary" in part:
            table.add_row("  tests/gpu", "", "", "none fails", part["summary"])
            for line in (*part["failures"], *part["reasons"]):
                table.add_row("", "", "", "", line)
        for line in part.get("last_words", ()):
            table.add_row("", "", "", "", line)
        for row in part.get("rows", []):
            figure = "" if row["value"] is None else f"{row['value']:g} {row['unit']}"
            share = "" if row["limit_share"] is None else f"{100 * row['limit_share']:.0f} %"
            table.add_row(f"  {row['what']}", figure, share, row["target"], row["note"])
    Console(width=180, markup=False).print(table)
