"""Plans that need no torch: which sublayers to recompute together."""

from mhc_compile.scheduler.evaluate_blocks import check_blocks, evaluate_blocks
from mhc_compile.scheduler.recompute_plan import RecomputePlan, StagePlan
from mhc_compile.scheduler.solve_recompute import solve_recompute

__all__ = ["RecomputePlan", "StagePlan", "check_blocks", "evaluate_blocks", "solve_recompute"]
