"""`OpPlan`: in which order the ops of each kind of action run, and what that makes it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.actions import KINDS
from mhc_compile.scheduler.costs import Costs
from mhc_compile.scheduler.op_costs import OpCosts
from mhc_compile.scheduler.plot_ops import plot_ops
from mhc_compile.scheduler.run_ops import OpProblem, OpRun
from mhc_compile.scheduler.search_order import (
    Order,
    end_of_work,
    lower_bounds,
    plain_order,
    run_order,
    search_order,
)
from mhc_compile.scheduler.stage_ops import build_ops

ALONE_TRIES = 300  # of actions that are no pair: their ops have little to choose from


@dataclass(frozen=True)
class OpPlan:
    """The ops of every kind of action in order; the "FB" is the overlapped pair.

    Attributes:
        costs: of the ops.
        high_priority: whether F_post,res of MLP sublayers is on the hp server.
        orders: of each kind, in the order of `KINDS`.

    Raises:
        PlanError: an order lacks ops or blocks.
    """

    costs: OpCosts
    high_priority: bool
    orders: tuple[Order, ...]

    def __post_init__(self) -> None:
        if len(self.orders) != len(KINDS):
            raise PlanError(f"an op plan needs the orders of {', '.join(KINDS)}")
        self.runs  # noqa: B018  # checks the orders

    @cached_property
    def problems(self) -> dict[str, OpProblem]:
        """The ops of each kind of action and how their servers work."""
        return {kind: _problem(self.costs, kind, self.high_priority) for kind in KINDS}

    @cached_property
    def runs(self) -> dict[str, OpRun]:
        """When the ops of each kind of action run, from the action's start."""
        runs = {}
        for kind, order in zip(KINDS, self.orders, strict=True):
            problem = self.problems[kind]
            if sorted(order) != list(range(len(problem.ops))):
                raise PlanError(f"the order of {kind} must name each of its ops once")
            run = run_order(problem, order)
            if run is None:
                raise PlanError(f"the order of {kind} blocks: an op waits for one behind it")
            runs[kind] = run
        return runs

    @property
    def makespan(self) -> float:
        """The pair's, sends included, in us."""
        return self.runs["FB"].makespan

    @property
    def bounds(self) -> dict[str, float]:
        """What no order of the pair can beat, see `lower_bounds`."""
        return lower_bounds(self.problems["FB"])

    @cached_property
    def action_costs(self) -> Costs:
        """Durations of the actions: up to their last op that is no send.

        Messages are transfers; a pair's outputs are ready when its run sends them, and inputs are
        needed when the first op behind their receive begins.
        """
        work = {kind: end_of_work(self.problems[kind], run) for kind, run in self.runs.items()}
        pair, index = self.runs["FB"], self.problems["FB"].index
        return Costs(
            **work, transfer=self.costs.send,
            f_ready=pair.start[index["F.send"]], b_ready=pair.start[index["B.send"]],
            f_needed=self._needed("FB", "F"), b_needed=self._needed("FB", "B"),
            g_needed=min(self._needed("B", "B"), self._needed("I", "B")),
        )  # fmt: skip

    def _needed(self, kind: str, chunk: str) -> float:
        """When an action first reads what a chunk received, were its message there at once."""
        problem, run = self.problems[kind], self.runs[kind]
        readers = problem.readers[problem.index[f"{chunk}.recv"]]
        return max(0.0, min(run.start[op] for op in readers) - self.costs.recv)

    @cached_property
    def comparisons(self) -> dict[str, float]:
        """Makespans of the pair under other rules, each searched alike, in us."""
        costs, runs = self.costs, self.runs
        one_stream = _problem(costs, "FB", False)
        persistent = _problem(replace(costs, attention_preemptible=False), "FB", True)
        plain = run_order(one_stream, plain_order(one_stream))
        assert plain is not None
        return {
            "this plan": self.makespan,
            "plain order, one compute stream": plain.makespan,
            "forward, then backward": runs["F"].makespan + runs["B"].makespan,
            "without high priority": search_order(one_stream)[1].makespan,
            "with it, attention persistent": search_order(persistent)[1].makespan,
            "sends after the pair": end_of_work(self.problems["FB"], runs["FB"]) + 2 * costs.send,
        }

    def plot(self, path: str | Path) -> None:
        """Saves a picture of the pair as the path's ending says, see `plot_ops`."""
        plot_ops(self, path)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; orders as the ops' ids."""
        ids = {
            kind: [self.problems[kind].ops[i].id for i in order]
            for kind, order in zip(KINDS, self.orders, strict=True)
        }
        return {
            "costs": self.costs.to_dict(), "high_priority": self.high_priority, "orders": ids,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpPlan:
        """Reads what `to_dict` wrote."""
        costs, high = OpCosts.from_dict(data["costs"]), data["high_priority"]
        orders = []
        for kind in KINDS:
            index = _problem(costs, kind, high).index
            orders.append(tuple(index[op] for op in data["orders"][kind]))
        return cls(costs, high, tuple(orders))


def plan_ops(costs: OpCosts, high_priority: bool | None = None) -> OpPlan:
    """Searches the order of every kind of action.

    The plain order, with everything on one compute stream, is among the candidates.

    Args:
        costs: of the ops.
        high_priority: whether F_post,res of MLP sublayers gets the hp server (Sec. 4.3.3); None
            gives it that unless the pair is faster without.
    """
    choices = (True, False) if high_priority is None else (high_priority,)
    pairs = {high: search_order(_problem(costs, "FB", high)) for high in choices}
    least = min(run.makespan for _, run in pairs.values()) * (1 + 1e-9)
    high = next(high for high, (_, run) in pairs.items() if run.makespan <= least)
    orders = [
        pairs[high][0] if kind == "FB"
        else search_order(_problem(costs, kind, high), ALONE_TRIES)[0]
        for kind in KINDS
    ]  # fmt: skip
    return OpPlan(costs, high, tuple(orders))


def _problem(costs: OpCosts, kind: str, high_priority: bool) -> OpProblem:
    ops = build_ops(costs, kind, high_priority=high_priority)
    return OpProblem(ops, costs.quantum, costs.contention)
