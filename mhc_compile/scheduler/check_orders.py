"""What a legal set of orders is, checked on arrays so that millions of actions are no matter."""

from __future__ import annotations

import numpy as np

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.actions import FB, B, F, I, W
from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.orders import Orders
from mhc_compile.scheduler.simulate import in_flight


def check_orders(layout: Layout, orders: Orders) -> None:
    """Checks counts, places, local order and memory; `simulate` finds deadlocks.

    - Every stage runs every microbatch forward once and backward once, as B or as I and W, on the
      rank that the layout names.
      So every message has one sender and one receiver; `order_messages` gives their common order.
    - On its rank F comes before B or I, and I before W.
    - No rank holds more activations than the variant's bound.

    Raises:
        PlanError: the first rule that is broken, with the stage, the microbatch and the rank.
    """
    if len(orders.kind) != layout.ranks:
        raise PlanError(f"a plan for {layout.ranks} ranks has orders for {len(orders.kind)}")
    f_at, b_at, w_at = (_steps_of(layout, orders, what) for what in ("F", "B", "W"))
    for name, early, late in (("F", f_at, b_at), ("I", b_at, w_at)):
        wrong = np.argwhere(late <= early) if name == "F" else np.argwhere(late < early)
        if wrong.size:
            stage, microbatch = map(int, wrong[0])
            raise PlanError(
                f"stage {stage}, microbatch {microbatch}: {name} must come before "
                f"{'B or I' if name == 'F' else 'W'} on rank {_rank(layout, stage, microbatch)}"
            )
    for rank, held in enumerate(in_flight(orders)):
        if held > layout.most_in_flight(rank):
            raise PlanError(
                f"rank {rank} holds the activations of {held} chunks at once; {layout.variant} "
                f"allows {layout.most_in_flight(rank)}"
            )


def _steps_of(layout: Layout, orders: Orders, what: str) -> np.ndarray:
    """At which step of its rank each (stage, microbatch) runs F, its input's gradient, or W."""
    parts = {"F": (F, FB), "B": (B, I, FB), "W": (B, W, FB)}[what]
    rank, step = np.nonzero(np.isin(orders.kind, parts))
    side = "f" if what == "F" else "b"
    stage = getattr(orders, f"{side}_stage")[rank, step]
    microbatch = getattr(orders, f"{side}_microbatch")[rank, step]
    label = {"F": "F", "B": "B or I", "W": "B or W"}[what]
    outside = (stage < 0) | (stage >= layout.stages) | (microbatch < 0)
    outside |= microbatch >= layout.microbatches
    if outside.any():
        i = int(outside.argmax())
        raise PlanError(
            f"rank {rank[i]}: stage {stage[i]}, microbatch {microbatch[i]} does not exist among "
            f"{layout.stages} stages and {layout.microbatches} microbatches"
        )
    counts = np.zeros((layout.stages, layout.microbatches), dtype=np.int32)
    np.add.at(counts, (stage, microbatch), 1)
    if (counts != 1).any():
        s, m = map(int, np.argwhere(counts != 1)[0])
        raise PlanError(
            f"stage {s}, microbatch {m}: {label} runs {counts[s, m]} times, must run once, on "
            f"rank {_rank(layout, s, m)}"
        )
    misplaced = layout.rank_of(stage, microbatch) != rank
    if misplaced.any():
        i = int(misplaced.argmax())
        raise PlanError(
            f"stage {stage[i]}, microbatch {microbatch[i]}: {label} is on rank {rank[i]}, must be "
            f"on rank {_rank(layout, stage[i], microbatch[i])}"
        )
    at = np.empty_like(counts)
    at[stage, microbatch] = step
    return at


def _rank(layout: Layout, stage: int, microbatch: int) -> int:
    return int(layout.rank_of(stage, microbatch))
