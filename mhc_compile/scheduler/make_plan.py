"""Makes a `RecomputePlan` of the blocks of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from mhc_compile.scheduler.continuous import continuous_expression, continuous_size
from mhc_compile.scheduler.least_cost import StageOptimum
from mhc_compile.scheduler.objectives import paper_cost
from mhc_compile.scheduler.recompute_plan import Number, RecomputePlan, StagePlan
from mhc_compile.scheduler.stages import Problem, Stage, plain
from mhc_compile.scheduler.timeline import peak_moment


def make_plan(problem: Problem, objective: str, choices: Sequence[StageOptimum]) -> RecomputePlan:
    """Evaluates the blocks of every stage; the costliest stage, the first of several, decides."""
    expression = continuous_expression(problem)

    @cache
    def continuous(stage: Stage) -> float:
        return continuous_size(expression, problem, stage)

    stages = tuple(
        _stage_plan(problem, objective, number, choice, continuous(problem.stages[number]))
        for number, choice in enumerate(choices)
    )
    deciding = max(stages, key=lambda stage: stage.cost)
    operations = sum(stage.recompute_pre + stage.recompute_post for stage in stages)
    return RecomputePlan(
        objective=objective,
        streams=problem.streams,
        hidden=plain(problem.hidden),
        block_sizes=tuple(size for stage in stages for size in stage.block_sizes),
        block_size=deciding.block_size,
        ties=deciding.ties,
        cost=operations if objective == "budget" else deciding.cost,
        continuous=deciding.continuous,
        expression=expression,
        peak=max(stage.peak for stage in stages),
        recompute_ops=operations,
        stages=stages,
    )


def _stage_plan(
    problem: Problem, objective: str, number: int, choice: StageOptimum, continuous: float
) -> StagePlan:
    stage, sizes = problem.stages[number], choice.sizes
    moment = peak_moment(stage, sizes)
    cost: Number = problem.size(moment.total)
    if objective == "paper":
        cost = problem.size(paper_cost(stage, sizes))
    elif objective == "budget":
        cost = 2 * sum(sizes) - len(sizes)
    return StagePlan(
        stage=number,
        in_flight=stage.in_flight,
        block_sizes=sizes,
        block_size=max(sizes),
        ties=choice.ties,
        continuous=continuous,
        cost=cost,
        peak=problem.size(moment.total),
        peak_at=moment.at,
        boundaries=problem.size(moment.boundaries),
        kept=problem.size(moment.kept),
        transient=problem.size(moment.transient),
        head=problem.size(moment.head),
        gradients=problem.size(moment.gradients),
    )
