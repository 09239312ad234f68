"""Times each generated kernel on a GPU, after checking what it computes against float64.

Kernels named "equal" read streams that are all the same memory, as where a stream starts. The table
gives microseconds (the median over replays of a CUDA graph with rotating inputs), the
bytes that `codegen.traffic` states, the bandwidth that makes, and its share of the rate of a copy
measured in the same run.

    python benchmarks/kernels.py --tokens 8192 --hidden 4096 --streams 4 --dtype bf16
    python benchmarks/kernels.py --hidden 2560 --json out/kernels.json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from tabulate import tabulate
from timing import DTYPES, copy_rate, graph_time, need_gpu, relative, size_parser, write_json
from torch import Tensor

from mhc_compile import reference
from mhc_compile.codegen import launch
from mhc_compile.codegen.kernel_calls import KernelCalls
from mhc_compile.codegen.kernel_set import kernel_set
from mhc_compile.codegen.spec import FLAGS, KernelSpec
from mhc_compile.codegen.traffic import seam_table, traffic
from mhc_compile.conventions import CONVENTIONS, Convention

CHECKED = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 2e-4}
"""Largest relative error of a gradient (norms); tests/codegen has the tight bounds."""
EPS = 1e-6

Launch = tuple[KernelSpec, Callable[[], object]]


def make_parts(
    tokens: int, n: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """What a seam takes and the gradients of what it gives."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    columns = n * (n + 2)
    return {
        "x": normal(tokens, n, hidden).to(dtype),
        "f": normal(tokens, hidden).to(dtype),
        "post": 2 * normal(tokens, n).sigmoid(),
        "res": normal(tokens, n, n).softmax(-1),
        "phi": normal(n * hidden, columns) * 2 * (n * hidden) ** -0.5,
        "alpha": torch.ones(3, device=device),
        "bias": normal(columns) * 0.5,
        "weight": 1 + 0.1 * normal(hidden),
        "g_y": normal(tokens, n, hidden).to(dtype),
        "g_h": normal(tokens, hidden).to(dtype),
        "g_post": normal(tokens, n) * hidden**0.5,
        "g_res": normal(tokens, n, n) * hidden**0.5,
    }


