"""Times on a GPU: replays of CUDA graphs, over several sets of inputs so that caches are cold."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def size_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that the benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096, help="channels of one stream, C")
    parser.add_argument("--streams", type=int, default=4, help="n")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser


def write_json(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes the arguments, `machine()` and a result, if --json was given."""
    if args.json:
        setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"setting": setting | machine()} | result, indent=1))


@functools.cache
def machine() -> dict[str, str]:
    """The device, and the versions of its driver and of what runs on it."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("triton"):
        found["triton"] = importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        return found | {"processor": platform.processor() or platform.machine()}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(
            query, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    driver = driver.splitlines()[0].strip() if driver else "unknown"
    return found | {"gpu": torch.cuda.get_device_name(), "driver": driver}


def spread(times: Sequence[float]) -> dict[str, float]:
    """The median of some times, and the quartiles beside it."""
    if len(times) < 2:
        return {"median": times[0], "low": times[0], "high": times[0]}
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def need_gpu() -> torch.device:
    """The GPU; without one the process ends with one line and exit code 2."""
    if not torch.cuda.is_available():
        sys.stderr.write("this benchmark needs a CUDA GPU, and torch finds none\n")
        raise SystemExit(2)
    from mhc_compile.codegen.interpreter import interpreting

    if interpreting():
        sys.stderr.write("unset TRITON_INTERPRET: with it kernels run in Triton's interpreter\n")
        raise SystemExit(2)
    return torch.device("cuda")


def graph_times(calls: Sequence[Callable[[], object]], repeats: int = 15) -> list[float]:
    """Microseconds of one call, a replay each of a graph of all of them, one set of inputs each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills caches that a graph must not own
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del kept
    return times


def graph_time(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """The median of `graph_times`."""
    return statistics.median(graph_times(calls, repeats))


def kernel_time(call: Callable[[], object], repeats: int = 5) -> tuple[float, int]:
    """Microseconds that kernels run in one call, and how many: the median over calls."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    sums = []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
            call()
            torch.cuda.synchronize()
        kernels = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        sums.append((sum(e.device_time for e in kernels), len(kernels)))
    return statistics.median(t for t, _ in sums), sums[-1][1]


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes a microsecond, read and written, of a torch copy of `size` bytes in all."""
    pairs = [
        [torch.zeros(size // 4, dtype=torch.int16, device=device) for _ in range(2)]
        for _ in range(3)
    ]
    moved = 2 * pairs[0][0].nbytes
    return moved / graph_time([partial(to.copy_, source) for source, to in pairs])


def relative(got: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm."""
    a, b = got.detach().double(), right.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))
