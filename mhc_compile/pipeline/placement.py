"""Whether a plan, its stages and the ranks fit, and a stage on its rank's device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from mhc_compile.errors import ConfigError
from mhc_compile.pipeline.stages import PipelineStages
from mhc_compile.scheduler.overlap_plan import OverlapPlan


def check_sizes(plan: OverlapPlan, stages: PipelineStages, group: Any) -> None:
    """Raises `ConfigError` where torch.distributed, plan and stages do not fit together."""
    if not dist.is_initialized():
        raise ConfigError(
            "torch.distributed is not initialised; start the script with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if plan.variant == "dualpipe":
        raise ConfigError(
            "a 'dualpipe' plan has each stage on two ranks, whose gradients would have to be "
            "summed, and torch's pipeline runtime knows one rank per stage; run "
            "variant='dualpipev', which is the same order without a second copy of the weights"
        )
    size = dist.get_world_size(group)
    if size != plan.ranks:
        raise ConfigError(f"the plan is for {plan.ranks} ranks, and {size} are running")
    if len(stages) != plan.layout.stages:
        raise ConfigError(
            f"the plan has {plan.layout.stages} stages and the model was split into {len(stages)}; "
            "give split_stages the same plan"
        )


def place_stage(module: fx.GraphModule, device: torch.device) -> None:
    """Moves a stage to a device, with the devices that its code names."""
    if any(t.device.type == "meta" for t in module.parameters()) and device.type != "meta":
        raise ConfigError(
            "the stages are on the meta device: call stages[k].to_empty(device=...) and "
            "load_state_dict(..., strict=False) on this rank's stages first"
        )
    module.to(device)
    for node in module.graph.nodes:
        for part in ("args", "kwargs"):
            changed = fx.node.map_aggregate(
                getattr(node, part), lambda a: device if isinstance(a, torch.device) else a
            )
            setattr(node, part, changed)
    module.recompile()
