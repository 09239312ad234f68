"""A plan's timeline as a Gantt picture; needs the optional extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.actions import Action

if TYPE_CHECKING:
    from mhc_compile.scheduler.overlap_plan import OverlapPlan

# Of slot 0 and slot 1: the near stage light, the far one dark.
COLORS = {
    "F": ("#9ec9f5", "#3f7fc4"),
    "B": ("#a9dba0", "#3f9150"),
    "I": ("#f7d08a", "#d98f1f"),
    "W": ("#e3d3ee", "#a27fbf"),
}
TITLES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
MOST_CELLS = 6000
CELL_INCHES = 0.2


def plot_plan(plan: OverlapPlan, path: str | Path) -> None:
    """Draws a row per rank and a box per action, and saves it in the format of the path's ending.

    An overlapped pair is one box, its forward above its backward. Numbers are microbatches,
    those of dualpipe's second direction counted from 0 too, with a bar above.

    Raises:
        PlanError: matplotlib is missing, or the plan has too many actions to be read.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise PlanError("pictures need matplotlib: pip install 'mhc_compile[plots]'") from None
    cells = int(plan.orders.lengths.sum())
    if cells > MOST_CELLS:
        raise PlanError(
            f"a picture of {cells} actions cannot be read (at most {MOST_CELLS}); open "
            "to_chrome_trace() in Perfetto, or draw a smaller plan of the same kind"
        )
    shortest = min((getattr(plan.costs, k) for k in "FBIW" if getattr(plan.costs, k)), default=1.0)
    width = min(max(plan.makespan / shortest * CELL_INCHES, 7.0), 60.0)
    figure = Figure(figsize=(width + 1, 0.42 * plan.ranks + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    used = set()
    for rank, actions in enumerate(plan.actions):
        for step, action in enumerate(actions):
            start = float(plan.timeline.start[rank, step])
            length = float(plan.timeline.end[rank, step]) - start
            _draw(axes, plan, rank, action, start, length, length / shortest * CELL_INCHES > 0.1)
            used |= {(part.kind, _slot(plan, rank, part)) for part in action.parts}
    slots = ("near stage", "far stage") if len(plan.layout.slots(0)) == 2 else ("",)
    axes.legend(
        handles=[
            Patch(facecolor=COLORS[kind][slot], edgecolor="black", linewidth=0.4,
                  label=f"{TITLES[kind]}{', ' * bool(title)}{title}")
            for kind in COLORS for slot, title in enumerate(slots) if (kind, slot) in used
        ],
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=8,
    )  # fmt: skip
    axes.set(xlim=(0, plan.makespan), ylim=(plan.ranks - 0.5, -0.5), xlabel="time")
    axes.set_yticks(range(plan.ranks), [_label(plan, rank) for rank in range(plan.ranks)])
    title = (
        f"{plan.variant}, {plan.ranks} ranks, {plan.microbatches} microbatches: makespan "
        f"{plan.makespan:g}, bubble {plan.bubble:g}"
    )
    if plan.variant == "dualpipe":
        title += "; a bar marks microbatches that start at the last rank"
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, dpi=110)


def _label(plan: OverlapPlan, rank: int) -> str:
    stages = [str(stage) for stage, _ in plan.layout.slots(rank)]
    return f"rank {rank}" if len(stages) == 1 else f"rank {rank}, stages {' and '.join(stages)}"


def _slot(plan: OverlapPlan, rank: int, part: Action) -> int:
    return [stage for stage, _ in plan.layout.slots(rank)].index(part.stage)


def _draw(
    axes: Any, plan: OverlapPlan, rank: int, action: Action, start: float, length: float,
    numbered: bool,
) -> None:  # fmt: skip
    """Adds an action's box: whole, or halves for a pair."""
    from matplotlib.patches import Rectangle

    height = 0.8 / len(action.parts)
    for i, part in enumerate(action.parts):
        top = rank - 0.4 + i * height
        slot = _slot(plan, rank, part)
        color = COLORS[part.kind][slot]
        axes.add_patch(Rectangle((start, top), length, height, facecolor=color, linewidth=0))
        if numbered:
            half = plan.microbatches // 2 if plan.variant == "dualpipe" else plan.microbatches
            direction, number = divmod(part.microbatch, half)
            axes.text(
                start + length / 2, top + height / 2 + 0.02,
                rf"$\overline{{{number}}}$" if direction else str(number),
                ha="center", va="center", fontsize=6.5, color="black" if slot == 0 else "white",
            )  # fmt: skip
    axes.add_patch(
        Rectangle((start, rank - 0.4), length, 0.8, fill=False, edgecolor="black", linewidth=0.5)
    )
