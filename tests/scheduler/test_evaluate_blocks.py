"""Given blocks: what is legal, and that a solved plan is its own evaluation."""

import dataclasses

import numpy as np
import pytest

from mhc_compile.errors import ConfigError
from mhc_compile.scheduler import check_blocks, evaluate_blocks, solve_recompute

KWARGS = {"stages": 3, "in_flight": (3, 2, 1), "kept": 5, "head": 30, "embedding": 1}


@pytest.mark.parametrize("objective", ["paper", "timeline", "budget"])
def test_a_plan_is_its_own_evaluation(objective):
    budget = {"memory_budget": 500} if objective == "budget" else {}
    plan = solve_recompute(31, 4, objective=objective, **KWARGS, **budget)
    given = evaluate_blocks(plan.block_sizes, 31, 4, objective=objective, **KWARGS)
    stages = tuple(dataclasses.replace(stage, ties=()) for stage in plan.stages)
    assert given == dataclasses.replace(plan, ties=(), stages=stages)
    assert "given" in str(given)


@pytest.mark.parametrize("size", [1, 3, 4, 11, 100])
def test_one_size(size):
    blocks = check_blocks(size, 31, 3)
    assert [sum(stage) for stage in blocks] == [11, 10, 10]
    assert all(set(stage[:-1]) <= {size} and stage[-1] <= size for stage in blocks)
    every = sum(blocks, ())
    assert evaluate_blocks(size, 31, 4, stages=3) == evaluate_blocks(every, 31, 4, stages=3)


def test_counts_of_the_toy():
    """12 sublayers in blocks of 3: 12 pre, 8 post, as counted in a compiled backward."""
    plan = evaluate_blocks(np.array([3, 3, 3, 3]), 12, 4)
    assert (plan.recompute_pre, plan.recompute_post, plan.recompute_ops) == (12, 8, 20)
    assert plan.cost == 4 * 4 + 6 * 3


@pytest.mark.parametrize(
    "blocks, message",
    [
        ((3, 3, 3), "block_sizes must sum to layers=12, got 9"),
        ((), "block_sizes must sum to layers=12, got 0"),
        ((12, 0), r"block_sizes\[1\] must be at least 1, got 0"),
        ((13, -1), r"block_sizes\[1\] must be at least 1, got -1"),
        ((6.0, 6), r"block_sizes\[0\] must be an integer, at least 1, got 6.0"),
        (0, "block_sizes must be at least 1, got 0"),
        ("3", "block_sizes must be an integer, at least 1, got '3'"),
        (None, "block_sizes must be an integer, at least 1, got None"),
        ((3, 6, 3), "must not cross the borders of stages=2, after 6 sublayers: a block goes on"),
    ],
)
def test_bad_blocks(blocks, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_blocks(blocks, 12, 4, stages=2)


def test_bad_objective():
    with pytest.raises(ConfigError, match="objective must be one of 'paper'"):
        evaluate_blocks(3, 12, 4, objective="greedy")
