"""Plans without torch: recompute blocks, pipeline schedules, their simulation and views."""

from mhc_compile.scheduler.evaluate_blocks import check_blocks, evaluate_blocks
from mhc_compile.scheduler.op_costs import OpCosts, model_op_costs
from mhc_compile.scheduler.overlap_plan import OverlapPlan
from mhc_compile.scheduler.plan_pipeline import plan_pipeline
from mhc_compile.scheduler.recompute_plan import RecomputePlan, StagePlan
from mhc_compile.scheduler.solve_recompute import solve_recompute

__all__ = [
    "OpCosts",
    "OverlapPlan",
    "RecomputePlan",
    "StagePlan",
    "check_blocks",
    "evaluate_blocks",
    "model_op_costs",
    "plan_pipeline",
    "solve_recompute",
]
