"""Times a seam on a GPU, forward and backward through autograd, beside other libraries.

A chain of sublayers whose outputs f are given: read (coefficients, h), mix, read, mix and so on,
with gradients given for each h and for the last streams. A seam, what lies between two sublayers,
is half of the difference between chains of four and of two. Each library is first compared with
float64 under its own convention. Times are replays of a CUDA graph, or sums of the times of kernels
where a library cannot be captured. Libraries that are not there are listed as such. "of copy" is
the time of a copy of the least that a seam can move, (2n + 2)C forward and (5n + 5)C in all (4C and
9C of the plain residual), as a share of its own.

    python benchmarks/seam.py --tokens 8192 --hidden 4096
    python benchmarks/seam.py --hidden 2560 --only "these kernels" --json out/seam.json
    python benchmarks/seam.py --sweep --hidden 4096 --streams 2 4 8 --json out/sweep.json

--sweep takes all of the sizes below, or those that are given, until the budget is used up.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import EPS, PEERS, NotInstalledError, Peer
from tabulate import tabulate
from timing import (
    DTYPES,
    copy_rate,
    graph_times,
    kernel_time,
    machine,
    need_gpu,
    relative,
    spread,
    write_json,
)
from torch import Tensor

from mhc_compile import reference

BOUNDS = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-2}
"""Largest relative error (norms): tf32 and bf16 maps are within, a wrong transpose far beyond."""
SWEEP = {
    "streams": (4, 2, 8),
    "hidden": (4096, 2560, 7168, 1280, 1920),
    "tokens": (8192, 4096, 32768, 128, 1),
}
PLAIN = "plain residual and RMSNorm, torch.compile"


@dataclass(frozen=True)
class Size:
    """What one table is for."""

    tokens: int
    hidden: int
    streams: int
    dtype: torch.dtype


class Chain:
    """`count` sublayers of one library on random inputs."""

    def __init__(
        self, peer: Peer, count: int, tokens: int, n: int, hidden: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        columns = n * (n + 2)
        self.peer, self.n = peer, n
        self.x = peer.to_own(normal(tokens, n, hidden).to(dtype)).requires_grad_()
        self.f = [peer.single(normal(tokens, hidden).to(dtype)).requires_grad_()
                  for _ in range(count)]  # fmt: skip
        self.parameters = []
        for _ in range(count):
            phi = normal(n * hidden, columns) * 2 * (n * hidden) ** -0.5
            alpha = torch.tensor([0.9, 1.1, 1.3], device=device)
            own = peer.own(phi, alpha, 0.5 * normal(columns))
            self.parameters.append([p.detach().clone().requires_grad_() for p in own])
        self.g_h = [torch.randn_like(f) for f in self.f]
        self.g_x = torch.randn_like(self.x)

    def forward(self) -> list[Tensor]:
        """Each h, then the last streams."""
        peer, x = self.peer, self.x
        h, maps = peer.read(x, self.parameters[0])
        out = [h]
        for f, parameters in zip(self.f, self.parameters[1:], strict=False):
            if peer.seam is not None:
                x, h, maps = peer.seam(x, f, maps, parameters)
            else:
                x = peer.mix(x, f, maps)
                h, maps = peer.read(x, parameters)
            out.append(h)
        return [*out, peer.mix(x, self.f[-1], maps)]

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.x, *self.f, *(p for own in self.parameters for p in own)]

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        out = self.forward()
        return torch.autograd.grad(out, self.leaves(), [*self.g_h, self.g_x], allow_unused=True)

    def errors(self, norm: bool) -> dict[str, float]:
        """Relative errors against float64 from the same numbers."""
        peer = self.peer
        wide = {"x": peer.to_ours(self.x.detach()).double().requires_grad_()}
        x = wide["x"]
        shape = (x.shape[0], x.shape[2])
        right = []
        for k, (f, own) in enumerate(zip(self.f, self.parameters, strict=True)):
            named = zip(("phi", "alpha", "bias"), peer.back([p.detach() for p in own]), strict=True)
            p = {name: v.double().contiguous().requires_grad_() for name, v in named}
            wide |= {f"{name} {k}": v for name, v in p.items()}
            wide[f"f {k}"] = f.detach().reshape(shape).double().requires_grad_()
            pre, post, res = reference.coefficients(
                x, p["phi"], p["alpha"], p["bias"], n=self.n, convention=peer.convention
            )
            h = reference.apply_pre(x, pre)
            if norm and k:
                h = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
            right.append(h)
            x = reference.apply_post_res(x, wide[f"f {k}"], post, res)
        given = [g.reshape(shape).double() for g in self.g_h]
        given.append(peer.to_ours(self.g_x).double())
        back = dict(zip(wide, torch.autograd.grad([*right, x], list(wide.values()), given),
                        strict=True))  # fmt: skip
        out = self.forward()
        got = torch.autograd.grad(out, self.leaves(), [*self.g_h, self.g_x], allow_unused=True)
        count, size = len(self.f), len(self.parameters[0])
        ours = {"x": peer.to_ours(got[0])} | {f"f {k}": got[1 + k] for k in range(count)}
        for k in range(count):
            own_grads = list(got[1 + count + k * size :][:size])
            named = zip(("phi", "alpha", "bias"), peer.back(own_grads), strict=True)
            ours |= {f"{name} {k}": v for name, v in named}
        errors = {f"g_{name}": relative(ours[name].reshape(v.shape), v) for name, v in back.items()}
        errors |= {f"h {k}": relative(a.reshape(shape), b)
                   for k, (a, b) in enumerate(zip(out, right, strict=False))}  # fmt: skip
        return errors | {"streams": relative(peer.to_ours(out[-1]), x)}


def plain(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The plain residual with its RMSNorm, under torch.compile: calls forward, and both."""

    @torch.compile
    def step(x: Tensor, f: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = x + f
        return y, torch.nn.functional.rms_norm(y, (hidden,), weight, EPS)

    leaves = [torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
              for _ in range(2)]  # fmt: skip
    leaves.append(torch.ones(hidden, device=device, dtype=dtype).requires_grad_())
    given = [torch.randn_like(leaves[0]) for _ in range(2)]
    return lambda: step(*leaves), lambda: torch.autograd.grad(step(*leaves), leaves, given)


def measure(call: Callable[[], object]) -> tuple[dict[str, float], str]:
    """Microseconds, their median and quartiles, and how they were taken."""
    try:
        return spread(graph_times([call])), "graph"
    except (RuntimeError, AssertionError):
        torch.cuda.synchronize()
        return spread([kernel_time(call)[0]]), "kernels"


def time_peer(peer: Peer, size: Size, device: torch.device) -> dict[str, Any]:
    """Microseconds a seam, and of the chains that they are the difference of.

    Each chain is timed twice, and the faster of the two counts: while the device's clock is down, a
    chain of two can take longer than one of four.
    """
    chains: dict[str, dict[str, float]] = {}
    for count in (2, 4, 2, 4):
        chain = Chain(peer, count, size.tokens, size.streams, size.hidden, size.dtype, device)
        for what, call in (("forward", chain.forward), ("both", chain.both)):
            times, how = measure(call)
            name = f"{what} {count}"
            chains[name] = min(chains.get(name, times), times, key=lambda t: t["median"])
        launches = kernel_time(chain.both)[1]
        del chain
        torch.cuda.empty_cache()
    row: dict[str, Any] = {"by": how, "launches of four": launches, "chains us": chains}
    for what in ("forward", "both"):
        two, four = chains[f"{what} 2"], chains[f"{what} 4"]
        row[f"{what} us"] = (four["median"] - two["median"]) / 2
        row[f"{what} spread us"] = (four["high"] - four["low"] + two["high"] - two["low"]) / 4
    return row


def time_plain(size: Size, device: torch.device) -> dict[str, Any]:
    """The row of the plain residual."""
    forward, both = plain(size.tokens, size.hidden, size.dtype, device)
    times = {"forward us": measure(forward)[0]["median"], "both us": measure(both)[0]["median"]}
    return {"status": "ok", **times}


def run_one(name: str, size: Size, device: torch.device) -> dict[str, Any]:
    """One row: a status, and times where the status is "ok"."""
    try:
        peer = PEERS[name]()
        small = Chain(peer, 2, 256, size.streams, size.hidden, size.dtype, device)
        errors = small.errors("RMSNorm" in name)
        worst = max(errors, key=lambda k: errors[k])
        if not errors[worst] <= BOUNDS[size.dtype]:
            return {"status": f"wrong: {worst} is off by {errors[worst]:.1e}", "errors": errors}
        return {"status": "ok", "error": errors[worst], **time_peer(peer, size, device)}
    except NotInstalledError as error:
        return {"status": f"not installed ({error})"}
    except Exception as error:  # a peer that fails must not end the others' run
        return {"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"}


def run_size(
    size: Size, names: Sequence[str], device: torch.device, until: float
) -> Iterator[dict[str, Any]]:
    """Rows of the plain residual and of libraries, while there is time: all so far after each."""
    torch.compiler.reset()  # what was compiled for other sizes would be tried, or made dynamic
    unit = size.tokens * size.hidden * size.dtype.itemsize
    rate = max(copy_rate((2 * size.streams + 2) * unit, device) for _ in range(2))
    shape = {"tokens": size.tokens, "hidden": size.hidden, "streams": size.streams}
    rows: dict[str, dict[str, Any]] = {}
    for name in (PLAIN, *names):
        least = 2 * size.streams + 2, 5 * size.streams + 5
        if name == PLAIN:
            row, least = time_plain(size, device), (4, 9)
        elif time.perf_counter() > until:
            row = {"status": "not run: the budget is used up"}
        else:
            row = run_one(name, size, device)
        for what, units in zip(("forward", "both"), least, strict=True):
            if f"{what} us" in row:
                row[f"{what} of copy"] = units * unit / rate / row[f"{what} us"]
        rows[name] = row
        gc.collect()
        torch.cuda.empty_cache()
        yield {**shape, "copy_bytes_per_us": rate, "rows": rows}


def table(result: dict[str, Any], itemsize: int) -> str:
    """The rows of one size as text."""
    unit = result["tokens"] * result["hidden"] * itemsize
    rate, body = result["copy_bytes_per_us"], []
    for name, row in result["rows"].items():
        cells = [f"{row[k]:.0f} ({row[k] * rate / unit:.1f} C)" if k in row else ""
                 for k in ("forward us", "both us")]  # fmt: skip
        shares = [f"{row[k]:.2f}" if k in row else "" for k in ("forward of copy", "both of copy")]
        error = f"{row['error']:.0e}" if "error" in row else ""
        body.append([name, cells[0], shares[0], cells[1], shares[1], row.get("by", ""), error,
                     row["status"]])  # fmt: skip
    headers = ["one seam", "forward us", "of copy", "forward and backward us", "of copy", "by",
               "error", "status"]  # fmt: skip
    sizes = f"{result['tokens']} tokens, n = {result['streams']}, C = {result['hidden']}"
    text = tabulate(body, headers, tablefmt="github", disable_numparse=True)
    copied = f"1 C at the rate of a copy ({rate / 1e6:.3f} TB/s): {unit / rate:.1f} us"
    return f"{text}\n\n{sizes}; {copied}\n"


def sizes_of(args: argparse.Namespace) -> list[Size]:
    """The sizes to run; those of a sweep in an order that begins with the usual ones."""
    dtype = DTYPES[args.dtype]
    if not args.sweep:
        (tokens,), (hidden,), (streams,) = (
            given or [usual] for given, usual in
            ((args.tokens, 8192), (args.hidden, 4096), (args.streams, 4))
        )  # fmt: skip
        return [Size(tokens, hidden, streams, dtype)]
    return [
        Size(tokens, hidden, streams, dtype)
        for streams in args.streams or SWEEP["streams"]
        for hidden in args.hidden or SWEEP["hidden"]
        for tokens in args.tokens or SWEEP["tokens"]
    ]


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, usual in SWEEP.items():
        what = f"of a sweep: {', '.join(map(str, usual))}"
        parser.add_argument(f"--{name}", type=int, nargs="+", help=what)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--only", action="append", choices=tuple(PEERS), help="may be repeated")
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    until = time.perf_counter() + args.budget
    device = need_gpu()
    torch.manual_seed(0)
    results = []
    for size in sizes_of(args):
        if time.perf_counter() > until:
            print(f"not run, the budget is used up: {size}")
            continue
        found: dict[str, Any] | None = None
        try:
            for found in run_size(size, args.only or list(PEERS), device, until):
                write_json(args, {"sizes": [*results, found]})
        except torch.OutOfMemoryError:
            print(f"no memory for {size}")
        if found is not None:
            results.append(found)
            print(table(found, size.dtype.itemsize), flush=True)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
