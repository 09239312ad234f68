"""Ops of a pair: what waits for what, preemption and contention by hand, legal runs, the search."""

import dataclasses
import itertools
import json
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mhc_compile as mc
from mhc_compile.scheduler.actions import KINDS
from mhc_compile.scheduler.op_costs import OpCosts, model_op_costs
from mhc_compile.scheduler.op_plan import OpPlan, plan_ops
from mhc_compile.scheduler.run_ops import OpProblem, run_ops, topological
from mhc_compile.scheduler.search_order import (
    lower_bounds,
    plain_order,
    run_order,
    search_order,
)
from mhc_compile.scheduler.stage_ops import Op, build_ops
from mhc_compile.scheduler.write_plan import write_plan

LARGE = "attention_F attention_B attention_W mlp_F mlp_B mlp_W dispatch combine send".split()
SMALL = "coefficients_F coefficients_B pre_F pre_B post_res_F post_res_B".split()


def draw_costs(rng, **fixed):
    """Invented whole durations: large ops 1 to 20, small ones 1 to 3."""
    table = {name: rng.randint(1, 20) for name in LARGE} | {n: rng.randint(1, 3) for n in SMALL}
    table |= {"recompute": rng.randint(1, 6), "recv": rng.choice([0, 0, 5])}
    return OpCosts(**table | {"quantum": rng.choice([1, 2])} | fixed)


def problem_of(costs, kind="FB", high_priority=True):
    return OpProblem(
        build_ops(costs, kind, high_priority=high_priority), costs.quantum, costs.contention
    )


def test_what_a_pair_is_made_of():
    costs = draw_costs(random.Random(0), layers=4, recompute_blocks=2)
    problem = problem_of(costs)
    ops = {op.id: op for op in problem.ops}
    assert len(problem_of(draw_costs(random.Random(0))).ops) == 27
    assert {op.server for op in ops.values()} == {"compute", "hp", "a2a", "pp_out", "pp_in"}
    high = [name for name, op in ops.items() if op.server == "hp"]
    assert sorted(high) == [f"F{layer}.mlp_post_res" for layer in range(4)]

    def before(name):
        return {problem.ops[i].id for i in problem.ancestors[problem.index[name]]}

    # a block's recompute needs no receive, only that the block above it is through
    assert before("B3.recompute") == set() and ops["B3.recompute"].duration == 2 * costs.recompute
    assert "B2.attention_coefficients" in before("B1.recompute") and "B2.recompute" not in ops
    # a chunk's send waits for that chunk only, and for no weight gradient
    assert all(name[0] == "F" for name in before("F.send"))
    assert all(name[0] == "B" and not name.endswith("_W") for name in before("B.send"))
    assert "B0.attention_coefficients" in before("B.send") and "F3.mlp_post_res" in before("F.send")
    for kind, without in (("I", "_W"), ("W", "send"), ("F", "recompute")):
        names = [op.id for op in problem_of(costs, kind).ops]
        assert names and not any(name.endswith(without) for name in names)
    assert all(op.id.endswith("_W") for op in problem_of(costs, "W").ops)


def op(name, server, duration, *deps, preemptible=True):
    return Op(name, "F", server, deps, duration, preemptible)


@pytest.mark.parametrize(
    "quantum, preemptible, contention, hp, end",
    [
        (4, True, 0, (8, 10), 12),  # next multiple of 4 after 5
        (0, True, 0, (5, 7), 12),
        (5, True, 0, (5, 7), 12),
        (4, False, 0, (10, 12), 10),
        (4, True, 1, (6.5, 8.5), 14.5),  # 5 us at half the speed do 2.5; 1.5 more to the quantum
    ],
)
def test_high_priority_cuts_in(quantum, preemptible, contention, hp, end):
    ops = (
        op("long", "compute", 10, preemptible=preemptible),
        op("data", "a2a", 5),
        op("urgent", "hp", 2, "data"),
    )
    run = run_ops(OpProblem(ops, quantum, contention), [0, 1, 2], strict=True)
    assert (run.start[2], run.end[2]) == hp and run.end[0] == end
    assert sum(b - a for i, a, b in run.pieces if i == 2) == 2
    assert len([piece for piece in run.pieces if piece[0] == 0]) == (2 if preemptible else 1)


