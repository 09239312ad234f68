"""The simulation on arrays against one action at a time, with latency, links and early outputs."""

import math
import random

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import run_with_communicators, sizes

import mhc_compile as mc
from mhc_compile.scheduler.costs import Costs
from mhc_compile.scheduler.orders import Orders
from mhc_compile.scheduler.simulate import simulate
from mhc_compile.scheduler.task_graph import build_task_graph, check_task_graph

times = st.integers(0, 6).map(float)


def simulate_slowly(plan, costs):
    """Start and end of every action, from dicts and one rank after another."""
    arrived, link, spans = {}, [0.0] * plan.ranks, [[] for _ in range(plan.ranks)]
    last = plan.layout.stages - 1

    def inputs(part):
        """What other stages make; what the stage itself made is there, as its rank is in order."""
        if part.kind == "F":
            return [("F", part.stage - 1, part.microbatch)] if part.stage else []
        above = part.kind in "BI" and part.stage < last
        return [("B", part.stage + 1, part.microbatch)] if above else []

    def deliver(rank, part, ready):
        kind, reader = ("F", part.stage + 1) if part.kind == "F" else ("B", part.stage - 1)
        if 0 <= reader <= last and plan.layout.rank_of(reader, part.microbatch) != rank:
            link[rank] = max(ready, link[rank]) + costs.transfer
            ready = link[rank] + costs.latency
        arrived[kind, part.stage, part.microbatch] = ready

    def advance(rank):
        action = plan.actions[rank][len(spans[rank])]
        later = {"F": costs.f_needed, "B": costs.b_needed} if action.kind == "FB" else {
            "F": 0.0, "B": costs.g_needed, "I": costs.g_needed
        }  # fmt: skip
        needs = [(key, later[part.kind]) for part in action.parts for key in inputs(part)]
        if not all(key in arrived for key, _ in needs):
            return False
        free = spans[rank][-1][1] if spans[rank] else 0.0
        start = max([free, *(arrived[key] - late for key, late in needs)])
        end = start + getattr(costs, action.kind)
        spans[rank].append((start, end))
        outputs = [(end, part) for part in action.parts if part.kind != "W"]
        if action.kind == "FB":
            outputs = list(
                zip((start + costs.f_ready, start + costs.b_ready), action.parts, strict=True)
            )
        for ready, part in sorted(outputs, key=lambda output: output[0]):
            deliver(rank, part, ready)
        return True

    unfinished = True
    while unfinished:
        for rank, actions in enumerate(plan.actions):
            while len(spans[rank]) < len(actions) and advance(rank):
                pass
        unfinished = any(map(lambda s, a: len(s) < len(a), spans, plan.actions))
    return spans


@given(sizes(), *[times] * 7, *[st.floats(0, 1)] * 5)
@settings(max_examples=150, deadline=None)
def test_against_one_action_at_a_time(
    size, f, b, i, w, fb, latency, transfer, early, late, f_needed, b_needed, g_needed
):
    variant, ranks, microbatches = size
    costs = Costs(
        f, b, i, w, fb, latency, transfer, f_ready=early * fb, b_ready=late * fb,
        f_needed=f_needed * fb, b_needed=b_needed * fb, g_needed=g_needed * min(b, i),
    )  # fmt: skip
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant, costs=costs)
    expected = simulate_slowly(plan, costs)
    for rank, spans in enumerate(expected):
        for step, (start, end) in enumerate(spans):
            assert math.isclose(plan.timeline.start[rank, step], start, abs_tol=1e-9)
            assert math.isclose(plan.timeline.end[rank, step], end, abs_tol=1e-9)
    assert math.isclose(plan.makespan, max(end for spans in expected for _, end in spans))
    assert run_with_communicators(plan)  # also where a pair's backward is sent first


def test_a_busy_link_delays():
    costs = {"F": 1, "B": 2, "I": 1, "W": 1, "transfer": 3}
    plan = mc.plan_pipeline(2, 4, variant="1f1b", costs=costs)
    assert plan.timeline.start[1, :4].tolist() == [4, 5, 7, 8]
    free = plan.simulate({"F": 1, "B": 2, "I": 1, "W": 1, "latency": 3})
    assert free.start[1, 2] == 7 and free.makespan <= plan.makespan


@given(sizes(), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_a_deadlock_is_a_cycle(size, seed):
    """Shuffled orders: the simulation refuses exactly those whose task graph has a cycle."""
    variant, ranks, microbatches = size
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
    rng = random.Random(seed)
    actions = [list(rank) for rank in plan.actions]
    for _ in range(3):
        row = rng.choice(actions)
        row.insert(rng.randrange(len(row)), row.pop(rng.randrange(len(row))))
    orders = Orders.from_actions(actions)
    graph = build_task_graph(plan.layout, orders, plan.costs)
    try:
        timeline = simulate(plan.layout, orders, plan.costs)
    except mc.MHCError as error:
        assert "deadlock" in str(error) and not nx.is_directed_acyclic_graph(graph)
    else:
        check_task_graph(graph)
        assert timeline.makespan >= max(map(sum, durations_of(actions, plan.costs)))


def durations_of(actions, costs):
    return [[getattr(costs, action.kind) for action in rank] for rank in actions]
