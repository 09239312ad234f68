"""A plan's timeline as Chrome-trace JSON, which Perfetto (ui.perfetto.dev) opens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mhc_compile.scheduler.actions import Action
from mhc_compile.scheduler.stage_ops import OUT, SERVERS

if TYPE_CHECKING:
    from mhc_compile.scheduler.op_plan import OpPlan
    from mhc_compile.scheduler.overlap_plan import OverlapPlan

TRACKS = ("compute", "high-priority compute", "all-to-all", "pipeline out", "pipeline in")
FIRST = 1  # tid of the first track: 0 is to Perfetto the thread whose tid is the pid
MOST_EVENTS = 500_000  # what Perfetto opens at ease; more is left out of written directories


def trace_plan(plan: OverlapPlan, unit_us: float = 1.0) -> str:
    """Returns the trace: a process per rank, a track per stream, an arrow per message.

    Where the plan knows the actions' ops, each is a slice on its server's track, below its action
    on the compute track.

    Args:
        plan: the plan.
        unit_us: us in one unit of the plan's costs.
    """
    events: list[dict[str, Any]] = []
    for rank in range(plan.ranks):
        slices = []
        for step, action in enumerate(plan.actions[rank]):
            start = float(plan.timeline.start[rank, step])
            end = float(plan.timeline.end[rank, step])
            slices.append(_slice(rank, 0, name_action(action), action.kind, start, end, unit_us))
            slices[-1]["args"] = {"cell": str(action), "step": step}
            if plan.ops is not None:
                slices += _op_slices(plan.ops, action.kind, rank, start, unit_us)
        tracks = TRACKS[:1] if plan.ops is None else TRACKS
        _queue_sends(slices)
        events += [*_name_tracks(rank, tracks), *slices]
    events += _arrows(plan, unit_us)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _op_slices(
    plan: OpPlan, kind: str, rank: int, start: float, unit_us: float
) -> list[dict[str, Any]]:
    """The ops of an action that begins at `start`, each on its server's track."""
    ops = plan.problems[kind].ops
    return [
        _slice(rank, SERVERS.index(ops[i].server), ops[i].id, ops[i].chunk, start + begin,
               start + end, unit_us)
        for i, begin, end in plan.runs[kind].pieces if end > begin
    ]  # fmt: skip


def _queue_sends(slices: list[dict[str, Any]]) -> None:
    """Lets each send wait for the one before it, as the simulation does."""
    end = 0.0
    for event in slices:
        if event["tid"] == FIRST + OUT:
            event["ts"] = max(event["ts"], end)
            end = round(event["ts"] + event["dur"], 3)


def _slice(
    rank: int, track: int, name: str, category: str, start: float, end: float, unit_us: float
) -> dict[str, Any]:
    """A slice; times are whole ns, so that a part never reaches beyond its whole."""
    begin = round(start * unit_us, 3)
    return {
        "ph": "X", "name": name, "cat": category, "pid": rank, "tid": FIRST + track,
        "ts": begin, "dur": round(round(end * unit_us, 3) - begin, 3),
    }  # fmt: skip


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
    for tid, track in enumerate(tracks, FIRST):
        events.append({**event, "tid": tid, "name": "thread_name", "args": {"name": track}})
        events.append(
            {**event, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
        )
    return events


def _arrows(plan: OverlapPlan, unit_us: float) -> list[dict[str, Any]]:
    """An arrow from the action that sends to where the one that reads needs it."""
    events: list[dict[str, Any]] = []
    start, middle = plan.timeline.start, (plan.timeline.start + plan.timeline.end) / 2
    for number, message in enumerate(plan.messages()):
        common = {"name": f"{message.kind}{message.microbatch}", "cat": "message", "id": number}
        sent = middle[message.source, message.sent_after]  # an arrow starts inside a slice
        reader = plan.actions[message.target][message.needed_by].kind
        needed = plan.costs.needed(reader, message.kind)
        read = start[message.target, message.needed_by] + needed
        for time, rank, how in (
            (sent, message.source, {"ph": "s"}),
            (read, message.target, {"ph": "f", "bp": "e"}),
        ):
            ts = round(float(time) * unit_us, 3)
            events.append({**how, "pid": rank, "tid": FIRST, "ts": ts, **common})
    return events