def test_orders_that_block():
    ops = (op("a", "compute", 1), op("b", "a2a", 1, "a"), op("c", "compute", 1, "b"))
    problem = OpProblem(ops)
    assert run_order(problem, (0, 1, 2)).makespan == 3
    assert run_order(problem, (2, 1, 0)) is None
    assert run_ops(problem, [2, 1, 0], strict=False).makespan == 3


@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([0, 0.3]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_runs_are_legal(seed, layers, contention, strict):
    rng = random.Random(seed)
    problem = problem_of(draw_costs(rng, layers=layers, contention=contention))
    priority = [rng.random() for _ in problem.ops]
    if strict:
        position = {i: p for p, i in enumerate(topological(problem))}
        priority = [position[i] for i in range(len(problem.ops))]
    run = run_ops(problem, priority, strict=strict)
    for i, deps in enumerate(problem.deps):
        assert all(run.end[dep] <= run.start[i] for dep in deps)
        pieces = [(start, end) for j, start, end in run.pieces if j == i]
        worked = sum(end - start for start, end in pieces)
        duration = problem.ops[i].duration
        assert duration - 1e-9 <= worked <= duration * (1 + contention) + 1e-9
        assert len(pieces) <= 1 or problem.ops[i].server == "compute"
    for servers in (("compute", "hp"), ("a2a",), ("pp_out",), ("pp_in",)):
        spans = sorted((s, e) for i, s, e in run.pieces if problem.ops[i].server in servers)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    assert all(run.makespan >= bound - 1e-9 for bound in lower_bounds(problem).values())


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([0, 0.2]))
@settings(max_examples=12, deadline=None)
def test_never_worse_than_the_plain_order(seed, high_priority, contention):
    problem = problem_of(
        draw_costs(random.Random(seed), contention=contention), "FB", high_priority
    )
    order, run = search_order(problem, tries=60)
    assert run.makespan <= run_order(problem, plain_order(problem)).makespan
    assert run == run_order(problem, order) and search_order(problem, tries=60) == (order, run)
    assert run.makespan >= max(lower_bounds(problem).values()) - 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_against_every_order(seed):
    """Seven ops on three servers: all orders of each server."""
    rng = random.Random(seed)
    ops = []
    for i in range(7):
        deps = [o.id for o in ops if rng.random() < 0.3]
        server = rng.choice(["compute", "compute", "a2a", "pp_out"])
        ops.append(op(f"{i}", server, rng.randint(1, 9), *deps))
    problem = OpProblem(tuple(ops))
    runs = (run_order(problem, order) for order in itertools.permutations(range(7)))
    best = min(run.makespan for run in runs if run is not None)
    assert search_order(problem)[1].makespan == best


def test_against_the_exact_solver():
    """Sixteen pairs of invented durations: never below the optimum, nearly always at it."""
    pytest.importorskip("ortools.sat.python.cp_model")
    from exact_makespan import least_makespan

    gaps = []
    for seed in range(8):
        costs = draw_costs(random.Random(seed))
        for high_priority in (False, True):
            problem = problem_of(costs, "FB", high_priority)
            found = search_order(problem)[1].makespan
            exact, proven = least_makespan(problem, hint=int(found))
            assert proven and found >= exact >= max(lower_bounds(problem).values())
            gaps.append(found / exact - 1)
    assert max(gaps) <= 0.04 and sum(gap == 0 for gap in gaps) >= 13


def test_plan_of_ops():
    costs = model_op_costs(hidden=7168, tokens=4096)
    plan = mc.plan_pipeline(8, 20, costs=costs)
    assert plan == mc.plan_pipeline(8, 20, costs=costs.to_dict())
    assert mc.OverlapPlan.from_json(plan.to_json()) == plan
    others = plan.ops.comparisons
    for name in ("plain order, one compute stream", "without high priority"):
        assert plan.ops.makespan <= others[name]
    assert plan.ops.makespan >= max(plan.ops.bounds.values()) * (1 - 1e-9)
    late = {kind: getattr(plan.costs, kind) for kind in KINDS} | {"transfer": plan.costs.transfer}
    assert plan.makespan < plan.simulate(late).makespan  # an early send is worth something
    assert plan.costs.f_ready < plan.costs.FB and not plan.closed_form.holds
    # A backward alone begins with its recompute, which needs no message.
    assert plan.costs.g_needed == plan.ops.costs.recompute * plan.ops.costs.layers > 0
    text = str(plan)
    assert "provenance" in text and "modelled" in text and "critical path" in text


