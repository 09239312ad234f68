"""Times a seam on a GPU, forward and backward through autograd, beside other libraries.

A chain of sublayers whose outputs f are given: read (coefficients, h), mix, read, mix and so on,
with gradients given for each h and for the last streams. A seam, what lies between two sublayers,
is half of the difference between chains of four and of two. Each library is first compared with
float64 under its own convention. Times are replays of a CUDA graph, or sums of the times of kernels
where a library cannot be captured. Libraries that are not there are listed as such.

    python benchmarks/seam.py --tokens 8192 --hidden 4096
    python benchmarks/seam.py --hidden 2560 --only "these kernels" --json out/seam.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peers import EPS, PEERS, NotInstalledError, Peer
from tabulate import tabulate
from timing import (
    DTYPES,
    copy_rate,
    graph_time,
    kernel_time,
    need_gpu,
    relative,
    size_parser,
    write_json,
)
from torch import Tensor

from mhc_compile import reference

BOUNDS = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 1e-2}
"""Largest relative error (norms): tf32 and bf16 maps are within, a wrong transpose far beyond."""


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


def measure(call: Callable[[], object]) -> tuple[float, str]:
    """Microseconds, and how they were taken."""
    try:
        return graph_time([call]), "graph"
    except (RuntimeError, AssertionError):
        torch.cuda.synchronize()
        return kernel_time(call)[0], "kernels"


def time_peer(peer: Peer, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Microseconds a seam."""
    times: dict[int, list[float]] = {}
    how = ""
    for count in (2, 4):
        chain = Chain(peer, count, args.tokens, args.streams, args.hidden, DTYPES[args.dtype],
                      device)  # fmt: skip
        forward, how = measure(chain.forward)
        both, _ = measure(chain.both)
        times[count] = [forward, both]
        launches = kernel_time(chain.both)[1]
        del chain
        torch.cuda.empty_cache()
    forward, both = ((b - a) / 2 for a, b in zip(times[2], times[4], strict=True))
    return {"forward us": forward, "both us": both, "by": how, "launches of four": launches}


def run_one(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row: a status, and times where the status is "ok"."""
    try:
        peer = PEERS[name]()
        small = Chain(peer, 2, 256, args.streams, args.hidden, DTYPES[args.dtype], device)
        errors = small.errors("RMSNorm" in name)
        worst = max(errors, key=lambda k: errors[k])
        if not errors[worst] <= BOUNDS[args.dtype]:
            return {"status": f"wrong: {worst} is off by {errors[worst]:.1e}", "errors": errors}
        return {"status": "ok", "error": errors[worst], **time_peer(peer, args, device)}
    except NotInstalledError as error:
        return {"status": f"not installed ({error})"}
    except Exception as error:  # a peer that fails must not end the others' run
        return {"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"}


def main() -> None:
    """Checks, times, prints."""
    parser = size_parser(__doc__)
    parser.add_argument("--only", action="append", choices=tuple(PEERS), help="may be repeated")
    args = parser.parse_args()
    device = need_gpu()
    torch.manual_seed(0)
    unit = args.tokens * args.hidden * DTYPES[args.dtype].itemsize
    rate = copy_rate((2 * args.streams + 2) * unit, device)
    forward, both = plain(args.tokens, args.hidden, DTYPES[args.dtype], device)
    rows: dict[str, dict[str, Any]] = {
        "plain residual and RMSNorm, torch.compile": {
            "status": "ok", "forward us": measure(forward)[0], "both us": measure(both)[0]
        }
    }  # fmt: skip
    for name in args.only or PEERS:
        rows[name] = run_one(name, args, device)
        torch.cuda.empty_cache()
    table = []
    for name, row in rows.items():
        cells = [f"{row[k]:.0f} ({row[k] * rate / unit:.1f} C)" if k in row else ""
                 for k in ("forward us", "both us")]  # fmt: skip
        error = f"{row['error']:.0e}" if "error" in row else ""
        table.append([name, *cells, row.get("by", ""), error, row["status"]])
    headers = ["one seam", "forward us", "forward and backward us", "by", "error", "status"]
    print(tabulate(table, headers, tablefmt="github"))
    print(f"\n1 C at the rate of a copy ({rate / 1e6:.3f} TB/s): {unit / rate:.1f} us. "
          f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.tokens} tokens, "
          f"n = {args.streams}, C = {args.hidden}, {args.dtype}")  # fmt: skip
    write_json(args, {"copy_bytes_per_us": rate, "rows": rows})


if __name__ == "__main__":
    main()
