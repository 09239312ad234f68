"""The plan as text and as JSON."""

import dataclasses
import json

import pytest

from mhc_compile.scheduler import solve_recompute

TEXT = """\
stage    sublayers    in flight    objective    Eq. 20's r*              value    L_r    ties    blocks    cost
-------  -----------  -----------  -----------  -----------------------  -------  -----  ------  --------  ------
0        5            2            paper        sqrt(L*m*n/(P*(n + 2)))  2.45     3      3       3, 2      34
1        4            1            paper        sqrt(L*m*n/(P*(n + 2)))  1.73     2      2       2 x 2     20

Memory of a stage when it is largest, by the model (hidden = 1):
stage    peak at    boundaries    F kept    transient    head    gradients    peak    measured
-------  ---------  ------------  --------  -----------  ------  -----------  ------  ------------
0        block 1    16            10        12           0       0            38      not measured
1        block 1    8             4         12           0       0            24      not measured

Cost 34 (boundaries and the largest block, Eq. 20), peak 38. The backward of a microbatch \
recomputes 9 pre and 5 post, no F."""  # noqa: E501


def test_text():
    assert str(solve_recompute(9, 4, stages=2, in_flight=(2, 1), head=3)) == TEXT


@pytest.mark.parametrize("objective", ["paper", "timeline", "budget"])
def test_json(objective):
    budget = {"memory_budget": 90.5} if objective == "budget" else {}
    plan = solve_recompute(9, 4, kept=0.3, head=3, objective=objective, **budget)
    data = json.loads(plan.to_json())
    assert data == plan.to_dict() and data["version"] == 1
    assert data["expression"] == "sqrt(L*n/(n + 2))"
    for field in ("objective", "cost", "peak", "continuous", "recompute_ops", "block_size"):
        assert data[field] == getattr(plan, field)
    assert tuple(data["block_sizes"]) == plan.block_sizes and tuple(data["ties"]) == plan.ties
    (stage,) = data["stages"]
    assert stage["measured"] is None and stage["layers"] == 9
    names = ("boundaries", "kept", "transient", "head", "gradients")
    parts = [stage[part] for part in names]
    assert sum(parts) == pytest.approx(stage["peak"])


def test_frozen_and_hashable():
    plan = solve_recompute(9, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.cost = 0
    assert {plan} == {solve_recompute(9, 4)}
