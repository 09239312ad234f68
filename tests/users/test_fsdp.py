"""FSDP2 on two processes: blocks are sharded, and compiled, each by itself."""

import pytest
import torch
from models import NanoGPT, perturb, tokens
from zoo import on_two_processes

import mhc_compile as mc

LENGTH = 8


def build(dtype):
    torch.manual_seed(0)
    model = mc.transform(NanoGPT(depth=3), example_inputs=(tokens(2, LENGTH),), streams=3)
    return perturb(model).to(dtype).train()


def gradients(model, idx):
    model(idx).float().square().mean().backward()
    return {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip


def shard(model, apart, compiled):
    from torch.distributed.fsdp import fully_shard

    blocks = [block for block in model.modules() if hasattr(block, "mhc")]
    assert len(blocks) == 3
    for block in blocks:
        if compiled:
            block.compile(backend="mhc", options={"lower": "aot_eager"})
        for connection in block.mhc.values() if apart else ():
            fully_shard(connection)
        fully_shard(block)
    return fully_shard(model)


def run(rank, path):
    idx = tokens(4, LENGTH, seed=3)[2 * rank : 2 * rank + 2]
    found = {}
    for name, dtype, apart, compiled in (
        ("float32", torch.float32, False, False),
        ("float32, compiled", torch.float32, False, True),
        ("cast, connections apart", torch.bfloat16, True, False),
    ):
        found[name] = gradients(shard(build(dtype), apart, compiled), idx)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        gradients(shard(build(torch.bfloat16), False, False), idx)
    if rank == 0:
        torch.save(found, path)


def test_as_on_one_process(tmp_path):
    on_two_processes(run, tmp_path / "gradients.pt")
    idx = tokens(4, LENGTH, seed=3)
    for name, got in torch.load(tmp_path / "gradients.pt").items():
        dtype, bound = (torch.bfloat16, 3e-2) if "cast" in name else (torch.float32, 1e-5)
        wanted = gradients(build(dtype), idx)
        largest = max(float(g.abs().max()) for g in wanted.values())
        assert got.keys() == wanted.keys()
        for parameter, grad in wanted.items():
            assert got[parameter].dtype == grad.dtype
            off = float((got[parameter].float() - grad.float()).abs().max())
            assert off <= bound * largest, (name, parameter, off / largest)
