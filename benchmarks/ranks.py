"""What benchmarks of several processes share: their start, times and the memory of a rank."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mhc_compile._torch_compat import occupy_gpu

LAUNCHING = 150_000_000  # cycles, some 80 ms, in which Python launches what is timed


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """Reads the arguments, `--device` among them, and joins the other processes of torchrun."""
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU; --device cpu runs on CPU processes")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N, one process a GPU")
    local = int(os.environ["LOCAL_RANK"])
    if args.device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return args, torch.device(f"cuda:{local}" if args.device == "cuda" else "cpu")


def most(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    whole = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(whole, dist.ReduceOp.MAX)
    return float(whole)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the milliseconds that it took."""
    synchronize()
    start = time.perf_counter()
    out = call()
    synchronize()
    return out, 1e3 * (time.perf_counter() - start)


def timed_in_work(
    call: Callable[[], Any],
    work: Callable[[], Any],
    streams: Sequence[torch.cuda.Stream] = (),
) -> tuple[Any, float]:
    """What a call returns, and its milliseconds on a GPU that is as busy as in a step.

    In a step Python runs ahead of the GPU, whose clock falls under load; a call that is timed alone
    begins with an empty queue, on a GPU that has rested.

    Args:
        call: what to time.
        work: what the GPU does before, also launched before it begins.
        streams: those that the call uses beside the current one.
    """
    if not torch.cuda.is_available():
        return timed(call)
    current = torch.cuda.current_stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize()
    occupy_gpu(LAUNCHING)
    work()
    begin.record()
    for stream in streams:
        stream.wait_stream(current)
    out = call()
    for stream in streams:
        current.wait_stream(stream)
    end.record()
    end.synchronize()
    return out, begin.elapsed_time(end)


def timed_together(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call that all ranks begin at once, the slowest rank's."""
    dist.barrier()
    return most(timed(call)[1], device)


def free() -> None:
    """Gives the memory of what is no longer used back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_peak() -> None:
    """Begins to look for the peak of memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    """The peak of a GPU's memory, the largest of all ranks; 0 on CPUs."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return most(peak / 2**30, device)
