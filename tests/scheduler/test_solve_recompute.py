"""`solve_recompute` against every way to cut, its pipeline, its units, and its time."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
import sympy
from brute_force import Instance, best, compositions, paper, timeline
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.errors import MemoryBudgetError
from mhc_compile.scheduler import solve_recompute
from mhc_compile.scheduler.least_cost import (
    least_cost,
    solve_budget,
    solve_equal_sublayers,
    solve_stage,
)
from mhc_compile.scheduler.objectives import paper_model
from mhc_compile.scheduler.stages import read_problem, stage_lengths


def solve(stage: Instance, objective: str, **kwargs):
    return solve_recompute(len(stage.T), stage.X, objective=objective, **stage.arguments, **kwargs)


@st.composite
def instances(draw, most=9):
    layers = draw(st.integers(1, most))
    high = draw(st.sampled_from([2, 6, 50]))
    values = st.lists(st.integers(1, high), min_size=layers, max_size=layers)
    kept = st.lists(st.integers(0, draw(st.sampled_from([0, 3, 40]))), min_size=layers,
                    max_size=layers)  # fmt: skip
    m, grads, J = draw(st.sampled_from([1, 4])), (), draw(st.sampled_from([0, 30]))
    if m == 1:
        sizes = st.integers(0, draw(st.sampled_from([0, 4, 60])))
        grads = tuple(draw(st.lists(sizes, min_size=layers, max_size=layers)))
    return Instance(
        draw(st.sampled_from([1, 2, 4, 8])), tuple(draw(values)), tuple(draw(kept)), m,
        draw(st.sampled_from([0, 5, 60])), grads, J,
    )  # fmt: skip


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_equation_20(n, m):
    for layers in range(1, 129):
        costs = {r: m * n * math.ceil(layers / r) + (n + 2) * r for r in range(1, layers + 1)}
        plan = solve_recompute(layers, n, in_flight=m)
        assert plan.cost == min(costs.values())
        assert plan.ties == tuple(r for r in costs if costs[r] == plan.cost)
        assert plan.block_size == plan.ties[0] == max(plan.block_sizes)
        assert sum(plan.block_sizes) == layers
        assert len(plan.block_sizes) == math.ceil(layers / plan.block_size)


def test_rounding_is_not_the_integer_optimum():
    plans = {layers: solve_recompute(layers, 4) for layers in range(1, 129)}
    rounded = {layers: max(1, round(math.sqrt(4 * layers / 6))) for layers in plans}
    costs = {layers: 4 * math.ceil(layers / r) + 6 * r for layers, r in rounded.items()}
    assert sum(costs[layers] > plan.cost for layers, plan in plans.items()) == 46
    assert sum(len(plan.ties) > 1 for plan in plans.values()) == 22
    assert (rounded[9], costs[9], plans[9].block_size, plans[9].cost) == (2, 32, 3, 30)
    assert plans[36].ties == (4, 6) and plans[64].ties == (6, 8)


def test_equal_sublayers_by_both_ways():
    for layers in (*range(1, 60), 997):
        stage = read_problem(layers, 4, in_flight=3).stages[0]
        sizes = solve_equal_sublayers(stage).sizes
        assert least_cost(paper_model(stage)) == 12 * len(sizes) + 6 * max(sizes)


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from(["paper", "timeline"]))
def test_unequal_sublayers(stage, objective):
    plan = solve(stage, objective)
    assert (plan.cost, plan.ties, plan.block_sizes) == best(stage, objective)
    assert plan.block_size == max(plan.block_sizes) and plan.block_size in plan.ties
    assert plan.peak == timeline(stage, plan.block_sizes)


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from([0.8, 1, 1, 1.1, 1.5, 4]))
def test_budget(stage, share):
    least = best(stage, "timeline")[0]
    budget = int(share * least)
    expected = best(stage, "budget", budget)
    if expected is None:
        with pytest.raises(MemoryBudgetError, match=f"at least {least}, the least peak") as info:
            solve(stage, "budget", memory_budget=budget)
        assert info.value.minimum == least
    else:
        plan = solve(stage, "budget", memory_budget=budget)
        assert ((plan.cost, plan.peak), plan.ties, plan.block_sizes) == expected
        assert plan.cost == plan.recompute_ops and plan.peak <= budget


@pytest.mark.parametrize("objective", ["paper", "timeline"])
def test_fourteen_sublayers(objective):
    generator = np.random.default_rng(7)
    for m in (1, 4):
        T, A = generator.integers(1, 30, 14), generator.integers(0, 30, 14)
        stage = Instance(4, tuple(T.tolist()), tuple(A.tolist()), m, 9)
        plan = solve(stage, objective)
        assert (plan.cost, plan.ties, plan.block_sizes) == best(stage, objective)


def test_more_memory_never_means_more_recompute():
    least = solve_recompute(30, 4, objective="timeline", kept=5).peak
    plans = [
        solve_recompute(30, 4, objective="budget", kept=5, memory_budget=budget)
        for budget in range(least, 2 * least)
    ]
    assert plans[0].peak == least
    steps = [plan.recompute_ops for plan in plans]
    assert steps == sorted(steps, reverse=True) and steps[-1] == 30  # all blocks of one sublayer


def test_timeline_grows_blocks_toward_the_front():
    plan = solve_recompute(12, 4, objective="timeline", kept=8)
    assert (plan.block_sizes, plan.cost) == ((8, 3, 1), 116)
    assert solve_recompute(12, 4, objective="timeline", kept=5).block_sizes == (7, 3, 1, 1)


@pytest.mark.parametrize("m, size", [(1, 2), (8, 8)])
def test_microbatches_in_flight(m, size):
    plan = solve_recompute(64, 4, stages=8, in_flight=m)
    assert plan.block_size == size
    assert plan.cost == m * 4 * 8 // size + 6 * size
    assert plan.continuous == pytest.approx(math.sqrt(m * 4 * 8 / 6))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stages_are_solved_by_themselves(data):
    layers = data.draw(st.integers(1, 24))
    stages = data.draw(st.integers(1, min(layers, 5)))
    flights = data.draw(st.lists(st.integers(1, 6), min_size=stages, max_size=stages))
    values = st.lists(st.integers(1, 20), min_size=layers, max_size=layers)
    T, A, H = data.draw(values), data.draw(values), data.draw(st.integers(0, 50))
    objective = data.draw(st.sampled_from(["paper", "timeline"]))
    plan = solve_recompute(
        layers, 4, stages=stages, in_flight=flights, transient=T, kept=A, head=H,
        objective=objective,
    )  # fmt: skip
    begin, sizes = 0, []
    for stage, length in enumerate(stage_lengths(layers, stages)):
        one = Instance(4, tuple(T[begin : begin + length]), tuple(A[begin : begin + length]),
                       flights[stage], H if stage == stages - 1 else 0)  # fmt: skip
        alone, row = solve(one, objective), plan.stages[stage]
        assert (row.block_sizes, row.ties, row.cost, row.peak) == (
            alone.block_sizes, alone.ties, alone.cost, alone.peak,
        )  # fmt: skip
        assert sum(row.block_sizes) == row.layers == length
        begin, sizes = begin + length, [*sizes, *row.block_sizes]
    assert plan.block_sizes == tuple(sizes)
    assert plan.cost == max(row.cost for row in plan.stages)
    assert plan.peak == max(row.peak for row in plan.stages)


def test_uneven_stages():
    plan = solve_recompute(10, 4, stages=4, in_flight=(4, 3, 2, 1))
    assert [stage.layers for stage in plan.stages] == [3, 3, 2, 2]
    assert plan.block_sizes == (3, 3, 2, 1, 1)


def test_embedding_and_head():
    kwargs = {"objective": "timeline", "stages": 2, "in_flight": 3, "kept": 2}
    plain, spared = (solve_recompute(12, 4, embedding=e, **kwargs) for e in (None, 1))
    assert spared.block_sizes == plain.block_sizes
    assert plain.stages[0].peak - spared.stages[0].peak == 3 * (4 - 1)
    assert plain.stages[1] == spared.stages[1]
    headed = solve_recompute(12, 4, head=1000, **kwargs)
    assert headed.stages[0] == plain.stages[0]
    assert headed.stages[1].head == 1000 and headed.stages[1].peak_at == "head"
    assert solve_recompute(12, 4, embedding=1).cost == solve_recompute(12, 4).cost


@pytest.mark.parametrize("objective", ["paper", "timeline"])
def test_hidden_scales_results(objective):
    one = solve_recompute(30, 4, objective=objective, kept=2, head=7)
    many = solve_recompute(30, 4, objective=objective, kept=2, head=7, hidden=2560)
    assert (many.cost, many.peak) == (2560 * one.cost, 2560 * one.peak)
    assert (many.block_sizes, many.continuous) == (one.block_sizes, one.continuous)
    budget = solve_recompute(
        30, 4, kept=2, head=7, hidden=2560, objective="budget", memory_budget=many.peak
    )
    assert budget.peak <= many.peak


def test_sizes_are_exact():
    """Ties stay ties where floats would differ: 0.1 + 0.2 against 0.3."""
    tenth = Fraction(1, 10)
    whole = solve_recompute(36, 4, transient=6)
    assert solve_recompute(36, 4, transient=6.0).cost == whole.cost == 60
    thirds = solve_recompute(36, 4, transient=[Fraction(6)] * 36, hidden=tenth)
    assert thirds.ties == (4, 6) and thirds.cost == 6 and type(thirds.cost) is int
    assert solve_recompute(36, 4, hidden=0.5).cost == 30
    assert solve_recompute(37, 4, hidden=0.5).cost == solve_recompute(37, 4).cost / 2
    large = solve_recompute(9, 4, transient=[6 * 2**70] * 9, kept=2**80, objective="timeline")
    assert (
        large.cost
        == timeline(Instance(4, (6 * 2**70,) * 9, (2**80,) * 9), large.block_sizes)
        == min(timeline(Instance(4, (6 * 2**70,) * 9, (2**80,) * 9), s) for s in compositions(9))
    )


def test_numpy_arguments():
    plan = solve_recompute(
        np.int64(12), np.int32(4), transient=np.full(12, 6), kept=np.ones(12, np.float32),
        in_flight=np.array([1]),
    )  # fmt: skip
    assert plan.block_sizes == solve_recompute(12, 4).block_sizes
    assert type(plan.cost) is int and type(plan.streams) is int


def test_expression():
    L, n, m, P, T = sympy.symbols("L n m P T")
    plan = solve_recompute(12, 4)
    assert plan.expression == sympy.sqrt(n * L / (n + 2))
    assert str(plan.expression) == "sqrt(L*n/(n + 2))"
    assert plan.continuous == float(plan.expression.subs({"L": 12, "n": 4})) == math.sqrt(8)
    plan = solve_recompute(64, 4, stages=8, in_flight=4)
    assert plan.expression == sympy.sqrt(m * n * L / (P * (n + 2)))
    given = solve_recompute(4, 4, transient=[2, 4, 4, 6])
    assert given.expression == sympy.sqrt(n * L / T) and given.continuous == 2
    assert solve_recompute(8, 4, stages=8).continuous == 1  # clipped: 0.82
    assert solve_recompute(8, 4, stages=4, in_flight=9).continuous == 2  # clipped: 3.5


def test_expression_minimises():
    r = sympy.Symbol("r", positive=True)
    for n in (1, 2, 4, 8):
        plan = solve_recompute(61, n)
        slope = sympy.diff(n * 61 / r + (n + 2) * r, r)
        assert abs(slope.subs(r, plan.continuous)) < 1e-9


@pytest.mark.parametrize(
    "layers, kwargs, most",
    [
        pytest.param(10_000, {}, 0.050, id="paper-10000"),
        pytest.param(10_000, {"stages": 16, "in_flight": 16}, 0.050, id="paper-10000-16-stages"),
        pytest.param(10_000, {"transient": "unequal"}, 0.050, id="paper-10000-unequal"),
        pytest.param(512, {"objective": "timeline"}, 2, id="timeline-512"),
        pytest.param(
            512, {"objective": "timeline", "transient": "unequal", "kept": "unequal",
                  "in_flight": 8}, 2, id="timeline-512-unequal"),
        pytest.param(512, {"objective": "budget", "memory_budget": 800}, 10, id="budget-512"),
    ],
)  # fmt: skip
def test_time(layers, kwargs, most, record_property):
    """Processor time of one call, the least of three: other work on the machine only adds."""
    generator = np.random.default_rng(3)
    sizes = generator.integers(4, 9, layers).tolist()
    kwargs = {key: sizes if value == "unequal" else value for key, value in kwargs.items()}
    times = []
    for _ in range(3):
        solve_stage.cache_clear()
        solve_budget.cache_clear()
        start = time.process_time()
        solve_recompute(layers, 4, **kwargs)
        times.append(time.process_time() - start)
    print(f"\n{1e3 * min(times):.1f} ms, allowed {1e3 * most:.0f}")
    record_property("ms", 1e3 * min(times))
    assert min(times) < most


def test_paper_against_every_cut():
    for layers in range(1, 12):
        stage = Instance(4, (6,) * layers, (1,) * layers, 2)
        plan = solve_recompute(layers, 4, in_flight=2)
        assert plan.cost == min(paper(stage, sizes) for sizes in compositions(layers))
