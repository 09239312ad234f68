"""Arguments that make no sense: the message names the argument, what is allowed and the remedy."""

from decimal import Decimal

import numpy as np
import pytest

from mhc_compile.errors import ConfigError, MemoryBudgetError, MHCError
from mhc_compile.scheduler import solve_recompute

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"layers": 0}, "layers must be 1 to 100000, got 0"),
        ({"layers": -3}, "layers must be 1 to 100000, got -3"),
        ({"layers": 10**9}, "layers must be 1 to 100000, got 1000000000"),
        ({"layers": 12.0}, "layers must be an integer, 1 to 100000, got 12.0"),
        ({"layers": True}, "layers must be an integer, 1 to 100000, got True"),
        ({"layers": "12"}, "layers must be an integer, 1 to 100000, got '12'"),
        ({"streams": 0}, "streams must be at least 1, got 0"),
        ({"streams": None}, "streams must be an integer, at least 1, got None"),
        ({"hidden": 0}, "hidden must be a finite number above 0, got 0"),
        ({"hidden": NAN}, "hidden must be a finite number above 0, got nan"),
        ({"hidden": INFINITY}, "hidden must be a finite number above 0, got inf"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"stages": 13}, "stages must be at most layers=12, a sublayer for each stage, got 13"),
        ({"in_flight": 0}, "in_flight must be at least 1, got 0"),
        ({"in_flight": 1.5}, "in_flight must be an integer, at least 1, got 1.5"),
        ({"in_flight": [2, 1]}, "in_flight must be one number or a sequence of 1, one per stage"),
        ({"stages": 2, "in_flight": [2, 0]}, r"in_flight\[1\] must be at least 1, got 0"),
        ({"objective": "papers"}, "objective must be one of 'paper', 'timeline', 'budget', got "
                                  "'papers'; did you mean 'paper'?"),
        ({"objective": None}, "objective must be one of 'paper', 'timeline', 'budget', got None"),
        ({"objective": ["paper"]}, r"objective must be one of .*, got \['paper'\]"),
        ({"transient": 0}, "transient must be a finite number above 0 or a sequence of 12, one "
                           "per sublayer, got 0"),
        ({"transient": "6"}, "transient must be a finite number above 0 or a sequence"),
        ({"transient": {6}}, "transient must be a finite number above 0 or a sequence"),
        ({"transient": [6] * 11}, "transient must be one number or a sequence of 12, one per "
                                  "sublayer; got 11 numbers"),
        ({"transient": [6] * 11 + [0]}, r"transient\[11\] must be a finite number above 0, got 0"),
        ({"transient": [NAN] * 12}, r"transient\[0\] must be a finite number above 0, got nan"),
        ({"transient": np.ones((12, 2))}, r"transient\[0\] must be a finite number above 0"),
        ({"transient": Decimal(6)}, "transient must be a finite number above 0"),
        ({"kept": -1}, "kept must be a finite number at least 0 or a sequence of 12"),
        ({"kept": [1] * 11 + ["x"]}, r"kept\[11\] must be a finite number at least 0, got 'x'"),
        ({"kept": []}, "kept must be one number or a sequence of 12"),
        ({"head": -1}, "head must be a finite number at least 0, got -1"),
        ({"head": [1]}, r"head must be a finite number at least 0, got \[1\]"),
        ({"gradients": -1}, "gradients must be a finite number at least 0"),
        ({"gradients": 1, "in_flight": 2}, "gradients must be 0 with in_flight=2: of several"),
        ({"flowing": NAN}, "flowing must be a finite number at least 0"),
        ({"embedding": NAN}, "embedding must be a finite number at least 0, got nan"),
        ({"memory_budget": 9}, "objective='budget' and memory_budget=SIZE belong together"),
        ({"objective": "budget"}, "objective='budget' and memory_budget=SIZE belong together"),
        ({"objective": "budget", "memory_budget": 0}, "memory_budget must be a finite number "
                                                      "above 0, got 0"),
        ({"objective": "budget", "memory_budget": NAN}, "memory_budget must be a finite number"),
    ],
)  # fmt: skip
def test_message(changed, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        solve_recompute(**{"layers": 12, "streams": 4, **changed})


def test_budget_below_the_minimum():
    least = solve_recompute(12, 4, objective="timeline", stages=2, in_flight=(2, 1), hidden=100)
    with pytest.raises(MHCError, match="stage 0 .* fewer microbatches in flight") as info:
        solve_recompute(12, 4, objective="budget", stages=2, in_flight=(2, 1), hidden=100,
                        memory_budget=least.peak - 1)  # fmt: skip
    assert isinstance(info.value, MemoryBudgetError) and info.value.minimum == least.peak
    plan = solve_recompute(12, 4, objective="budget", stages=2, in_flight=(2, 1), hidden=100,
                           memory_budget=info.value.minimum)  # fmt: skip
    assert plan.peak == least.peak
