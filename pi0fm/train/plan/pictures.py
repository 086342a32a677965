"""Pictures of a plan: speed against number of cards, for several networks and kinds of card, and the time of a step by part.

Owns: drawing. Does not know: how a plan is made.
"""

from collections.abc import Mapping, Sequence

from pi0fm import pages
from pi0fm.train.plan.planner import PARTS, Plan

COLOURS = ("#0f766e", "#c8862b", "#5b5fc7", "#b4436c", "#5a7d2b")
PART_NAMES = {"weights": "weights, once a pass", "optimizer": "optimiser"}
Curves = Mapping[str, Sequence[Plan]]


def scaling(networks: Curves, cards: Curves, chosen: Sequence[Plan]) -> bytes:
    """Draw `networks` and `cards` in samples/s with dotted lines of linear scaling, and `chosen` as shares of a step; return a PNG."""
    figure, (by_network, by_card, shares) = pages.panels(3, height=3.9)
    for axis, curves, title in ((by_network, networks, "by network"), (by_card, cards, "by card")):
        for (name, plans), colour in zip(curves.items(), COLOURS, strict=False):
            counts, speeds = [each.workers for each in plans], [each.samples_per_second for each in plans]
            axis.plot(counts, speeds, color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
            axis.plot(counts, [speeds[0] / counts[0] * count for count in counts], color=colour, linewidth=0.7, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        pages.chart(axis, title, "cards", "samples/s")
        pages.plain_log(axis.yaxis)
        pages.legend(axis)
    places, below = list(range(len(chosen))), [0.0] * len(chosen)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        heights = [100 * each.parts[part] / each.seconds for each in chosen]
        shares.bar(places, heights, bottom=below, color=colour, width=0.8, label=PART_NAMES.get(part, part))
        below = [low + height for low, height in zip(below, heights, strict=True)]
    shares.set_xticks(places, [str(each.workers) for each in chosen])
    pages.chart(shares, "where a step goes", "cards", "%")
    pages.legend(shares, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    for axis in (by_network, by_card):
        axis.set_xticks([each.workers for each in chosen], [str(each.workers) for each in chosen])
        axis.minorticks_off()
    return pages.png(figure)
