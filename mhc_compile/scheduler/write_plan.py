"""Writes a plan's views as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.chrome_trace import MOST_EVENTS
from mhc_compile.scheduler.overlap_plan import OverlapPlan


def write_plan(plan: OverlapPlan, directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Writes JSON, CSV, trace and pictures.

    Returns:
        The files written, and for each one left out the reason: matplotlib is missing, or the plan
        is too large to be looked at.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files, left_out = [], {}
    views: dict[str, Callable[[], str]] = {"plan.json": plan.to_json, "plan.csv": plan.to_csv}
    actions = int(plan.orders.lengths.sum())
    if actions <= MOST_EVENTS:
        views["plan.trace.json"] = plan.to_chrome_trace
    else:
        left_out["plan.trace.json"] = f"{actions} actions are more than {MOST_EVENTS}"
    for name, view in views.items():
        files.append(directory / name)
        files[-1].write_text(view())
    pictures: dict[str, Callable[[Path], None]] = {"plan.svg": plan.plot, "plan.png": plan.plot}
    if plan.ops is not None:
        pictures |= {"pair.svg": plan.ops.plot, "pair.png": plan.ops.plot}
    for name, draw in pictures.items():
        try:
            draw(directory / name)
            files.append(directory / name)
        except PlanError as error:
            left_out[name] = str(error)
    return files, left_out
