"""Plans as CSV, run by torch on two processes: gradients as those of the serial model."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

import mhc_compile as mc


def train(rank, variant, microbatches, folder):
    """One step of a chain of tiny stages on rank `rank` of two; raises if a gradient is off."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    plan = mc.plan_pipeline(2, microbatches, variant=variant)
    torch.manual_seed(0)
    count = plan.layout.stages
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(count)]
    serial = nn.Sequential(*copy.deepcopy(blocks))
    x, target = torch.randn(2, 2 * microbatches, 8)
    mine = [stage for stage, _ in plan.layout.slots(rank)]
    stages = [PipelineStage(blocks[i], i, count, torch.device("cpu")) for i in mine]
    runtime = _PipelineScheduleRuntime(stages, microbatches, loss_fn=nn.functional.mse_loss)
    runtime._load_csv(f"{folder}/plan.csv", format="compute_only")
    for stage in stages:
        stage.stage_index_to_group_rank = runtime.stage_index_to_group_rank
    runtime.step(*([x] if rank == 0 else []), target=target if count - 1 in mine else None)
    for part, goal in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        (nn.functional.mse_loss(serial(part), goal) / microbatches).backward()
    for i in mine:
        for ours, theirs in zip(blocks[i].parameters(), serial[i].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("variant, microbatches", [("dualpipev", 5), ("zb1p", 4), ("1f1b", 3)])
def test_torch_runs_the_csv(variant, microbatches, tmp_path):
    plan = mc.plan_pipeline(2, microbatches, variant=variant)
    (tmp_path / "plan.csv").write_text(plan.to_csv())
    mp.start_processes(train, (variant, microbatches, str(tmp_path)), nprocs=2)
