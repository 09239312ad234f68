"""The most even cut, against all cuts; receives in the rows that torch loads."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import sizes

import mhc_compile as mc
from mhc_compile.errors import ConfigError
from mhc_compile.scheduler.balance_stages import balance_stages


def costs_of(costs, cut, first, last):
    stages, begin = [], 0
    for size in cut:
        stages.append(sum(costs[begin : begin + size]))
        begin += size
    stages[0] += first
    stages[-1] += last
    return max(stages), sum(cost * cost for cost in stages)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_no_cut_is_better(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    first, last = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    found = balance_stages(costs, stages, first=first, last=last)
    assert len(found) == stages and sum(found) == len(costs) and min(found) >= 1
    best = min(
        costs_of(costs, [b - a for a, b in zip((0, *ends), (*ends, len(costs)), strict=True)],
                 first, last)
        for ends in combinations(range(1, len(costs)), stages - 1)
    )  # fmt: skip
    assert costs_of(costs, found, first, last)[0] == best[0]


def test_refusals():
    with pytest.raises(ConfigError, match="2 blocks cannot fill 3 stages"):
        balance_stages([1, 1], 3)
    with pytest.raises(ConfigError, match="finite and at least 0, got -1"):
        balance_stages([1, -1], 1)


@given(sizes(variants=("dualpipev", "zb1p", "1f1b")))
def test_receives_come_before_what_reads_them_and_in_the_order_of_messages(size):
    variant, ranks, microbatches = size
    plan = mc.plan_pipeline(ranks, microbatches, variant=variant)
    messages = plan.messages()
    rows = [row.split(",") for row in plan.to_csv(receives=True).splitlines()]
    for rank, row in enumerate(rows):
        cells = [cell for cell in row if "RECV" not in cell]
        assert cells == plan.actions_as_text()[rank]
        for source in range(ranks):
            here = [m for m in messages if (m.source, m.target) == (source, rank)]
            names = [f"{m.stage + (1 if m.kind == 'F' else -1)}RECV_{m.kind}{m.microbatch}"
                     for m in here]  # fmt: skip
            positions = [row.index(name) for name in names]
            assert positions == sorted(positions)
            for message, position in zip(here, positions, strict=True):
                assert position < row.index(cells[message.needed_by])
    assert sum("RECV" in cell for row in rows for cell in row) == len(messages)
