"""The orders of all variants: counts, torch's own orders, rules, messages without deadlock."""

import ast
from collections import Counter, defaultdict
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import run_with_communicators, sizes
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

import mhc_compile as mc
from mhc_compile.scheduler.layout import VARIANTS
from mhc_compile.scheduler.messages import order_messages
from mhc_compile.scheduler.task_graph import build_task_graph, check_task_graph, critical_path


@given(sizes(), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_legal_size_has_a_plan(size, latency):
    variant, ranks, microbatches = size
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant, costs={
        "F": 1.5, "B": 3, "I": 2, "W": 1, "FB": 4, "latency": latency})  # fmt: skip
    graph = plan.task_graph()
    check_task_graph(graph)
    path = critical_path(graph)
    length = sum(graph.edges[edge]["delay"] for edge in nx.utils.pairwise(path))
    assert length + graph.nodes[path[-1]]["duration"] == pytest.approx(plan.makespan)
    assert nx.dag_longest_path_length(graph, weight="delay") <= plan.makespan + 1e-9
    for rank, actions in enumerate(plan.actions):
        assert max(held_after_each(actions)) == plan.peak_in_flight[rank]
        spans = plan.timeline.start[rank], plan.timeline.end[rank]
        for step in range(1, len(actions)):
            assert spans[0][step] >= spans[1][step - 1]
    chunks = Counter(
        (p.kind, p.stage, p.microbatch) for r in plan.actions for a in r for p in a.parts
    )
    assert set(chunks.values()) == {1}
    for stage in range(plan.layout.stages):
        for microbatch in range(microbatches):
            whole = ("B", stage, microbatch) in chunks
            split = [(kind, stage, microbatch) in chunks for kind in "IW"]
            assert ("F", stage, microbatch) in chunks and split == [not whole] * 2


def held_after_each(actions):
    held = 0
    for action in actions:
        kinds = {part.kind for part in action.parts}
        held += "F" in kinds
        yield held
        held -= bool(kinds & {"B", "W"})


@given(sizes())
@settings(max_examples=40, deadline=None)
def test_memory_reaches_its_bound_and_no_more(size):
    variant, ranks, microbatches = size
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
    bounds = [plan.layout.most_in_flight(rank) for rank in range(ranks)]
    assert all(peak <= bound for peak, bound in zip(plan.peak_in_flight, bounds, strict=True))
    if microbatches >= 2 * ranks:
        assert plan.peak_in_flight == bounds


@pytest.mark.parametrize("ranks, microbatches", [(1, 2), (2, 5), (3, 6), (4, 10), (6, 19), (8, 16)])
def test_dualpipev_is_the_order_of_torch(ranks, microbatches):
    theirs = get_schedule_ops("DualPipeV", ranks, microbatches, with_comms=False)
    plan = mc.plan_pipeline(ranks, microbatches, variant="dualpipev")
    assert [list(map(str, rank)) for rank in plan.actions] == [
        [str(action) for action in rank if action is not None] for rank in theirs
    ]


@pytest.mark.parametrize("ranks, microbatches", [(1, 1), (2, 4), (5, 5), (4, 11)])
def test_1f1b_is_the_order_of_torch(ranks, microbatches):
    theirs = get_schedule_ops("1F1B", ranks, microbatches, with_comms=False)
    plan = mc.plan_pipeline(ranks, microbatches, variant="1f1b")
    for ours, rank in zip(plan.actions, theirs, strict=True):  # torch's text is off by one there
        kinds = [action.computation_type.value for action in rank if action is not None]
        assert [action.kind for action in ours] == [k for k in kinds if k != "REDUCE_GRAD"]


@given(sizes(("dualpipe", "dualpipev")))
@settings(max_examples=30, deadline=None)
def test_counts_of_dualpipe(size):
    variant, ranks, microbatches = size
    both = 2 if variant == "dualpipe" else 1
    half, m = ranks // both, microbatches // both
    for rank, actions in enumerate(mc.plan_pipeline(ranks, microbatches, variant=variant).actions):
        d = half - 1 - (min(rank, ranks - 1 - rank) if both == 2 else rank)
        e = int(d == 0)
        expected = {"F": 2 * half + d + e, "FB": 2 * m - 2 * half - d - e, "I": half + d}
        expected |= {"W": half + d, "B": half + e}
        assert Counter(action.kind for action in actions) == Counter(expected)


