"""`plan_pipeline`: from P and M to a checked plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhc_compile.scheduler.costs import Costs, read_costs
from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.op_costs import OpCosts, is_op_table
from mhc_compile.scheduler.op_plan import plan_ops
from mhc_compile.scheduler.orders import order_actions
from mhc_compile.scheduler.overlap_plan import OverlapPlan


def plan_pipeline(
    ranks: int,
    microbatches: int,
    *,
    variant: str = "dualpipev",
    streams: int = 4,
    costs: Mapping[str, Any] | Costs | OpCosts | None = None,
) -> OverlapPlan:
    """Plans one training step of a pipeline: what each rank runs, in which order, and when.

    Args:
        ranks: P, the pipeline's ranks.
        microbatches: M, of both directions together.
        variant: "1f1b" or "zb1p" (P stages); "dualpipe" (P stages, each on two ranks, microbatches
            from both ends; P and M even, M >= 2P); "dualpipev" (2P stages in a V, M >= 2P).
        streams: n, the streams at the stages' boundaries.
        costs: durations of the actions in any one unit: F, B, I, W, and FB for an overlapped
            pair; default F = 1, B = 2, I = 1, W = 1, FB = 3. `latency`, what a message to another
            rank takes, and `transfer`, how long it keeps the link busy, are 0 unless given. Or
            durations of ops in us, an `OpCosts` or a dict with its names: then the orders of the
            ops within the actions are searched, and the actions cost what comes out.

    Returns:
        The plan, checked: counts, order, matched messages, no deadlock, activations held.

    Raises:
        MHCError: P and M break the variant's rule, or a cost makes no sense.

    Example:
        >>> plan = plan_pipeline(8, 20, variant="dualpipe")
        >>> plan.makespan, plan.bubble, plan.peak_in_flight[0]
        (66.0, 6.0, 9)
    """
    layout = Layout(variant, ranks, microbatches)
    if isinstance(costs, Mapping) and is_op_table(costs):
        costs = OpCosts.from_dict(costs)
    ops = plan_ops(costs) if isinstance(costs, OpCosts) else None
    action_costs = ops.action_costs if ops else read_costs(costs)  # type: ignore[arg-type]
    return OverlapPlan(layout, streams, action_costs, order_actions(layout), ops)
