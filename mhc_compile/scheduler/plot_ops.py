"""The overlapped pair's ops as a Gantt picture; needs the optional extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.stage_ops import SERVERS, Op

if TYPE_CHECKING:
    from mhc_compile.scheduler.op_plan import OpPlan

TITLES = ("compute", "high priority", "all-to-all", "pipeline out", "pipeline in")
COLORS = {"F": "#9ec9f5", "B": "#a9dba0", "W": "#e3d3ee", "recompute": "#f7d08a"}
LEGEND = {"F": "forward", "B": "backward", "W": "weight gradient", "recompute": "recompute"}
INCHES, CHARACTER = 22.0, 0.068


def plot_ops(plan: OpPlan, path: str | Path) -> None:
    """Draws a row per server and a box per piece of an op, and saves it as the path's ending says.

    Raises:
        PlanError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError:
        raise PlanError("pictures need matplotlib: pip install 'mhc_compile[plots]'") from None
    ops, run = plan.problems["FB"].ops, plan.runs["FB"]
    figure = Figure(figsize=(INCHES, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    per_inch = run.makespan / (INCHES - 1.5) or 1.0
    for i, start, end in run.pieces:
        if end == start:
            continue
        row = SERVERS.index(ops[i].server)
        box = Rectangle(
            (start, row - 0.4), end - start, 0.8, facecolor=COLORS[_color(ops[i])],
            edgecolor="black", linewidth=0.5,
        )  # fmt: skip
        axes.add_patch(box)
        title = ops[i].id.replace(".", " ").replace("_", " ")
        room = (end - start) / per_inch
        style: dict[str, Any] = {"va": "center", "fontsize": 8}
        if ops[i].server == "hp":  # short and far apart: there is room beside them
            axes.text(end + 0.05 * per_inch, row, title, **style)
        elif len(title) * CHARACTER < room:
            axes.text((start + end) / 2, row, title, ha="center", **style)
        elif room > 0.12:  # upright, without the layer, which the neighbours tell
            short = title[3:].replace("attention", "attn").replace("coefficients", "coef")
            style |= {"fontsize": 5.5, "rotation": 90, "ha": "center"}
            axes.text((start + end) / 2, row, short, **style)
    axes.legend(
        handles=[Patch(facecolor=COLORS[key], edgecolor="black", linewidth=0.4, label=title)
                 for key, title in LEGEND.items()],
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
    axes.set(xlim=(0, run.makespan), ylim=(len(SERVERS) - 0.5, -0.5), xlabel="us")
    axes.set_yticks(range(len(SERVERS)), TITLES)
    bound = max(plan.bounds.values())
    axes.set_title(
        f"one overlapped pair: {run.makespan:.1f} us, lower bound {bound:.1f} us; costs "
        f"{plan.costs.provenance}", loc="left", fontsize=10,
    )  # fmt: skip
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, dpi=110)


def _color(op: Op) -> str:
    if op.id.endswith("_W"):
        return "W"
    return "recompute" if op.id.endswith("recompute") else op.chunk
