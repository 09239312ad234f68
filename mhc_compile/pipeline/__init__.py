"""Runs the scheduler's plans: a transformed model in stages, on torch.distributed."""

from mhc_compile.pipeline.measure_op_costs import measure_op_costs
from mhc_compile.pipeline.runner import PlanRunner
from mhc_compile.pipeline.split_stages import split_stages
from mhc_compile.pipeline.stages import PipelineStages

__all__ = ["PipelineStages", "PlanRunner", "measure_op_costs", "split_stages"]
