"""A plan's timeline as Chrome-trace JSON, which Perfetto (ui.perfetto.dev) opens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mhc_compile.scheduler.actions import Action

if TYPE_CHECKING:
    from mhc_compile.scheduler.overlap_plan import OverlapPlan

TRACKS = ("compute", "high-priority compute", "all-to-all", "pipeline out", "pipeline in")
MOST_EVENTS = 500_000  # what Perfetto opens at ease; more is left out of written directories


def trace_plan(plan: OverlapPlan, unit_us: float = 1.0) -> str:
    """Returns the trace: a process per rank, a track per stream, an arrow per message.

    Args:
        plan: the plan.
        unit_us: us in one unit of the plan's costs.
    """
    events: list[dict[str, Any]] = []
    for rank in range(plan.ranks):
        events += _name_tracks(rank, TRACKS[:1])
        for step, action in enumerate(plan.actions[rank]):
            start, end = plan.timeline.start[rank, step], plan.timeline.end[rank, step]
            events.append({
                "ph": "X", "name": name_action(action), "cat": action.kind, "pid": rank, "tid": 0,
                "ts": float(start) * unit_us, "dur": float(end - start) * unit_us,
                "args": {"cell": str(action), "step": step},
            })  # fmt: skip
    events += _arrows(plan, unit_us)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def name_action(action: Action) -> str:
    """A slice's title, e.g. "F3 & B1" or "W0"; the stage is among its arguments."""
    return " & ".join(f"{part.kind}{part.microbatch}" for part in action.parts)


def _name_tracks(rank: int, tracks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Titles and sort order of a rank's process and its tracks."""
    event: dict[str, Any] = {"ph": "M", "pid": rank}
    events = [
        {**event, "name": "process_name", "args": {"name": f"rank {rank}"}},
        {**event, "name": "process_sort_index", "args": {"sort_index": rank}},
    ]
    for tid, track in enumerate(tracks):
        events.append({**event, "tid": tid, "name": "thread_name", "args": {"name": track}})
        events.append(
            {**event, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
        )
    return events


def _arrows(plan: OverlapPlan, unit_us: float) -> list[dict[str, Any]]:
    """An arrow from the end of the action that sends to the start of the one that reads."""
    events: list[dict[str, Any]] = []
    start, end = plan.timeline.start, plan.timeline.end
    for number, message in enumerate(plan.messages()):
        common = {"name": f"{message.kind}{message.microbatch}", "cat": "message", "id": number}
        middle = (start + end)[message.source, message.sent_after] / 2  # inside the slice
        events.append({
            "ph": "s", "pid": message.source, "tid": 0, "ts": float(middle) * unit_us, **common,
        })  # fmt: skip
        events.append({
            "ph": "f", "bp": "e", "pid": message.target, "tid": 0, **common,
            "ts": float(start[message.target, message.needed_by]) * unit_us,
        })  # fmt: skip
    return events
