"""Runs the orders of all ranks in time: every rank in order, blocked until its inputs are there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.actions import FB, KINDS, I, W
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

    @cached_property
    def makespan(self) -> float:
        """The end of the last action."""
        return float(np.nanmax(self.end))

    @cached_property
    def idle(self) -> list[float]:
        """For each rank, the part of the makespan in which it runs nothing."""
        busy = np.nansum(self.end - self.start, axis=1)
        return [float(value) for value in self.makespan - busy]

    @cached_property
    def bubble(self) -> float:
        """The idle time of the rank that idles longest."""
        return max(self.idle)


def simulate(layout: Layout, orders: Orders, costs: Costs) -> Timeline:
    """Runs each rank's actions in order, each as soon as the one before it and its inputs allow.

    An action may begin before its inputs are there, by as much as it reads them later. Sends are
    asynchronous, receives block. A rank's messages leave one after another, in the order of its
    actions, of a pair's two the one that is ready first. In every round all ranks whose next
    action has its inputs advance by one, as arrays over the ranks: O(longest + stages) rounds of
    O(P).

    Raises:
        PlanError: no rank can go on (a deadlock), with what each of the first ones waits for.
    """
    ranks, longest = orders.kind.shape
    last_stage = layout.stages - 1
    durations = costs.of_kinds()
    f_needed, b_needed = (np.array([costs.needed(k, made) for k in KINDS]) for made in "FG")
    lengths = orders.lengths
    # When outputs are where they are read: of forwards, and of gradients. Infinite: not yet.
    f_done = np.full((layout.stages, layout.microbatches), np.inf)
    b_done = np.full((layout.stages, layout.microbatches), np.inf)
    start = np.full((ranks, longest), np.nan)
    end = np.full((ranks, longest), np.nan)
    position = np.zeros(ranks, dtype=np.int64)
    free = np.zeros(ranks)
    links = _Links(costs, ranks)

    active = np.arange(ranks)
    while active.size:
        at = position[active]
        kind = orders.kind[active, at]
        # absent parts are -1, which wraps to some entry that the masks leave out
        fs, fm = orders.f_stage[active, at], orders.f_microbatch[active, at]
        bs, bm = orders.b_stage[active, at], orders.b_microbatch[active, at]
        back = (bs >= 0) & (kind != W)
        ready = free[active]
        below = f_done[np.maximum(fs - 1, 0), fm] - f_needed[kind]
        ready = np.where(fs > 0, np.maximum(ready, below), ready)
        above = b_done[np.minimum(bs + 1, last_stage), bm] - b_needed[kind]
        ready = np.where(back & (bs < last_stage), np.maximum(ready, above), ready)
        own = np.where(kind == W, b_done[bs, bm], f_done[bs, bm])
        ready = np.where((bs >= 0) & ~np.isfinite(own), np.inf, ready)

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
        f_ready = np.where(kind == FB, ready + costs.f_ready, finish)
        b_ready = np.where(kind == FB, ready + costs.b_ready, finish)
        f_far = (fs >= 0) & (fs < last_stage) & (layout.rank_of(fs + 1, fm) != active)
        b_far = back & (bs > 0) & (layout.rank_of(bs - 1, bm) != active)
        f_out, b_out = links.send(active, f_ready, f_far, b_ready, b_far)
        forward = fs >= 0
        f_done[fs[forward], fm[forward]] = f_out[forward]
        b_done[bs[back], bm[back]] = b_out[back]
        active = np.flatnonzero(position < lengths)
    return Timeline(start, end)


class _Links:
    """Each rank's way out, one message at a time."""

    def __init__(self, costs: Costs, ranks: int) -> None:
        self.costs, self.free = costs, np.zeros(ranks)

    def send(
        self, active: np.ndarray, f_ready: np.ndarray, f_far: np.ndarray, b_ready: np.ndarray,
        b_far: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """When the outputs of the active ranks' actions arrive; those not far at once."""
        if not self.costs.transfer:
            return f_ready + self.costs.latency * f_far, b_ready + self.costs.latency * b_far
        b_first = f_far & b_far & (b_ready < f_ready)
        f_out = self._queue(active, f_ready, f_far & ~b_first)
        b_out = self._queue(active, b_ready, b_far)
        return np.where(b_first, self._queue(active, f_ready, b_first), f_out), b_out

    def _queue(self, active: np.ndarray, ready: np.ndarray, far: np.ndarray) -> np.ndarray:
        through = np.maximum(ready, self.free[active]) + self.costs.transfer
        self.free[active] = np.where(far, through, self.free[active])
        return np.where(far, through + self.costs.latency, ready)


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