def test_pictures_of_a_pair(tmp_path, monkeypatch):
    plan = mc.plan_pipeline(2, 4, costs=model_op_costs(hidden=7168, tokens=4096))
    files, left_out = write_plan(plan, tmp_path)
    assert {"pair.svg", "pair.png"} <= {file.name for file in files} and not left_out
    assert (tmp_path / "pair.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(mc.MHCError, match="pictures need matplotlib"):
        plan.ops.plot(tmp_path / "no.png")
    assert set(write_plan(plan, tmp_path)[1]) == {"plan.svg", "plan.png", "pair.svg", "pair.png"}


def test_more_streams_cost_more():
    one, four = (model_op_costs(hidden=7168, tokens=4096, streams=n) for n in (1, 4))
    assert four.send == 4 * one.send == pytest.approx(4096 * 4 * 7168 * 2 / 40e3)
    assert four.attention_F == one.attention_F and four.dispatch == one.dispatch
    assert plan_ops(four).makespan > plan_ops(one).makespan


@pytest.mark.parametrize("link_gbs", [40, 0.5])  # at 0.5 sends wait for each other
def test_chrome_trace_has_a_track_per_server(link_gbs):
    costs = model_op_costs(hidden=1024, tokens=512, layers=2, link_gbs=link_gbs)
    plan = mc.plan_pipeline(2, 4, costs=costs)
    events = json.loads(plan.to_chrome_trace())["traceEvents"]
    tracks = {(e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name"}
    assert tracks == set(itertools.product(range(2), range(1, 6)))
    for track in tracks:
        spans = [
            (round(e["ts"] * 1000), round((e["ts"] + e["dur"]) * 1000))
            for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == track
        ]  # fmt: skip
        open_ends = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            open_ends = [other for other in open_ends if other > start]
            assert all(end <= other for other in open_ends), track  # inside its action, or after it
            open_ends.append(end)
        assert spans or track[1] == 5  # receives take no time here


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mlp_F": -1}, "cost mlp_F must be a finite number"),
        ({"send": float("nan")}, "cost send"),
        ({"layers": 0}, "layers must be an integer of at least 1"),
        ({"layers": 4, "recompute_blocks": 3}, "must divide the stage's 4 layers, got 3"),
        ({"attention_preemptible": 1}, "attention_preemptible must be a bool"),
        ({"mlp_G": 1}, "op costs have no 'mlp_G'"),
        ({"F": 1}, "op costs have no 'F'"),
        ({"mlp_W": None}, "cost mlp_W"),
    ],
)
def test_refused_tables(change, message):
    table = draw_costs(random.Random(0)).to_dict() | change
    with pytest.raises(mc.MHCError, match=message):
        mc.plan_pipeline(2, 4, costs=table)
    del table["mlp_B"]
    with pytest.raises(mc.MHCError):
        mc.plan_pipeline(2, 4, costs=table)
    with pytest.raises(mc.MHCError, match="link_gbs must be greater than 0"):
        model_op_costs(hidden=8, tokens=8, link_gbs=0)
    with pytest.raises(mc.MHCError, match="hidden must be an integer"):
        model_op_costs(hidden=0, tokens=8)


def test_refused_op_plans():
    plan = plan_ops(draw_costs(random.Random(0)))
    pair = KINDS.index("FB")
    for order, message in (
        (plan.orders[pair][::-1], "FB blocks"),
        (plan.orders[pair][:-1], "each of its ops once"),
    ):
        with pytest.raises(mc.MHCError, match=message):
            OpPlan(plan.costs, True, (*plan.orders[:pair], order))
    with pytest.raises(mc.MHCError, match="needs the orders"):
        OpPlan(plan.costs, True, plan.orders[1:])
    whole = mc.plan_pipeline(2, 4, costs=plan.costs)
    with pytest.raises(mc.MHCError, match="not those of the plan's ops"):
        dataclasses.replace(whole, costs=mc.plan_pipeline(2, 4).costs)
    data = json.loads(whole.to_json())
    data["ops"]["orders"]["FB"][0] = "F.nothing"
    with pytest.raises(mc.MHCError, match="damaged plan"):
        mc.OverlapPlan.from_json(json.dumps(data))
