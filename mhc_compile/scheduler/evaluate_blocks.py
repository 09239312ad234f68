"""Given blocks instead of chosen ones: whether they are legal, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from mhc_compile.errors import ConfigError, check_choice
from mhc_compile.scheduler.check_arguments import as_integer, as_sequence
from mhc_compile.scheduler.least_cost import StageOptimum
from mhc_compile.scheduler.make_plan import make_plan
from mhc_compile.scheduler.objectives import OBJECTIVES
from mhc_compile.scheduler.recompute_plan import RecomputePlan
from mhc_compile.scheduler.stages import read_problem, stage_lengths

Size = int | float | Fraction


def check_blocks(
    block_sizes: int | Sequence[int], layers: int, stages: int = 1
) -> list[tuple[int, ...]]:
    """Checks blocks and returns those of each stage.

    Args:
        block_sizes: sublayers of every block, or one size: blocks of that size from the front of
            each stage, the last one shorter.
        layers: L.
        stages: P; where P does not divide L, earlier stages have one sublayer more.

    Raises:
        ConfigError: a size is no integer of at least 1, they do not sum to L, or a block crosses
            the border of a stage.

    Example:
        >>> check_blocks(4, 10, stages=2)
        [(4, 1), (4, 1)]
        >>> check_blocks((3, 2, 5), 10, stages=2)
        [(3, 2), (5,)]
    """
    lengths = stage_lengths(layers, stages)
    values = as_sequence(block_sizes)
    if values is None:
        size = as_integer("block_sizes", block_sizes)
        return [
            (size,) * (length // size) + ((length % size,) if length % size else ())
            for length in lengths
        ]
    sizes = [as_integer(f"block_sizes[{i}]", size) for i, size in enumerate(values)]
    if sum(sizes) != layers:
        raise ConfigError(f"block_sizes must sum to layers={layers}, got {sum(sizes)}")
    ends, borders = list(accumulate(sizes)), list(accumulate(lengths))
    crossed = sorted(set(borders) - set(ends))
    if crossed:
        raise ConfigError(
            f"block_sizes must not cross the borders of stages={stages}, after "
            f"{', '.join(map(str, borders[:-1]))} sublayers: a block goes on after {crossed[0]}; "
            "end a block there"
        )
    cuts = [0, *(ends.index(border) + 1 for border in borders)]
    return [tuple(sizes[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def evaluate_blocks(
    block_sizes: int | Sequence[int],
    layers: int,
    streams: int,
    *,
    hidden: Size = 1,
    stages: int = 1,
    in_flight: int | Sequence[int] = 1,
    objective: str = "paper",
    transient: Size | Sequence[Size] | None = None,
    kept: Size | Sequence[Size] | None = None,
    head: Size = 0,
    embedding: Size | None = None,
    gradients: Size | Sequence[Size] = 0,
    flowing: Size = 0,
) -> RecomputePlan:
    """The cost and the peak of given blocks; arguments as in `check_blocks`, `solve_recompute`.

    Returns:
        A plan of these blocks, without `ties`.

    Raises:
        ConfigError: an argument makes no sense.

    Example:
        >>> plan = evaluate_blocks((3, 3, 3, 3), 12, 4)
        >>> plan.cost, plan.peak, plan.recompute_ops
        (34, 46, 20)
    """
    check_choice("objective", objective, OBJECTIVES)
    problem = read_problem(
        layers, streams, hidden=hidden, stages=stages, in_flight=in_flight, transient=transient,
        kept=kept, head=head, embedding=embedding, gradients=gradients,
        flowing=flowing,
    )  # fmt: skip
    blocks = check_blocks(block_sizes, problem.layers, len(problem.stages))
    return make_plan(problem, objective, [StageOptimum(sizes, ()) for sizes in blocks])
