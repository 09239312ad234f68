"""Times one hyper-connection on the CPU: the operators against autograd through the reference.

Forward and backward of h = read(x), x' = post_res(x, h + f), every gradient included. Both run in
one process, in turn; the table shows medians, minima and the ratio of the medians. On a machine
with other work, `--threads 1 --clock cpu` counts the time on the processor alone.

    python benchmarks/cpu_ops.py --tokens 4096 --streams 4 --channels 768 --dtype float32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor

from mhc_compile import reference
from mhc_compile.conventions import CONVENTIONS
from mhc_compile.runtime import streams

Parts = dict[str, Tensor]


def make_parts(tokens: int, n: int, channels: int, dtype: torch.dtype) -> Parts:
    """Random streams `[T, n, C]`, sublayer output `[T, C]` and parameters, all with gradients."""
    columns = n * n + 2 * n
    parts = {
        "x": torch.randn(tokens, n, channels).to(dtype),
        "f": torch.randn(tokens, channels).to(dtype),
        "phi": torch.randn(n * channels, columns) * (n * channels) ** -0.5,
        "alpha": torch.ones(3),
        "bias": torch.randn(columns),
    }
    return {name: part.requires_grad_() for name, part in parts.items()}


def by_reference(p: Parts, convention: str) -> Tensor:
    """One sublayer through the reference."""
    n = p["x"].shape[-2]
    pre, post, res = reference.coefficients(
        p["x"], p["phi"], p["alpha"], p["bias"], n=n, convention=convention
    )
    h = reference.apply_pre(p["x"], pre)
    return reference.apply_post_res(p["x"], h + p["f"], post, res)


def by_ops(p: Parts, convention: str) -> Tensor:
    """The same through the operators."""
    rule = CONVENTIONS[convention].key()
    h, _, post, res = streams.read_streams(p["x"], p["phi"], p["alpha"], p["bias"], rule)
    return streams.apply_post_res(p["x"], h + p["f"], post, res)


def time_one(
    call: Callable[[Parts, str], Tensor], p: Parts, convention: str, clock: Callable[[], float]
) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward."""
    grad = torch.ones_like(p["x"])
    start = clock()
    out = call(p, convention)
    middle = clock()
    torch.autograd.grad(out, list(p.values()), grad)
    return 1e3 * (middle - start), 1e3 * (clock() - middle)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--convention", choices=tuple(CONVENTIONS), default="paper")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    torch.set_num_threads(args.threads)
    parts = make_parts(args.tokens, args.streams, args.channels, getattr(torch, args.dtype))
    calls = {"reference": by_reference, "ops": by_ops}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(args.repeats + 1):
        for name, call in calls.items():
            pair = time_one(call, parts, args.convention, clock)
            if repeat > 0:  # the first one warms up
                times[name].append(pair)
    rows = []
    for step, pick in (
        ("forward", lambda t: t[0]),
        ("backward", lambda t: t[1]),
        ("both", lambda t: t[0] + t[1]),
    ):
        slow, fast = ([pick(t) for t in times[name]] for name in calls)
        medians = statistics.median(slow), statistics.median(fast)
        rows.append([step, *medians, medians[0] / medians[1], min(slow), min(fast)])
    headers = ["", "reference ms", "ops ms", "ratio", "reference min", "ops min"]
    print(tabulate(rows, headers, floatfmt=".1f"))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.tokens} tokens, "
        f"n = {args.streams}, C = {args.channels}, {args.dtype}, {args.convention}, "
        f"{args.repeats} repeats in turn, {args.clock} time"
    )


if __name__ == "__main__":
    main()
