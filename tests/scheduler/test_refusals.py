"""What plan_pipeline, the plans' checks and from_json refuse, and what they say."""

import json

import pytest

import mhc_compile as mc
from mhc_compile.scheduler.actions import Action
from mhc_compile.scheduler.orders import Orders
from mhc_compile.scheduler.overlap_plan import OverlapPlan


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, 20, "dualpip"), "variant must be one of .* did you mean 'dualpipe'"),
        ((8, 20, "1F1B"), "did you mean '1f1b'"),
        ((8, 20, None), "variant must be one of"),
        ((7, 20, "dualpipe"), "even number of ranks.*got 7; use 8, or variant='dualpipev'"),
        ((8, 21, "dualpipe"), "even number of microbatches.*got 21"),
        ((8, 14, "dualpipe"), "at least 2 \\* ranks = 16 microbatches, got 14"),
        ((8, 15, "dualpipev"), "at least 2 \\* ranks = 16 microbatches, got 15"),
        ((0, 4, "1f1b"), "ranks must be an integer of at least 1, got 0"),
        ((2.0, 4, "1f1b"), "ranks must be an integer"),
        ((True, 4, "1f1b"), "ranks must be an integer"),
        ((2, -4, "zb1p"), "microbatches must be an integer of at least 1, got -4"),
        ((2, "4", "zb1p"), "microbatches must be an integer"),
    ],
)
def test_sizes(arguments, message):
    ranks, microbatches, variant = arguments
    with pytest.raises(mc.MHCError, match=message):
        mc.plan_pipeline(ranks, microbatches, variant=variant)


@pytest.mark.parametrize(
    "costs, message",
    [
        ({"F": -1, "B": 2, "I": 1, "W": 1, "FB": 3}, "cost F must be a finite number"),
        ({"F": 1, "B": 2, "I": 1, "W": float("nan"), "FB": 3}, "cost W must be a finite number"),
        ({"F": 1, "B": 2, "I": 1, "W": 1, "FB": float("inf")}, "cost FB must be a finite"),
        ({"F": 1, "B": 2, "I": 1, "W": 1, "FB": "3"}, "cost FB .* got '3'"),
        ({"F": 1, "I": 1, "W": 1, "g_needed": 1.5}, "cost g_needed must be at most 1, the end"),
        ({"F": 1, "I": 1, "W": 1, "f_needed": 4}, "cost f_needed must be at most 3, .* got 4"),
        ({"F": True, "B": 2, "I": 1, "W": 1}, "cost F .* got True"),
        ({"F": None, "B": 2, "I": 1, "W": 1}, "cost F .* got None"),
        ({"F": 1, "B": 1, "W": 2}, "cost I must be .* at least 0, got -1"),
        ({"F": 1, "B": 2}, "costs must give I, W too"),
        ({"F": 1, "B": 2, "I": 1, "W": 1, "latency": -1}, "cost latency"),
        ({"F": 1, "B": 2, "I": 1, "W": 1, "transfer": -1}, "cost transfer"),
        ({"F": 1, "G": 2}, "costs has no 'G'"),
        ([1, 2, 1, 1, 3], "costs must be a dict"),
    ],
)
def test_costs(costs, message):
    with pytest.raises(mc.MHCError, match=message):
        mc.plan_pipeline(2, 4, costs=costs)
    with pytest.raises(mc.MHCError, match=message):
        mc.plan_pipeline(2, 4).simulate(costs)


@pytest.mark.parametrize("streams", [0, -1, 1.5, True, "4"])
def test_streams(streams):
    with pytest.raises(mc.MHCError, match="streams must be an integer"):
        mc.plan_pipeline(2, 4, streams=streams)


def test_open_costs_follow():
    assert mc.plan_pipeline(2, 4, costs={"F": 1, "B": 2, "W": 1, "FB": 3}) == mc.plan_pipeline(2, 4)
    assert mc.plan_pipeline(2, 4, costs={"F": 2, "I": 2, "W": 1}).costs.FB == 5


def swap(actions, rank, i, j):
    actions[rank][i], actions[rank][j] = actions[rank][j], actions[rank][i]


def rename(actions, rank, step, text):
    actions[rank][step] = Action.parse(text)


BROKEN = {  # of plan_pipeline(2, 4, variant="zb1p"): rank 0 is F F I W F I W F I W I W
    "F must come before": lambda a: swap(a, 0, 0, 2),
    "I must come before": lambda a: swap(a, 0, 2, 3),
    "must run once": lambda a: a[0].pop(),
    "runs 2 times": lambda a: rename(a, 0, 1, "0F0"),
    "does not exist": lambda a: rename(a, 0, 1, "0F4"),
    "must be on rank": lambda a: a.reverse(),
    "holds the activations of 3": lambda a: a[0].insert(2, a[0].pop(4)),
    "orders for 1": lambda a: a.pop(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_orders(message):
    plan = mc.plan_pipeline(2, 4, variant="zb1p")
    actions = [list(rank) for rank in plan.actions]
    BROKEN[message](actions)
    with pytest.raises(mc.MHCError, match=message):
        OverlapPlan(plan.layout, 4, plan.costs, Orders.from_actions(actions))


def test_a_deadlock_is_named():
    plan = mc.plan_pipeline(2, 2, variant="1f1b")
    texts = ["0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"]
    actions = [[Action.parse(cell) for cell in text.split()] for text in texts]
    with pytest.raises(mc.MHCError, match="deadlock: rank 0 at 0B0, rank 1 at 1F1 wait"):
        OverlapPlan(plan.layout, 4, plan.costs, Orders.from_actions(actions))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(version=2), "version must be 1, got 2"),
        (lambda d: d.pop("actions"), "damaged plan: KeyError"),
        (lambda d: d.update(actions=3), "damaged plan: TypeError"),
        (lambda d: d["actions"][0].__setitem__(0, "0X0"), "'0X0' is not an action"),
        (lambda d: d.update(ranks=1), "for 1 ranks has orders for 2"),
        (lambda d: d["costs"].update(F=None), "cost F"),
        (lambda d: d["actions"][1].pop(), "must run once"),
        (lambda d: d.update(makespan=1.0), "makespan .* disagrees"),
    ],
)
def test_damaged_json(change, message):
    data = json.loads(mc.plan_pipeline(2, 4).to_json())
    change(data)
    with pytest.raises(mc.MHCError, match=message):
        OverlapPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"ranks": 2}'])
def test_no_plan(text):
    with pytest.raises(mc.MHCError, match="not a plan's JSON"):
        OverlapPlan.from_json(text)
