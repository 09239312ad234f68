"""Times training steps under DDP and FSDP2 on all GPUs of a machine, or CPU processes.

Each version's gradients are compared with one process on the whole batch first, in float32 on few
channels. "alone" is each rank with a model of its own; "ddp" compiles what DistributedDataParallel
returns, which torch cuts at its buckets; "ddp by blocks" compiles block by block, without cuts;
"fsdp" shards and compiles block by block, as torchtitan does. "x plain" is beside the plain
residual under the same wrapper: what the connections cost there.

    torchrun --nproc-per-node 2 benchmarks/data_parallel.py --json out/data_parallel.json
    torchrun --nproc-per-node 2 benchmarks/data_parallel.py --device cpu --channels 32 --blocks 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import readme_table
import torch
import torch.distributed as dist
from ranks import begin, forget_peak, free, most, peak_gib, timed_together
from timing import DTYPES, machine, write_json
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_models import Shape, WithLoss, make_shape
from training_steps import Version, batch_of, failure, make_model

CHECKED = 1e-4
"""Largest difference of a gradient in float32, relative to the model's largest."""
VERSIONS = {
    "plain": Version("plain", "inductor"),
    "mhc": Version("mhc", "mhc", {"recompute": "off"}),
    "mhc, recompute paper": Version("mhc", "mhc", {"recompute": "paper"}),
    "mhc, eager": Version("mhc", "eager"),
    "plain, eager": Version("plain", "eager"),
}
WRAPPERS = ("alone", "ddp", "ddp by blocks", "fsdp")


def compile_it(module: nn.Module, version: Version) -> None:
    """Compiles a module in place."""
    if version.backend == "mhc":
        module.compile(backend="mhc", options=dict(version.options))
    elif version.backend != "eager":
        module.compile(backend=version.backend)


def wrapped(
    model: WithLoss, wrapper: str, version: Version, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor]:
    """What runs a model on this rank's batch.

    FSDP2 takes parameters of one dtype, but connections stay in float32 where a model is cast: its
    masters are float32, and it casts what is computed with.
    """
    if wrapper == "fsdp":
        for buffer in model.buffers():  # rotary tables, which FSDP2 does not cast
            buffer.data = buffer.data.to(dtype)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            compile_it(block, version)
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model
    module: nn.Module = model
    if "ddp" in wrapper:
        place = next(model.parameters()).device
        module = DistributedDataParallel(model, [place.index] if place.index is not None else None)
    whole = wrapper != "ddp by blocks"
    torch._dynamo.config.optimize_ddp = whole
    for part in [module] if whole else model.blocks:
        compile_it(part, version)
    return module


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.removeprefix("module.")] = whole.detach()
    return found


def difference(
    version: Version, wrapper: str, shape: Shape, streams: int, place: torch.device
) -> float:
    """The largest difference of a gradient from one process on the batch of all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    models = []
    for _ in range(2):
        torch.manual_seed(0)  # on every rank the same
        models.append(make_model(shape, version.connection, streams, place, torch.float32))
    model, serial = models
    batch = batch_of(replace(shape, batch=shape.batch * ranks), place, torch.float32)
    serial(*batch).backward()
    right = gradients(serial)
    mine = batch if wrapper == "alone" else [part.chunk(ranks)[rank] for part in batch]
    call = wrapped(model, wrapper, version, torch.float32)  # DDP must live until the backward
    call(*mine).backward()
    got = gradients(model)
    largest = max(float(g.abs().max()) for g in right.values())
    worst = max(float((got[name] - g).abs().max()) for name, g in right.items()) / largest
    return most(worst, place)


def time_one(
    version: Version, wrapper: str, shape: Shape, args: argparse.Namespace, place: torch.device
) -> dict[str, Any]:
    """Milliseconds of steps with AdamW, the slowest rank's, and the peak of memory."""
    dtype = DTYPES[args.dtype]
    kept = torch.float32 if wrapper == "fsdp" else dtype
    torch.manual_seed(0)
    model = make_model(shape, version.connection, args.streams, place, kept)
    call = wrapped(model, wrapper, version, dtype)
    torch.manual_seed(dist.get_rank())
    batch = batch_of(shape, place, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        call(*batch).backward()
        optimizer.step()

    for _ in range(3):
        step()
    free()
    forget_peak()
    times = [timed_together(step, place) for _ in range(args.repeats)]
    return {"step ms": statistics.median(times), "times ms": times, "peak GiB": peak_gib(place)}


def run(name: str, wrapper: str, args: argparse.Namespace, place: torch.device) -> dict[str, Any]:
    """One row: checked, then timed."""
    version = VERSIONS[name]
    few = make_shape("dense", min(args.channels, 64), 2, 32, 2)
    torch.compiler.reset()
    try:
        error = difference(version, wrapper, few, args.streams, place)
        free()
        if not error <= CHECKED:
            return {"status": f"wrong: off by {error:.1e}", "error": error}
        torch.compiler.reset()
        shape = make_shape("dense", args.channels, args.blocks, args.length, args.batch)
        return {"status": "ok", "error": error, **time_one(version, wrapper, shape, args, place)}
    except Exception as error:  # the others' results are worth having
        return {"status": failure(error)}


def main() -> None:
    """Checks, times, prints on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=2048, help="C")
    parser.add_argument("--blocks", type=int, default=8, help="of two sublayers each")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a rank")
    parser.add_argument("--streams", type=int, default=4, help="n")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of products")
    parser.add_argument("--only", action="append", choices=tuple(VERSIONS), help="may be repeated")
    parser.add_argument("--wrapper", action="append", choices=WRAPPERS, help="may be repeated")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--budget", type=float, default=540, help="seconds; then nothing is begun")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args, place = begin(parser)
    torch._dynamo.config.recompile_limit = 64  # versions and blocks share their code
    start, rows = time.perf_counter(), {}
    for wrapper in args.wrapper or WRAPPERS:
        for name in args.only or VERSIONS:
            late = most(time.perf_counter() - start, place) > args.budget
            rows[f"{wrapper}: {name}"] = (
                {"status": f"not run: the budget of {args.budget:g} s is used up"} if late
                else run(name, wrapper, args, place)
            )  # fmt: skip
            free()
            if dist.get_rank() == 0:
                print(f"{wrapper}: {name}: {time.perf_counter() - start:.0f} s", flush=True)
                write_json(args, {"ranks": dist.get_world_size(), "rows": rows})
    if dist.get_rank() == 0:
        setting = {"setting": vars(args) | machine()}
        print(readme_table.data_parallel(setting | {"ranks": dist.get_world_size(), "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
