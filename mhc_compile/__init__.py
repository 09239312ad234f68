"""Graph transformations for Manifold-Constrained Hyper-Connections (arXiv 2512.24880)."""

from mhc_compile.api import (
    find_residuals,
    is_transformed,
    mhc_parameters,
    reset_mhc_parameters,
    revert,
    transform,
)
from mhc_compile.config import MHCConfig
from mhc_compile.conventions import CONVENTIONS, Convention
from mhc_compile.deepseek_v4 import deepseek_v4_config, export_checkpoint, import_checkpoint
from mhc_compile.errors import MHCError
from mhc_compile.passes.plan import ResidualSite
from mhc_compile.pipeline import PipelineStages, PlanRunner, measure_op_costs, split_stages
from mhc_compile.pretrained import load_pretrained, save_pretrained
from mhc_compile.report import Report, report
from mhc_compile.runtime import reference
from mhc_compile.runtime.eager_recompute import set_recompute
from mhc_compile.runtime.modules import HyperConnection
from mhc_compile.runtime.streams import collapse_streams, expand_streams
from mhc_compile.scheduler import (
    OpCosts,
    OverlapPlan,
    RecomputePlan,
    model_op_costs,
    plan_pipeline,
    solve_recompute,
)
from mhc_compile.stability import StabilityReport, stability

__version__ = "0.1.0"

__all__ = [
    "CONVENTIONS",
    "Convention",
    "HyperConnection",
    "MHCConfig",
    "MHCError",
    "OpCosts",
    "OverlapPlan",
    "PipelineStages",
    "PlanRunner",
    "RecomputePlan",
    "Report",
    "ResidualSite",
    "StabilityReport",
    "collapse_streams",
    "deepseek_v4_config",
    "expand_streams",
    "export_checkpoint",
    "find_residuals",
    "import_checkpoint",
    "is_transformed",
    "load_pretrained",
    "measure_op_costs",
    "mhc_parameters",
    "model_op_costs",
    "plan_pipeline",
    "reference",
    "report",
    "reset_mhc_parameters",
    "revert",
    "save_pretrained",
    "set_recompute",
    "solve_recompute",
    "split_stages",
    "stability",
    "transform",
]