def as_start(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same where a stream starts: all streams are the first, a view of stride 0."""
    return p | {"x": p["x"][:, :1].contiguous().expand_as(p["x"])}


def run_seam(p: dict[str, Tensor], rule: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A seam with an RMSNorm: its results, and the gradients of its inputs."""
    streams = [p[k] for k in ("x", "f", "post", "res")]
    projection = [p[k] for k in ("phi", "alpha", "bias")]
    out = launch.seam(*streams, *projection, p["weight"], None, "rms", EPS, rule)
    y, _, pre, _, _, proj, square = out
    back = launch.seam_backward(
        p["g_y"], p["g_h"], None, p["g_post"], p["g_res"], *streams, y, *projection, p["weight"],
        None, pre, proj, square, "rms", EPS, rule,
    )  # fmt: skip
    return out, back


def run_ends(p: dict[str, Tensor], rule: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What stands at the ends of a stream: a read without a mix, and a mix without a read."""
    projection = [p[k] for k in ("phi", "alpha", "bias")]
    read = launch.read(p["x"], *projection, rule)
    _, pre, _, _, proj, square = read
    back = launch.read_backward(
        p["g_h"], None, p["g_post"], p["g_res"], p["x"], *projection, pre, proj, square, rule
    )
    streams = [p[k] for k in ("x", "f", "post", "res")]
    y = launch.post_res(*streams)
    return (*read[:4], y), (*back, *launch.post_res_backward(p["g_y"], *streams))


def check(p: dict[str, Tensor], rule: str, bound: float) -> dict[str, float]:
    """Errors of every result of both runs; ends the process if one is too large."""
    n = p["x"].shape[1]
    wide = {k: v.double().requires_grad_() for k, v in p.items() if not k.startswith("g_")}
    convention = Convention.from_key(rule)

    def maps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return reference.coefficients(
            x, wide["phi"], wide["alpha"], wide["bias"], n=n, convention=convention
        )

    names = ("x", "f", "post", "res", "phi", "alpha", "bias", "weight")
    out, back = run_seam(p, rule)
    y = reference.apply_post_res(*(wide[k] for k in names[:4]))
    kept = y + (out[0].double() - y).detach()
    gates = maps(kept)
    h = reference.apply_pre(kept, gates[0])
    h = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt() * wide["weight"]
    given = [p[k].double() for k in ("g_y", "g_h", "g_post", "g_res")]
    right = torch.autograd.grad((kept, h, *gates[1:]), [wide[k] for k in names], given)
    pairs = {f"seam {k}": (a, b) for k, a, b in zip(("y", "h", "pre", "post", "res"), out,
                                                    (y, h, *gates), strict=False)}  # fmt: skip
    pairs |= {f"seam g_{k}": (a, b) for k, a, b in zip(names, back, right, strict=False)}

    out, back = run_ends(p, rule)
    gates = maps(wide["x"])
    h = reference.apply_pre(wide["x"], gates[0])
    right = torch.autograd.grad(
        (h, *gates[1:]), [wide[k] for k in ("x", "phi", "alpha", "bias")], given[1:]
    )
    y = reference.apply_post_res(*(wide[k] for k in names[:4]))
    right += torch.autograd.grad(y, [wide[k] for k in names[:4]], given[0])
    ends = ("h", "pre", "post", "res", "y")
    pairs |= {f"ends {k}": (a, b) for k, a, b in zip(ends, out, (h, *gates, y), strict=True)}
    ends = ("x", "phi", "alpha", "bias", "mix x", "mix f", "mix post", "mix res")
    pairs |= {f"ends g_{k}": (a, b) for k, a, b in zip(ends, back, right, strict=True)}
    errors = {name: relative(a, b) for name, (a, b) in pairs.items()}
    wrong = {name: value for name, value in errors.items() if not value <= bound}
    if wrong:
        raise SystemExit(f"wrong results, nothing was timed: {wrong}")
    return errors


def launches_of(run: Callable[[], object]) -> list[Launch]:
    """The kernels that a call launches, and the launches."""
    found: list[Launch] = []
    original = KernelCalls.run

    def noted(call: KernelCalls, spec: KernelSpec, *args: Any, **options: Any) -> Any:
        found.append((spec, partial(original, call, spec, *args, **options)))
        return original(call, spec, *args, **options)

    KernelCalls.run = noted  # type: ignore[method-assign]
    try:
        run()
    finally:
        KernelCalls.run = original  # type: ignore[method-assign]
    return found


def time_kernels(parts: list[dict[str, Tensor]], rule: str, rate: float) -> list[dict[str, Any]]:
    """One row a kernel: the launches of a seam, of a stream's ends, and of both at its start."""
    rows: dict[str, dict[str, Any]] = {}
    starts = [as_start(p) for p in parts]
    for run, given in product((run_seam, run_ends), (parts, starts)):
        run(given[0], rule)  # after which it is known how many programs fit
        sets = [launches_of(partial(run, p, rule)) for p in given]
        for launches in zip(*sets, strict=True):
            spec = launches[0][0]
            if spec.key not in rows:
                time = graph_time([launch for _, launch in launches])
                rows[spec.key] = row_of(spec, len(parts[0]["x"]), time, rate)
    return list(rows.values())


def row_of(spec: KernelSpec, tokens: int, time: float, rate: float) -> dict[str, Any]:
    """A kernel's name, its time, and what its traffic makes of that."""
    flags = [name for name in FLAGS if getattr(spec, name)]
    name = " ".join([spec.op, *flags, *([spec.norm] * (spec.norm != "none"))])
    row: dict[str, Any] = {"kernel": name, "key": spec.key, "us": time}
    moved = traffic(spec, tokens)
    size = sum(moved.read.values()) + sum(moved.written.values())
    return row | {"bytes": size, "GB/s": size / time / 1e3, "of copy": size / time / rate}


def main() -> None:
    """Checks, times, prints."""
    parser = size_parser(__doc__)
    parser.add_argument("--convention", choices=tuple(CONVENTIONS), default="paper")
    parser.add_argument("--sets", type=int, default=3, help="rotating sets of inputs")
    args = parser.parse_args()
    device = need_gpu()
    torch.manual_seed(0)
    dtype, rule = DTYPES[args.dtype], CONVENTIONS[args.convention].key()
    errors: dict[str, float] = {}
    for name, change in (("", dict), ("start: ", as_start)):
        few = change(make_parts(200, args.streams, args.hidden, dtype, device))
        found = check(few, rule, CHECKED[args.dtype])
        errors |= {name + key: value for key, value in found.items()}
    worst = max(errors, key=lambda name: errors[name])
    print(f"checked against float64: largest relative error {errors[worst]:.1e} ({worst})")
    parts = [
        make_parts(args.tokens, args.streams, args.hidden, dtype, device) for _ in range(args.sets)
    ]
    unit = args.tokens * args.hidden * dtype.itemsize
    rate = copy_rate((2 * args.streams + 2) * unit, device)
    rows = time_kernels(parts, rule, rate)
    whole = graph_time([partial(run_seam, p, rule) for p in parts])
    print(f"copy of (2n + 2)C: {rate / 1e6:.3f} TB/s; 1 C at that rate: {unit / rate:.1f} us\n")
    columns = ("kernel", "us", "bytes", "GB/s", "of copy")
    print(tabulate([[row[k] for k in columns] for row in rows], columns, tablefmt="github",
                   floatfmt=("", ".1f", ".0f", ".0f", ".2f")))  # fmt: skip
    print(f"\nseam, forward and backward: {whole:.1f} us = {whole * rate / unit:.1f} C\n")
    print(seam_table(kernel_set(
        args.streams, args.hidden, args.dtype, tokens=args.tokens, seam_only=True
    )))  # fmt: skip
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    sizes = f"{args.tokens} tokens, n = {args.streams}, C = {args.hidden}, {args.dtype}"
    print(f"\n{where}, {sizes}, {args.convention}")
    write_json(args, {"copy_bytes_per_us": rate, "errors": errors, "kernels": rows,
                      "seam_us": whole})  # fmt: skip


if __name__ == "__main__":
    main()
