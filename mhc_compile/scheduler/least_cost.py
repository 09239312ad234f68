"""The exact optimum of one stage under each objective, with all tied block sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from mhc_compile.scheduler.bounded_blocks import (
    exactly,
    fewest_blocks,
    most_blocks,
    sizes_exactly,
    sizes_within,
)
from mhc_compile.scheduler.objectives import BlockModel, paper_model, timeline_model
from mhc_compile.scheduler.stages import Stage


@dataclass(frozen=True)
class StageOptimum:
    """The blocks chosen for a stage.

    Attributes:
        sizes: of the blocks, in sublayers.
        ties: every size that the largest block of an optimal choice can have.
    """

    sizes: tuple[int, ...]
    ties: tuple[int, ...]


@lru_cache(maxsize=256)
def solve_stage(stage: Stage, objective: str) -> StageOptimum:
    """The blocks of least cost for "paper" or "timeline".

    Of equal costs the most blocks are taken, which recompute least; of those, the blocks whose
    borders are as late as possible.
    """
    if objective == "paper" and len(set(stage.transient)) == 1:
        return solve_equal_sublayers(stage)
    model = paper_model(stage) if objective == "paper" else timeline_model(stage)
    cost = least_cost(model)
    ties: set[int] = set()
    choices = _optimal_bounds(model, cost)
    for term, blocks in choices:
        ties |= sizes_within(model, term, blocks)
    term, blocks = choices[-1]
    if not model.rate:
        blocks = most_blocks(model, term, blocks)
    sizes = exactly(model, term, blocks)
    assert sizes is not None
    return StageOptimum(sizes, tuple(sorted(ties)))


def solve_equal_sublayers(stage: Stage) -> StageOptimum:
    """Eq. 20 over the integers: m n ceil(L/r) + T r.

    Of the sizes that make the same number of blocks the smallest is best, which leaves some
    2 sqrt(L) of them to try.
    """
    layers, boundaries = len(stage.transient), stage.in_flight * stage.boundary
    root = math.isqrt(layers) + 1
    sizes = {*range(1, root), *(-(-layers // blocks) for blocks in range(1, root + 1))}
    costs = {r: boundaries * -(-layers // r) + stage.transient[0] * r for r in sizes}
    least = min(costs.values())
    ties = tuple(sorted(r for r, cost in costs.items() if cost == least))
    whole, rest = divmod(layers, ties[0])
    return StageOptimum((ties[0],) * whole + (rest,) * (rest > 0), ties)


def least_cost(model: BlockModel) -> int:
    """The least cost over all blocks, by bisection of the largest term V.

    The fewest blocks fall as V grows: between a and b they are at least those of b, so that no V
    there costs less than `cost(fewest(b), a + 1)`. Intervals that cannot improve are dropped, as
    are those with the same fewest blocks at both ends; others are halved.
    """
    highest = model.highest_term
    best = model.cost(1, highest)
    between: list[tuple[int, int, int, int]] = [(0, model.layers + 1, highest, 1)]
    while between:
        low, at_low, high, at_high = between.pop()
        if high - low <= 1 or at_low == at_high or model.cost(at_high, low + 1) >= best:
            continue
        middle = (low + high) // 2
        blocks = fewest_blocks(model, middle, model.layers) or model.layers + 1
        if blocks <= model.layers:
            best = min(best, model.cost(blocks, middle))
        between += [(middle, blocks, high, at_high), (low, at_low, middle, blocks)]
    return best


def _optimal_bounds(model: BlockModel, cost: int) -> list[tuple[int, int]]:
    """Pairs (V, K): optimal are the choices of at most K blocks with terms within V, for each pair.

    Where another block costs something, each pair's choices have exactly K blocks: fewer would
    cost less than the least. Otherwise one pair says it all. K ascends.
    """
    pairs = []
    for blocks in range(1, model.layers + 1):
        term = model.largest_term(blocks, cost)
        if term is None or term <= 0:
            break
        if term * blocks < model.sums[-1]:  # a block's term is at least its transient
            continue
        if model.rate and fewest_blocks(model, term, blocks) is not None:
            pairs.append((term, blocks))
        elif not model.rate:
            pairs = [(term, blocks)]
    return pairs


@lru_cache(maxsize=256)
def solve_budget(stage: Stage, budget: int) -> StageOptimum | None:
    """The most blocks, hence the least recompute, whose true peak is within `budget`.

    Of those the lowest peak is taken, then the blocks whose borders are as late as possible.

    Returns:
        The blocks, or None if no blocks fit.
    """
    model = timeline_model(stage)
    for blocks in range(model.layers, 0, -1):
        term = model.largest_term(blocks, budget)
        if term is None or exactly(model, term, blocks) is None:
            continue
        low, high = 0, term  # the least term of exactly so many blocks lies in (low, high]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if exactly(model, middle, blocks) else (middle, high)
        term = max(high, model.largest_term(blocks, model.cost(blocks, high)) or 0)
        sizes = exactly(model, term, blocks)
        assert sizes is not None
        return StageOptimum(sizes, tuple(sorted(sizes_exactly(model, term, blocks))))
    return None
