"""Runs the orders of all ranks in time: every rank in order, blocked until its inputs are there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.actions import FB, I, W
from mhc_compile.scheduler.costs import Costs
from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.orders import Orders


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each action runs, in the unit of the costs.

    Attributes:
        start, end: [P, longest], NaN past a rank's last action.
    """

    start: np.ndarray
    end: np.ndarray

    @property
    def makespan(self) -> float:
        """The end of the last action."""
        return float(np.nanmax(self.end))

    @property
    def idle(self) -> list[float]:
        """For each rank, the part of the makespan in which it runs nothing."""
        busy = np.nansum(self.end - self.start, axis=1)
        return [float(value) for value in self.makespan - busy]

    @property
    def bubble(self) -> float:
        """The idle time of the rank that idles longest."""
        return max(self.idle)


def simulate(layout: Layout, orders: Orders, costs: Costs) -> Timeline:
    """Runs each rank's actions in order, each as soon as the one before it and its inputs allow.

    Sends are asynchronous, receives block. In every round all ranks whose next action has its
    inputs advance by one, as arrays over the ranks: O(longest + stages) rounds of O(P).

    Raises:
        PlanError: no rank can go on (a deadlock), with what each of the first ones waits for.
    """
    ranks, longest = orders.kind.shape
    last_stage = layout.stages - 1
    durations, latency = costs.of_kinds(), costs.latency
    every = np.arange(ranks)
    lengths = orders.lengths
    # When outputs are there: of forwards, and of the gradients of inputs. Infinite: not yet.
    f_done = np.full((layout.stages, layout.microbatches), np.inf)
    b_done = np.full((layout.stages, layout.microbatches), np.inf)
    start = np.full((ranks, longest), np.nan)
    end = np.full((ranks, longest), np.nan)
    position = np.zeros(ranks, dtype=np.int64)
    free = np.zeros(ranks)

    active = every
    while active.size:
        at = position[active]
        kind = orders.kind[active, at]
        fs, fm = orders.f_stage[active, at], orders.f_microbatch[active, at]
        bs, bm = orders.b_stage[active, at], orders.b_microbatch[active, at]
        ready = free[active]

        # absent parts are -1, which wraps to some entry that the masks leave out
        below = np.maximum(fs - 1, 0)
        far = layout.rank_of(below, fm) != active
        arrival = f_done[below, fm] + latency * far
        ready = np.where(fs > 0, np.maximum(ready, arrival), ready)
        back = (bs >= 0) & (kind != W)
        above = np.minimum(bs + 1, last_stage)
        far = layout.rank_of(above, bm) != active
        arrival = np.where(bs < last_stage, b_done[above, bm] + latency * far, f_done[bs, bm])
        own = np.where(kind == W, b_done[bs, bm], f_done[bs, bm])
        ready = np.where(back, np.maximum(ready, arrival), ready)
        ready = np.where(bs >= 0, np.where(np.isfinite(own), ready, np.inf), ready)

        go = np.isfinite(ready)
        if not go.any():
            raise PlanError(_deadlock(orders, active, at))
        if not go.all():
            active, at, kind, ready = active[go], at[go], kind[go], ready[go]
            fs, fm, bs, bm, back = fs[go], fm[go], bs[go], bm[go], back[go]
        finish = ready + durations[kind]
        start[active, at] = ready
        end[active, at] = free[active] = finish
        position[active] += 1
        pair = kind == FB
        forward = fs >= 0
        f_out = np.where(pair, ready + costs.f_ready, finish)
        f_done[fs[forward], fm[forward]] = f_out[forward]
        b_out = np.where(pair, ready + costs.b_ready, finish)
        b_done[bs[back], bm[back]] = b_out[back]
        active = np.flatnonzero(position < lengths)
    return Timeline(start, end)


def _deadlock(orders: Orders, active: np.ndarray, at: np.ndarray) -> str:
    rows = orders.actions()
    waiting = [f"rank {rank} at {rows[rank][step]}" for rank, step in zip(active, at, strict=True)]
    more = f" and {len(waiting) - 4} more" if len(waiting) > 4 else ""
    return (
        f"the orders deadlock: {', '.join(waiting[:4])}{more} wait for inputs that only actions "
        "behind these would make; compare the orders with those of plan_pipeline"
    )


def in_flight(orders: Orders) -> list[int]:
    """For each rank, the most chunks whose activations it holds at once.

    A forward begins to hold them, W or B (also an overlapped one) ends it.
    """
    holds = orders.f_stage >= 0
    releases = (orders.b_stage >= 0) & (orders.kind != I)
    after = np.cumsum(holds.astype(np.int64) - releases, axis=1)
    before = np.pad(after[:, :-1], ((0, 0), (1, 0)))
    return [int(peak) for peak in (before + holds).max(axis=1, initial=0)]
