"""Files of a comparison of evaluations.

    output_dir/
      compare.html    one self-contained file: statements, bars and learning curves with intervals, tables, videos side by side
      compare.json    every figure of it

Owns: the folder, the page, the picture. Does not know: how the figures were found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi0fm import files, machine, pages
from pi0fm.eval.compare import ComparedEvaluations
from pi0fm.eval.recipes import Recipe
from pi0fm.eval.report.page import EMBEDDED_VIDEO_BYTES, embedded, percent
from pi0fm_client.errors import OutputError

PAGE, RESULT = "compare.html", "compare.json"
COLOURS = ("#0f766e", "#c8862b", "#5b5fc7", "#b4483d", "#5a7d2b", "#7a4f8f")
LONGEST = 40  # characters of a name in the legend
BAR = 0.8  # of the distance between two groups, for all bars of one


def write(output_dir: Path, found: ComparedEvaluations) -> Path:
    """Write page and figures, replacing an earlier comparison; return the page's path. Raises OutputError for another folder."""
    files.make_folder(output_dir)
    others = sorted(path.name for path in output_dir.iterdir() if path.name not in (PAGE, RESULT))
    if others:
        raise OutputError(f"only an earlier comparison is ever replaced, and {output_dir} holds {others[0]}; type --output_dir ANOTHER")
    background: Mapping[str, object] = {"command": machine.command_line(), "facts": {}}
    curves = [each for each in found.recipes if len(each.points) > 1]
    pictures = {"bars": bars(found)} | ({"curves": draw_curves(curves)} if curves else {})
    values = {"found": found, "films": side_by_side(found), "background": background, "percent": percent}
    page = pages.render("eval/report/compare.html.j2", pictures, **values)
    with files.write_faults(output_dir):
        files.write_text(output_dir / PAGE, page)
        files.write_json(output_dir / RESULT, found.json())
    return output_dir / PAGE


def side_by_side(found: ComparedEvaluations) -> list[dict[str, Any]]:
    """Collect episodes that several evaluations filmed, with data URIs, as far as all videos of an episode fit into the bound."""
    room, shown = EMBEDDED_VIDEO_BYTES, []
    for key in found.filmed():
        filmed = [(each, each.videos[key]) for each in found.evaluations if key in each.videos]
        size = sum(path.stat().st_size for _, path in filmed)
        if size > room:
            continue
        room -= size
        films = [{"name": each.name, "outcome": each.outcomes[key], "uri": embedded(path)} for each, path in filmed]
        shown.append({"task": key[0], "seed": key[1], "films": films})
    return shown


def draw_curves(curves: Sequence[Recipe]) -> bytes:
    """Draw success over training steps with its intervals, one line per recipe, as PNG."""
    figure, (axis,) = pages.panels(width=7.8, height=3.2)
    for number, recipe in enumerate(curves):
        colour, steps = COLOURS[number % len(COLOURS)], [point.steps for point in recipe.points]
        low, high = ([100 * getattr(point.interval, end) for point in recipe.points] for end in ("low", "high"))
        axis.plot(steps, [100 * point.interval.rate for point in recipe.points], color=colour, marker=".", label=recipe.name[-LONGEST:])
        axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    pages.chart(axis, "Success over training, 95 % interval", "steps", "%")
    axis.set_ylim(0, 102)
    pages.legend(axis)
    return pages.png(figure)


def bars(found: ComparedEvaluations) -> bytes:
    """Draw success by task and over tasks as bars with 95 % intervals, a colour for each evaluation."""
    groups = [*found.tasks, "mean over tasks"] if len(found.tasks) > 1 else list(found.tasks)
    figure, (axis,) = pages.panels(width=max(6.0, 1.2 + len(groups) * (0.5 + 0.4 * len(found.evaluations))), height=4.0)
    width = BAR / len(found.evaluations)
    for number, each in enumerate(found.evaluations):
        intervals = [each.mean(found.tasks) if group == "mean over tasks" else each.interval(group) for group in groups]
        drawn = [(place, interval) for place, interval in enumerate(intervals) if interval is not None]
        places = [place + (number + 0.5) * width - BAR / 2 for place, _ in drawn]
        rates = [100 * interval.rate for _, interval in drawn]
        ends = [[100 * (i.rate - i.low) for _, i in drawn], [100 * (i.high - i.rate) for _, i in drawn]]
        look = {"color": COLOURS[number % len(COLOURS)], "ecolor": pages.INK, "capsize": 3, "label": each.name[-LONGEST:]}
        axis.bar(places, rates, 0.9 * width, yerr=ends, error_kw={"linewidth": 1}, **look)
    pages.chart(axis, "Success, with 95 % intervals", "", "%")
    axis.set_xticks(range(len(groups)), groups, rotation=20 if len(groups) > 3 else 0, ha="right" if len(groups) > 3 else "center")
    axis.set_ylim(0, 105)
    axis.grid(False, axis="x")
    pages.legend(figure, loc="outside lower left", ncols=3 if max(len(each.name) for each in found.evaluations) < LONGEST // 2 else 1)
    return pages.png(figure)
