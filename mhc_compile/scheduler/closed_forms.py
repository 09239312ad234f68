"""Makespans and bubbles in closed form, where they hold; the simulation is what a plan reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mhc_compile.scheduler.costs import Costs
from mhc_compile.scheduler.layout import Layout


@dataclass(frozen=True)
class ClosedForm:
    """What a formula says of a variant.

    Attributes:
        makespan, bubble: values, in the costs' unit; the bubble is the idle time of a rank next
            to the turn-around, where the ranks differ.
        formula: the bubble's, with B = I + W the whole backward.
        holds: whether the costs and M meet the conditions below.
        conditions: under which the formula is exact.
    """

    makespan: float
    bubble: float
    formula: str
    holds: bool
    conditions: str


def closed_form(layout: Layout, costs: Costs) -> ClosedForm:
    """Returns the formulae of a variant: 1F1B's, ZB-H1's, or DualPipe's table.

    Checked against simulations of random costs, see tests/scheduler/test_closed_forms.py.
    """
    P, M, c = layout.ranks, layout.microbatches, costs  # noqa: N806
    split = math.isclose(c.B, c.I + c.W)
    instant = c.latency == c.transfer == 0 and c.f_ready == c.b_ready == c.FB
    instant = instant and c.f_needed == c.b_needed == c.g_needed == 0
    if layout.variant == "1f1b":
        bubble = (P - 1) * (c.F + c.B)
        return ClosedForm(
            M * (c.F + c.B) + bubble, bubble, "(P-1)(F+B)", instant, "no latency or transfer"
        )
    if layout.variant == "zb1p":
        bubble = (P - 1) * (c.F + c.B - 2 * c.W)
        return ClosedForm(
            M * (c.F + c.B) + bubble, bubble, "(P-1)(F+B-2W)",
            instant and split and M >= P and c.W <= min(c.I, c.F),
            "no latency or transfer, B = I + W, W <= F, W <= I, M >= P",
        )  # fmt: skip
    if layout.variant == "dualpipev":
        P, M = 2 * P, 2 * M  # the same orders as DualPipe's on twice the ranks  # noqa: N806
    bubble = (P // 2 - 1) * (c.FB + c.B - 3 * c.W)
    return ClosedForm(
        (P + 1) * (c.F + c.B) + (M - P - 1) * c.FB + bubble, bubble,
        "(P/2-1)(FB+B-3W)" if layout.variant == "dualpipe" else "(P-1)(FB+B-3W)",
        instant and split and math.isclose(c.I, c.F) and c.W <= c.F,
        "no latency or transfer, B = I + W, I = F, W <= F",
    )  # fmt: skip
