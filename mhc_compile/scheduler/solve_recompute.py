"""`solve_recompute`: the blocks of sublayers that are recomputed together in the backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from mhc_compile.errors import ConfigError, MemoryBudgetError, check_choice
from mhc_compile.scheduler.check_arguments import as_size
from mhc_compile.scheduler.least_cost import StageOptimum, solve_budget, solve_stage
from mhc_compile.scheduler.make_plan import make_plan
from mhc_compile.scheduler.objectives import OBJECTIVES
from mhc_compile.scheduler.recompute_plan import RecomputePlan, runs
from mhc_compile.scheduler.stages import Problem, plain, read_problem
from mhc_compile.scheduler.timeline import peak_moment

Size = int | float | Fraction


def solve_recompute(
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
    memory_budget: Size | None = None,
) -> RecomputePlan:
    """Chooses the blocks that are best under an objective; the optimum is exact.

    A block keeps its first state x_l0, n C a token, and recomputes the rest of its sublayers'
    pre, norm, post and res from it and from what each F returned. With m microbatches in flight
    and K blocks in a stage, the objectives are

    - "paper", Eq. 20: m n C K + max over blocks of the sum of their `transient`;
    - "timeline": the largest memory over time, see `timeline.moments`;
    - "budget": the fewest recomputed steps, 2 L - K, with a timeline peak of at most
      `memory_budget` in every stage.

    Every stage is solved by itself; blocks do not cross its borders. Of equally good choices the
    one with the most blocks is taken, which recomputes least; under "budget" the one of lowest
    peak; then the one whose borders are as late as possible, so that blocks are filled from the
    front.

    Args:
        layers: L, the number of sublayers; attention and MLP count separately.
        streams: n.
        hidden: the unit of results and of `memory_budget`: 1 for C a token, or the bytes
            C x tokens x itemsize of a microbatch.
        stages: P, pipeline stages. L / P sublayers each; where P does not divide L, earlier
            stages have one more.
        in_flight: m, microbatches that hold their activations, one number or one per stage. In
            1F1B stage p of P holds P - p.
        objective: "paper", "timeline" or "budget".
        transient: what the backward recomputes of a sublayer, in multiples of `hidden`: one
            number or one per sublayer; n + 2 by default: x_l, H_pre x_l and its norm.
        kept: what F keeps of a sublayer, its result included, likewise; 1 by default.
        head: what the head and the loss hold when the backward starts, on the last stage.
        embedding: what is kept in place of the first x_0, which may be recomputed from the
            embedding: 1; None for x_0 itself, n. "paper" does not count it.
        gradients: what the gradients of a sublayer's weights add when its backward is done: one
            number or one per sublayer; 0 where they exist before, as when they are accumulated.
            Of each sublayer no more than its `kept` and `transient` counts. "paper" ignores it.
        flowing: what a stage holds besides while a block is in work: the gradients that flow
            through the streams, those of the head's weights. "paper" ignores it too.
        memory_budget: for "budget", the most that a stage may hold, in the unit of `hidden`.

    Returns:
        The plan; `print` shows it.

    Raises:
        ConfigError: an argument makes no sense.
        MemoryBudgetError: nothing fits `memory_budget`; the message names the least that does.

    Example:
        >>> plan = solve_recompute(36, 4)
        >>> plan.block_size, plan.ties, plan.cost, plan.expression
        (4, (4, 6), 60, sqrt(L*n/(n + 2)))
        >>> solve_recompute(12, 4, objective="timeline", kept=8).block_sizes
        (8, 3, 1)
    """
    check_choice("objective", objective, OBJECTIVES)
    if (objective == "budget") != (memory_budget is not None):
        raise ConfigError(
            "objective='budget' and memory_budget=SIZE belong together: got "
            f"objective={objective!r} and memory_budget={memory_budget!r}"
        )
    problem = read_problem(
        layers, streams, hidden=hidden, stages=stages, in_flight=in_flight, transient=transient,
        kept=kept, head=head, embedding=embedding, gradients=gradients,
        flowing=flowing,
    )  # fmt: skip
    if memory_budget is None:
        choices = [solve_stage(stage, objective) for stage in problem.stages]
    else:
        choices = _within(problem, as_size("memory_budget", memory_budget))
    return make_plan(problem, objective, choices)


def _within(problem: Problem, budget: int | Fraction) -> list[StageOptimum]:
    most = math.floor(budget / problem.unit)
    choices = [solve_budget(stage, most) for stage in problem.stages]
    fitting = [choice for choice in choices if choice is not None]
    if len(fitting) == len(choices):
        return fitting
    least = [solve_stage(stage, "timeline").sizes for stage in problem.stages]
    peaks = [
        peak_moment(stage, sizes).total for stage, sizes in zip(problem.stages, least, strict=True)
    ]
    worst = peaks.index(max(peaks))
    minimum = problem.size(peaks[worst])
    raise MemoryBudgetError(
        f"memory_budget must be at least {minimum}, the least peak of stage {worst} (blocks "
        f"{runs(least[worst])}), got {plain(budget)}; allow more memory or use more stages, fewer "
        "microbatches in flight or fewer streams",
        minimum,
    )
