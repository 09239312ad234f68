"""A plan as text: its summary, what each rank does, and CSV for torch's pipeline runtime."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from mhc_compile.scheduler.actions import KINDS

if TYPE_CHECKING:
    from mhc_compile.scheduler.messages import Message
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


def write_csv(plan: OverlapPlan, receives: bool = False) -> str:
    """Returns a row per rank in the form that torch's pipelining runtime loads.

    torch lacks a notion of the bidirectional dualpipe: it reads these rows and then refuses them,
    since two ranks hold each stage.

    Args:
        plan: the plan.
        receives: adds what each rank receives, for format "compute_comms"; without, the rows are
            "compute_only". A receive is posted one action before the one that reads it, so that
            the message can arrive meanwhile, and in the order of `messages`. Sends are left to
            what runs an action, which knows when a chunk within a pair is through.
    """
    rows = plan.actions_as_text()
    if receives:
        messages = plan.messages()
        rows = [_with_receives(rank, row, messages) for rank, row in enumerate(rows)]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _with_receives(rank: int, row: list[str], messages: list[Message]) -> list[str]:
    posted: list[list[str]] = [[] for _ in row]
    for message in messages:
        if message.target == rank:
            reader = message.stage + (1 if message.kind == "F" else -1)
            cell = f"{reader}RECV_{message.kind}{message.microbatch}"
            posted[max(0, message.posted_before - 1)].append(cell)
    pairs = zip(posted, row, strict=True)
    return [cell for receives, action in pairs for cell in (*receives, action)]