@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (8, 20), (6, 14)])
def test_dualpipe_is_two_dualpipevs(ranks, microbatches):
    both = mc.plan_pipeline(ranks, microbatches, variant="dualpipe")
    one = mc.plan_pipeline(ranks // 2, microbatches // 2, variant="dualpipev")

    def compute(actions, first):
        return [
            [(p.kind, p.microbatch - (p.microbatch >= first) * first) for p in a.parts]
            for a in actions
        ]

    for rank in range(ranks):
        assert compute(both.actions[rank], microbatches // 2) == compute(
            one.actions[min(rank, ranks - 1 - rank)], microbatches
        )
    assert both.makespan == one.makespan


def test_dualpipe_numbers_each_direction():
    plan = mc.plan_pipeline(8, 20, variant="dualpipe")
    first, last = (" ".join(map(str, plan.actions[rank][:8])) for rank in (0, 7))
    assert first == "0F0 0F1 0F2 0F3 0F4 0F5 0F6 7F10"
    assert last == "0F10 0F11 0F12 0F13 0F14 0F15 0F16 7F0"


@given(sizes())
@settings(max_examples=40, deadline=None)
def test_communicators_that_work_in_order_do_not_deadlock(size):
    variant, ranks, microbatches = size
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
    assert run_with_communicators(plan)
    messages = plan.messages()
    crossings = sum(
        plan.layout.rank_of(stage, m) != plan.layout.rank_of(stage + 1, m)
        for stage in range(plan.layout.stages - 1)
        for m in range(microbatches)
    )
    assert len(messages) == len(set(messages)) == 2 * crossings
    assert all(message.posted_before <= message.needed_by for message in messages)


def runs_with_blocking_sends(plan):
    """Executes with a batch before each action: the last one's sends, this one's receives.

    A rank goes on when all of its batch is posted on the other side too.
    """
    batches = defaultdict(list)
    for message in plan.messages():
        batches[message.source, message.sent_after + 1].append(message)
        batches[message.target, message.posted_before].append(message)
    position, posted = [0] * plan.ranks, Counter()
    for rank in range(plan.ranks):
        posted.update(batches[rank, 0])
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(plan.actions):
            batch = batches[rank, position[rank]]
            if position[rank] <= len(actions) and all(posted[message] == 2 for message in batch):
                position[rank] += 1
                posted.update(batches[rank, position[rank]])
                moved = True
    return all(p > len(a) for p, a in zip(position, plan.actions, strict=True))


@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (8, 20)])
def test_only_dualpipes_need_sends_that_do_not_block(ranks, microbatches):
    for variant in VARIANTS:
        plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
        assert runs_with_blocking_sends(plan) == (variant in ("1f1b", "zb1p"))


def test_a_graph_with_a_cycle_is_refused():
    plan = mc.plan_pipeline(2, 2, variant="1f1b")
    graph = build_task_graph(plan.layout, plan.orders, plan.costs)
    graph.add_edge((0, 3), (1, 0), reason="order", delay=0)
    with pytest.raises(mc.MHCError, match="rank 1: 1F0"):
        check_task_graph(graph)
    assert order_messages(plan.layout, plan.orders) == plan.messages()


def test_nothing_here_imports_torch():
    folder = Path(mc.__file__).parent / "scheduler"
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert not any(name.split(".")[0] in ("torch", "triton") for name in names), file


def test_the_tables_of_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text()
    variants = ("1f1b", "zb1p", "dualpipe", "dualpipev")
    for ranks, microbatches in ((8, 20), (4, 8), (16, 64)):
        cells = []
        for variant in variants:
            plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
            share = f"{100 * plan.bubble / plan.makespan:.1f} %"
            cells.append(f"{plan.makespan:g}, {plan.bubble:g} ({share})")
        assert f"| {ranks}, {microbatches} | {' | '.join(cells)} |" in text
