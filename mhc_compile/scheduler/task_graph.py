"""The task graph of a plan as a networkx graph: what must come before what, and why."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

from mhc_compile.errors import PlanError
from mhc_compile.scheduler.actions import Action
from mhc_compile.scheduler.costs import Costs
from mhc_compile.scheduler.layout import Layout
from mhc_compile.scheduler.orders import Orders

Node = tuple[int, int]  # (rank, step)


def build_task_graph(layout: Layout, orders: Orders, costs: Costs) -> nx.DiGraph:
    """Returns a node (rank, step) for each action and an edge for each reason to wait.

    Nodes have `action` and `duration`, edges `reason` ("order", "data", "message") and `delay`,
    from the start of the one to the earliest start of the other; that a transfer may have to wait
    for the one before it is left out. About 2 KB per action: for plans
    of up to a million actions.

    Raises:
        PlanError: an input that no action makes.
    """
    graph = nx.DiGraph()
    rows = orders.actions()
    made: dict[tuple[str, int, int], tuple[Node, float]] = {}
    for rank, actions in enumerate(rows):
        for step, action in enumerate(actions):
            node, duration = (rank, step), getattr(costs, action.kind)
            graph.add_node(node, action=action, duration=duration)
            if step:
                graph.add_edge(
                    (rank, step - 1), node, reason="order",
                    delay=graph.nodes[rank, step - 1]["duration"],
                )  # fmt: skip
            for part in action.parts:
                ready = duration
                if action.kind == "FB":
                    ready = costs.f_ready if part.kind == "F" else costs.b_ready
                what = "G" if part.kind in ("B", "I") else part.kind
                made[what, part.stage, part.microbatch] = node, ready
    for rank, actions in enumerate(rows):
        for step, action in enumerate(actions):
            for key in _inputs(layout, action):
                if key not in made:
                    raise PlanError(f"rank {rank}, {action}: nothing makes its input {key}")
                source, ready = made[key]
                far, needed = source[0] != rank, costs.needed(action.kind, key[0])
                if far or not graph.has_edge(source, (rank, step)):
                    graph.add_edge(
                        source, (rank, step), reason="message" if far else "data",
                        delay=ready + (costs.latency + costs.transfer - needed) * far,
                    )  # fmt: skip
    return graph


def check_task_graph(graph: nx.DiGraph) -> None:
    """Checks that the graph has no cycle, that is, that in-order execution cannot deadlock.

    Raises:
        PlanError: it has one, with its actions.
    """
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [source for source, _ in nx.find_cycle(graph)]
        steps = " -> ".join(f"rank {node[0]}: {graph.nodes[node]['action']}" for node in cycle)
        raise PlanError(f"the orders deadlock, each waits for the one before: {steps}")


def critical_path(graph: nx.DiGraph) -> list[Node]:
    """The actions that decide the makespan, first to last."""
    start: dict[Node, float] = {}
    before: dict[Node, Node | None] = {}
    for node in nx.topological_sort(graph):
        start[node], before[node] = 0.0, None
        for source, _, edge in graph.in_edges(node, data=True):
            if start[source] + edge["delay"] >= start[node]:
                start[node], before[node] = start[source] + edge["delay"], source
    last = max(graph, key=lambda node: start[node] + graph.nodes[node]["duration"], default=None)
    path = []
    while last is not None:
        path.append(last)
        last = before[last]
    return path[::-1]


def _inputs(layout: Layout, action: Action) -> Iterator[tuple[str, int, int]]:
    """What an action reads: (F output, G input's gradient; stage; microbatch)."""
    for kind, stage, microbatch, _ in action.parts:
        if kind == "F" and stage > 0:
            yield "F", stage - 1, microbatch
        if kind in ("B", "I"):
            yield "F", stage, microbatch
            if stage < layout.stages - 1:
                yield "G", stage + 1, microbatch
        if kind == "W":
            yield "G", stage, microbatch
