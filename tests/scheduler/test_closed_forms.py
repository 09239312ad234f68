"""Makespans and bubbles against the formulae, and that the stated conditions are needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import sizes

import mhc_compile as mc

durations = st.integers(1, 7)


@pytest.mark.parametrize(
    "ranks, microbatches, makespans, bubbles",
    [
        (8, 20, (81, 67, 66, 134), (21, 7, 6, 14)),
        (4, 8, (33, 27, 26, 54), (9, 3, 2, 6)),
        (16, 64, (237, 207, 206, 414), (45, 15, 14, 30)),
    ],
)
def test_default_costs(ranks, microbatches, makespans, bubbles):
    for variant, makespan, bubble in zip(
        ("1f1b", "zb1p", "dualpipe", "dualpipev"), makespans, bubbles, strict=True
    ):
        plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
        assert (plan.makespan, plan.bubble) == (makespan, bubble)
        assert plan.closed_form.holds
        assert (plan.closed_form.makespan, plan.closed_form.bubble) == (makespan, bubble)
        assert plan.timeline.idle == [bubble] * ranks


@given(sizes(), durations, durations, durations, st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_where_a_formula_holds(size, f, i, w, hidden):
    variant, ranks, microbatches = size
    costs = {"F": f, "I": i, "W": w, "FB": f + i + w - min(hidden, f)}
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant, costs=costs)
    form = plan.closed_form
    if form.holds:
        assert plan.makespan == form.makespan
    if form.holds and (variant in ("1f1b", "zb1p") or hidden == 0):
        assert plan.timeline.idle == [form.bubble] * ranks


@given(sizes(("dualpipe", "dualpipev")), durations, durations, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_dualpipe_where_its_formula_holds(size, f, w, hidden):
    variant, ranks, microbatches = size
    w = min(w, f)
    costs = {"F": f, "I": f, "W": w, "FB": 2 * f + w - min(hidden, f)}
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant, costs=costs)
    form = plan.closed_form
    assert form.holds and plan.makespan == form.makespan
    if hidden <= f:
        turn = (ranks - 1) if variant == "dualpipev" else ranks // 2
        assert plan.timeline.idle[turn] == pytest.approx(form.bubble)


@pytest.mark.parametrize(
    "variant, ranks, microbatches, costs",
    [
        ("zb1p", 9, 14, {"F": 5, "I": 1, "W": 3}),  # W > I
        ("zb1p", 3, 25, {"F": 1, "I": 5, "W": 3}),  # W > F
        ("zb1p", 7, 3, {"F": 3, "I": 1, "W": 1}),  # M < P
        ("zb1p", 4, 8, {"F": 1, "I": 1, "W": 1, "B": 3}),  # B > I + W, of which zb1p uses none
        ("dualpipe", 6, 20, {"F": 2, "I": 2, "W": 4, "FB": 8}),  # W > F
        ("dualpipe", 10, 26, {"F": 4, "I": 1, "W": 3, "FB": 7}),  # I < F
        ("dualpipe", 10, 22, {"F": 3, "I": 5, "W": 2, "FB": 9}),  # I > F
        ("1f1b", 4, 8, {"F": 1, "B": 2, "I": 1, "W": 1, "latency": 0.5}),
        ("1f1b", 4, 8, {"F": 1, "B": 2, "I": 1, "W": 1, "transfer": 0.5}),
    ],
)
def test_where_a_formula_does_not_hold(variant, ranks, microbatches, costs):
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant, costs=costs)
    assert not plan.closed_form.holds
    assert plan.makespan != plan.closed_form.makespan


def test_latency_shows_in_the_makespan():
    """At this level nothing hides a message: most of its time per microbatch is lost."""
    plan = mc.plan_pipeline(8, 20, variant="dualpipe")
    slow = plan.simulate(latency=0.1)
    assert slow.makespan - plan.makespan > 0.7 * 0.1 * 20
