"""A plan as text: its summary, what each rank does, and CSV for torch's pipeline runtime."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from mhc_compile.scheduler.actions import KINDS

if TYPE_CHECKING:
    from mhc_compile.scheduler.op_plan import OpPlan
    from mhc_compile.scheduler.overlap_plan import OverlapPlan

MOST_ROWS = 32


def summarize(plan: OverlapPlan) -> str:
    """Returns the plan's figures and a row per rank, of a wide pipeline the first and last 16."""
    form, held = plan.closed_form, plan.peak_in_flight
    share = f" ({plan.bubble / plan.makespan:.1%})" if plan.makespan else ""
    lines = [
        f"{plan.variant}: {plan.ranks} ranks, {plan.microbatches} microbatches, "
        f"{plan.layout.stages} stages, {plan.streams} streams",
        f"costs      {', '.join(f'{kind} = {getattr(plan.costs, kind):g}' for kind in KINDS)}"
        f", latency = {plan.costs.latency:g}, transfer = {plan.costs.transfer:g}",
        f"makespan   {plan.makespan:g}",
        f"bubble     {plan.bubble:g}{share}",
        f"formula    bubble {form.formula} = {form.bubble:g}, makespan {form.makespan:g}: "
        + ("holds" if form.holds else f"need not hold; needs {form.conditions}"),
        f"in flight  {min(held)} to {max(held)} chunks a rank",
    ]
    text = "\n".join(lines) + "\n\n" + tabulate(_rows(plan), headers="keys")
    return text if plan.ops is None else f"{text}\n\n{summarize_ops(plan.ops)}"


def summarize_ops(ops: OpPlan) -> str:
    """Returns the pair's makespan beside other rules and lower bounds."""
    rows = [(name, value, value / ops.makespan) for name, value in ops.comparisons.items()]
    bounds = [(name, value, value / ops.makespan) for name, value in ops.bounds.items()]
    where = "the high-priority stream" if ops.high_priority else "the ordinary compute stream"
    return (
        f"overlapped pair, provenance of its costs: {ops.costs.provenance}\n"
        f"F_post,res of MLP sublayers on {where}\n\n"
        + tabulate(rows, headers=["pair", "us", "of this plan"], floatfmt=("", ".1f", ".3f"))
        + "\n\n"
        + tabulate(bounds, headers=["lower bound", "us", "of this plan"],
                   floatfmt=("", ".1f", ".3f"))
    )  # fmt: skip


def _rows(plan: OverlapPlan) -> list[dict[str, object]]:
    shown = list(range(plan.ranks))
    if plan.ranks > MOST_ROWS:
        shown = shown[: MOST_ROWS // 2] + shown[-MOST_ROWS // 2 :]
    used = np.unique(plan.orders.kind[0])
    rows = []
    for rank in shown:
        counts = (plan.orders.kind[rank][:, None] == np.arange(len(KINDS))).sum(0)
        rows.append({
            "rank": rank,
            "stages": ", ".join(str(stage) for stage, _ in plan.layout.slots(rank)),
            **{kind: counts[code] for code, kind in enumerate(KINDS) if code in used},
            "idle": f"{plan.timeline.idle[rank]:g}",
            "in flight": plan.peak_in_flight[rank],
        })  # fmt: skip
    return rows


def write_csv(plan: OverlapPlan) -> str:
    """Returns a row per rank in the form that torch's pipelining runtime loads as compute_only.

    torch lacks a notion of the bidirectional dualpipe: it reads these rows and then refuses them,
    since two ranks hold each stage.
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(plan.actions_as_text())
    return out.getvalue()
