"""`OverlapPlan`: the orders of a pipeline's ranks, their costs, and views of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx

from mhc_compile.errors import ConfigError, PlanError
from mhc_compile.scheduler.actions import Action
from mhc_compile.scheduler.check_orders import check_orders
from mhc_compile.scheduler.chrome_trace import trace_plan
from mhc_compile.scheduler.closed_forms import ClosedForm, closed_form
from mhc_compile.scheduler.costs import Costs, read_costs
from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.messages import Message, order_messages
from mhc_compile.scheduler.op_plan import OpPlan
from mhc_compile.scheduler.orders import Orders
from mhc_compile.scheduler.plan_tables import summarize, write_csv
from mhc_compile.scheduler.plot_plan import plot_plan
from mhc_compile.scheduler.simulate import Timeline, in_flight, simulate
from mhc_compile.scheduler.task_graph import build_task_graph

PLAN_VERSION = 1


@dataclass(frozen=True)
class OverlapPlan:
    """A checked plan; two are equal if their orders and costs are.

    Attributes:
        layout: variant, ranks P, microbatches M, and which stage is where.
        streams: n, the streams at a stage's boundary.
        costs: of the actions.
        orders: every rank's actions, as arrays.
        ops: the orders of the ops within actions, if the costs are from there.

    Raises:
        PlanError: the orders break a rule of `check_orders`, or deadlock.
    """

    layout: Layout
    streams: int
    costs: Costs
    orders: Orders = field(repr=False)
    ops: OpPlan | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.streams, bool) or not isinstance(self.streams, int) or self.streams < 1:
            raise ConfigError(f"streams must be an integer of at least 1, got {self.streams!r}")
        if self.ops is not None and self.ops.action_costs != self.costs:
            raise PlanError("the costs of the actions are not those of the plan's ops")
        check_orders(self.layout, self.orders)
        self.timeline  # noqa: B018  # finds deadlocks

    @property
    def variant(self) -> str:
        """The schedule's name, one of `VARIANTS`."""
        return self.layout.variant

    @property
    def ranks(self) -> int:
        """P."""
        return self.layout.ranks

    @property
    def microbatches(self) -> int:
        """M, of both directions together."""
        return self.layout.microbatches

    @cached_property
    def actions(self) -> list[list[Action]]:
        """Every rank's actions in order."""
        return self.orders.actions()

    @cached_property
    def timeline(self) -> Timeline:
        """When each action runs under the plan's costs."""
        return self.simulate()

    @property
    def makespan(self) -> float:
        """From the first action's start to the last one's end, in the costs' unit."""
        return self.timeline.makespan

    @property
    def bubble(self) -> float:
        """The idle time of the rank that idles longest, in the costs' unit."""
        return self.timeline.bubble

    @cached_property
    def peak_in_flight(self) -> list[int]:
        """For each rank, the most chunks whose activations it holds at once."""
        return in_flight(self.orders)

    @property
    def closed_form(self) -> ClosedForm:
        """What the literature's formula says of this plan, and whether it holds."""
        return closed_form(self.layout, self.costs)

    def simulate(
        self, costs: Mapping[str, Any] | Costs | None = None, *, latency: float | None = None
    ) -> Timeline:
        """Runs the plan's orders in time.

        Args:
            costs: as for `plan_pipeline`; None takes the plan's.
            latency: what a message to another rank takes, in the costs' unit.

        Returns:
            When each action starts and ends, with `makespan`, `bubble` and each rank's `idle`.
        """
        return simulate(
            self.layout, self.orders, read_costs(self.costs if costs is None else costs, latency)
        )

    def messages(self) -> list[Message]:
        """What ranks send each other, in the order in which both sides post it."""
        return order_messages(self.layout, self.orders, self.costs.b_ready < self.costs.f_ready)

    def task_graph(self) -> nx.DiGraph:
        """The plan as a networkx graph of actions, see `build_task_graph`."""
        return build_task_graph(self.layout, self.orders, self.costs)

    def with_costs(self, costs: Mapping[str, Any] | Costs) -> OverlapPlan:
        """The same orders under other costs of the actions."""
        return replace(self, costs=read_costs(costs), ops=None)

    def actions_as_text(self) -> list[list[str]]:
        """Every rank's actions as torch's runtime writes them, e.g. "(0F3;3B1)OVERLAP_F_B"."""
        return [[str(action) for action in rank] for rank in self.actions]

    def __str__(self) -> str:
        return summarize(self)

    def to_csv(self, *, receives: bool = False) -> str:
        """CSV for torch's pipelining runtime, a row per rank, see `write_csv`."""
        return write_csv(self, receives)

    def to_chrome_trace(self, unit_us: float = 1.0) -> str:
        """Chrome-trace JSON for Perfetto, see `trace_plan`."""
        return trace_plan(self, unit_us)

    def plot(self, path: str | Path) -> None:
        """Saves a Gantt picture as the path's ending says (.svg, .png), see `plot_plan`."""
        plot_plan(self, path)

    def to_json(self) -> str:
        """Canonical JSON: equal plans have equal texts."""
        data = {
            "version": PLAN_VERSION,
            **asdict(self.layout),
            "streams": self.streams,
            "costs": asdict(self.costs),
            "ops": None if self.ops is None else self.ops.to_dict(),
            "actions": self.actions_as_text(),
            "makespan": self.makespan,
            "bubble": self.bubble,
            "peak_in_flight": self.peak_in_flight,
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> OverlapPlan:
        """Reads `to_json`'s text and checks it as any plan; its metrics must be the actions'.

        Raises:
            PlanError: the text is damaged or of another version, or the plan breaks a rule.
        """
        try:
            data = json.loads(text)
            version = data["version"]
        except (ValueError, TypeError, KeyError):
            raise PlanError("not a plan's JSON; OverlapPlan.to_json() writes it") from None
        if version != PLAN_VERSION:
            raise PlanError(f"plan version must be {PLAN_VERSION}, got {version!r}")
        try:
            layout = Layout(data["variant"], data["ranks"], data["microbatches"])
            actions = [[Action.parse(cell) for cell in rank] for rank in data["actions"]]
            streams, costs = data["streams"], read_costs(data["costs"])
            ops = None if data["ops"] is None else OpPlan.from_dict(data["ops"])
        except (KeyError, TypeError) as error:
            raise PlanError(f"damaged plan: {error!r}; write it anew with to_json()") from None
        plan = cls(layout, streams, costs, Orders.from_actions(actions), ops)
        for name in ("makespan", "bubble", "peak_in_flight"):
            if data.get(name) != getattr(plan, name):
                raise PlanError(
                    f"the plan's {name} {data.get(name)!r} disagrees with its actions, which give "
                    f"{getattr(plan, name)!r}; a plan changed by hand is written anew by to_json()"
                )
        return plan
