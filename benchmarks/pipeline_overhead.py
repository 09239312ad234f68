"""What n streams cost the 27B model's DualPipe, with and without what mHC adds to it; all modelled.

The costs are those of pipeline_27b.py; plain has one stream, whose F_post,res is the residual add.
Plain DualPipe sends after a pair, has one compute stream, and its actions wait for all of their
messages first. With late waits a chunk waits when it reads its message: a backward recomputes
before. Exposed is how much of the makespan goes when messages take no time.

    python benchmarks/pipeline_overhead.py --picture docs/pipeline_overhead.png
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache

from pipeline_27b import BLOCKS, costs
from tabulate import tabulate

import mhc_compile as mc
from mhc_compile.scheduler.costs import Costs
from mhc_compile.scheduler.op_plan import plan_ops

PAPER = 0.067
"""The paper's training-time overhead of n = 4 (arXiv 2512.24880, Sec. 4.3)."""
EXTENSIONS = {
    "plain DualPipe": (False, False, False),
    "early sends": (True, False, False),
    "high priority": (False, True, False),
    "late waits": (False, False, True),
    "all": (True, True, True),
}
"""Early sends, high priority, late waits."""


@cache
def actions(streams: int, link_gbs: float, early: bool, high: bool, late: bool) -> Costs:
    """What actions cost, in us, if the ops within them are searched under these rules."""
    table = costs(streams, BLOCKS, link_gbs)
    if streams == 1:
        none = dict.fromkeys(
            ("coefficients_F", "coefficients_B", "pre_F", "pre_B", "recompute"), 0.0
        )
        table = replace(table, **none)
    found = plan_ops(table, high).action_costs
    if not late:
        found = replace(found, f_needed=0.0, b_needed=0.0, g_needed=0.0)
    return found if early else replace(found, f_ready=found.FB, b_ready=found.FB)


@cache
def makespan(
    ranks: int, microbatches: int, streams: int, link_gbs: float,
    rules: tuple[bool, bool, bool],
    free: bool = False,
) -> float:  # fmt: skip
    """Of dualpipe, in us; `free` messages take no time."""
    found = actions(streams, link_gbs, *rules)
    if free:
        found = replace(found, transfer=0.0)
    return mc.plan_pipeline(ranks, microbatches, variant="dualpipe", costs=found).makespan


def overheads(
    ranks: int, microbatches: int, streams: int, link_gbs: float
) -> dict[str, tuple[float, float]]:
    """The step's overhead over one stream in plain DualPipe, and the share that is exposed."""
    plain = makespan(ranks, microbatches, 1, link_gbs, EXTENSIONS["plain DualPipe"])
    found = {}
    for name, rules in EXTENSIONS.items():
        whole = makespan(ranks, microbatches, streams, link_gbs, rules)
        free = makespan(ranks, microbatches, streams, link_gbs, rules, free=True)
        found[name] = whole / plain - 1, (whole - free) / whole
    return found


def main() -> None:
    """Prints the tables, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--links", type=float, nargs="+", default=[10, 20, 40, 80], help="GB/s")
    parser.add_argument("--picture", help="e.g. docs/pipeline_overhead.png")
    args = parser.parse_args()
    base = {"ranks": 8, "streams": 4, "link_gbs": 40.0}
    axes = {"ranks": args.ranks, "streams": args.streams, "link_gbs": args.links}
    found = {
        (axis, value): overheads(**(sizes := base | {axis: value}), microbatches=4 * sizes["ranks"])
        for axis, values in axes.items() for value in values
    }  # fmt: skip
    rows = [
        [f"{axis} = {value:g}", *(f"{over:.1%} ({exposed:.1%})" for over, exposed in row.values())]
        for (axis, value), row in found.items()
    ]
    print(tabulate(rows, ["overhead (exposed)", *EXTENSIONS], tablefmt="github",
                   disable_numparse=True))  # fmt: skip
    if args.picture:
        draw(found, args.picture)


def draw(found: dict[tuple[str, float], dict[str, tuple[float, float]]], path: str) -> None:
    """A graph for each axis, with the paper's overhead as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {"ranks": "ranks P, n = 4, 40 GB/s", "streams": "streams n, P = 8, 40 GB/s",
              "link_gbs": "GB/s of a link, P = 8, n = 4"}  # fmt: skip
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (axis, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        values = [value for name, value in found if name == axis]
        places = range(len(values))
        for k, name in enumerate(EXTENSIONS):
            over = [100 * found[axis, value][name][0] for value in values]
            axes.plot(places, over, marker="os^vD"[k], linestyle=("-", "--")[k > 1], label=name)
        axes.axhline(100 * PAPER, color="black", linewidth=0.8, linestyle=":", label="paper, n = 4")
        axes.set_xticks(places, [f"{value:g}" for value in values])
        axes.set(xlabel=title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("step time over one stream, %")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
