"""The operators on random inputs, and the same in float64 by the reference.

    case = Case("seam", n=4, channels=33, tokens=5, dtype=torch.bfloat16, norm="rms")
    p = inputs_of(case, device)                      # leaves, by name
    got = run(case, p)                               # torch.ops.mhc.*
    right = run_reference(case, widened(p), got)     # float64

A reference starts from the same rounded inputs. Streams that an operator has rounded (y) enter it
as they are, with the gradient of what was rounded: so each difference is one of the kernels' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from mhc_compile import reference
from mhc_compile.codegen import launch
from mhc_compile.conventions import CONVENTIONS, Convention
from mhc_compile.map_layout import as_components

OPERATORS = ("coefficients", "pre", "post_res", "read", "seam", "expand", "collapse")
F64 = torch.float64
OWN = {
    "outside": Convention("o", norm_eps=0.1, norm_eps_place="outside", sinkhorn_iters=2),
    "clamp": Convention(
        "c", sinkhorn_eps=0.3, sinkhorn_eps_mode="clamp", sinkhorn_iters=4, res_transposed=True
    ),
    "exp with eps": Convention("e", sinkhorn_eps=0.05, sinkhorn_eps_mode="add", pre_eps=0.1),
    "softmax": Convention("s", sinkhorn_start="softmax", sinkhorn_order="row_col"),
    "one": Convention("1", sinkhorn_iters=1, post_multiplier=1.0),
    "one by rows": Convention(
        "r", sinkhorn_iters=1, sinkhorn_start="softmax", sinkhorn_order="row_col",
        sinkhorn_start_is_step=True, sinkhorn_eps=1e-6, sinkhorn_eps_mode="add",
    ),
}  # fmt: skip
RULES = {**CONVENTIONS, **OWN}
NORMS = {
    "none": ("none", False, False),
    "rms": ("rms", True, False),
    "rms plain": ("rms", False, False),
    "layer": ("layer", True, True),
    "layer plain": ("layer", False, False),
    "layer weight": ("layer", True, False),
}
"""A norm, whether it has a weight, whether it has a shift."""
EPS = 1e-3
LOGITS = ("logits of pre", "logits of post", "logits of res")


@dataclass(frozen=True)
class Case:
    """One operator, its sizes and what else its result depends on.

    `apart`: a seam of few tokens, too, as the launches that many tokens have.
    """

    op: str
    n: int = 4
    channels: int = 33
    tokens: int = 3
    dtype: torch.dtype = torch.bfloat16
    rule: str = "paper"
    norm: str = "none"
    parameters: torch.dtype = torch.float32
    apart: bool = False

    def __str__(self):
        sizes = f"{self.op}-n{self.n}-C{self.channels}-T{self.tokens}-{str(self.dtype)[6:]}"
        rule = f"-{self.rule}" if self.op in ("coefficients", "read", "seam") else ""
        norm = f"-{self.norm}" + "-apart" * self.apart if self.op == "seam" else ""
        return sizes + rule + norm

    @property
    def key(self):
        return RULES[self.rule].key()


def inputs_of(case: Case, device, scale: float = 1.0) -> dict[str, Tensor]:
    """What the operator takes, as leaves."""
    n, channels, columns = case.n, case.channels, case.n * (case.n + 2)

    def normal(*shape):
        return torch.randn(shape, device=device)

    post, res = 2 * normal(case.tokens, n).sigmoid(), normal(case.tokens, n, n).softmax(-1)
    projection = {
        "phi": normal(n * channels, columns) * 2 * scale * (n * channels) ** -0.5,
        "alpha": torch.tensor([0.9, 1.1, 1.3], device=device),
        "bias": 0.5 * normal(columns),
    }
    projection = {name: value.to(case.parameters) for name, value in projection.items()}
    x = {"x": normal(case.tokens, n, channels).to(case.dtype)}
    f = {"f": normal(case.tokens, channels).to(case.dtype)}
    made = {
        "coefficients": lambda: x | projection,
        "read": lambda: x | projection,
        "pre": lambda: x | {"pre": post},
        "post_res": lambda: x | f | {"post": post, "res": res},
        "seam": lambda: x | f | {"post": post, "res": res} | projection,
        "expand": lambda: {"x": f["f"]},
        "collapse": lambda: x | {"weight": normal(n)},
    }[case.op]()
    _, weight, shift = NORMS[case.norm]
    if weight:
        made["norm weight"] = (1 + 0.2 * normal(channels)).to(case.dtype)
    if shift:
        made["norm shift"] = normal(channels).to(case.dtype)
    return {name: value.requires_grad_() for name, value in made.items()}


def run(case: Case, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The results that have gradients."""
    op, values = getattr(torch.ops.mhc, case.op), list(p.values())
    if case.op in ("coefficients", "read"):
        return op(*values, case.key)[:-2]
    if case.op == "seam":
        affine = (p.get("norm weight"), p.get("norm shift"))
        with mock.patch.object(launch, "FEW_TOKENS", 0 if case.apart else launch.FEW_TOKENS):
            return op(*values[:7], *affine, NORMS[case.norm][0], EPS, case.key)[:-2]
    out = op(*values, case.n) if case.op == "expand" else op(*values)
    return (out,)


def widened(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64, as leaves of their own."""
    return {
        name: value.detach().to(F64, copy=True).requires_grad_(value.requires_grad)
        for name, value in p.items()
    }


def run_reference(case: Case, p: dict[str, Tensor], got: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results in float64; `got` is what the kernels gave."""
    if case.op == "expand":
        return (reference.expand_streams(p["x"], case.n),)
    if case.op == "collapse":
        return (reference.collapse_streams(p["x"], p["weight"]),)
    if case.op == "pre":
        return (reference.apply_pre(p["x"], p["pre"]),)
    if case.op == "post_res":
        return (reference.apply_post_res(p["x"], p["f"], p["post"], p["res"]),)
    x = p["x"]
    mixed = ()
    if case.op == "seam":
        y = reference.apply_post_res(x, p["f"], p["post"], p["res"])
        mixed, x = (y,), y + (got[0].detach().to(F64) - y).detach()
    gates = _maps(case, p, x)
    if case.op == "coefficients":
        return gates
    return *mixed, _normed(case, p, reference.apply_pre(x, gates[0])), *gates


def _maps(case: Case, p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """As `reference.coefficients`; p gets the logits and what alpha was multiplied with."""
    rule = RULES[case.rule]
    projected = reference.project_streams(x, p["phi"])
    divisor = reference.norm_divisor(x, rule.norm_eps, place=rule.norm_eps_place)
    logits = reference.gate_logits(projected, divisor, p["alpha"], p["bias"], n=case.n)
    if logits[0].requires_grad:
        p |= dict(zip(LOGITS, logits, strict=True))
    p["normed"] = (projected / divisor.unsqueeze(-1)).detach()
    return (
        reference.pre_gate(logits[0], rule.pre_eps),
        reference.post_gate(logits[1], rule.post_multiplier),
        reference.res_map(logits[2], convention=rule),
    )


def _normed(case: Case, p: dict[str, Tensor], h: Tensor) -> Tensor:
    norm = NORMS[case.norm][0]
    if norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    if norm != "none":
        h = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return h * p.get("norm weight", 1.0) + p.get("norm shift", 0.0)


def names_of(case: Case) -> tuple[str, ...]:
    """What `run` returns."""
    maps = ("pre", "post", "res")
    return {"coefficients": maps, "read": ("h", *maps), "seam": ("y", "h", *maps)}.get(
        case.op, ("y" if case.op in ("post_res", "expand") else "h",)
    )


def cotangents(case: Case, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the results: those of maps as large as a sublayer of C channels makes them."""
    sizes = dict.fromkeys(("pre", "post", "res"), math.sqrt(case.channels))
    return [
        (torch.randn(out.shape, device=out.device) * sizes.get(name, 1.0)).to(out.dtype)
        for name, out in zip(names_of(case), outputs, strict=True)
    ]


def gradients(
    outputs: tuple[Tensor, ...], p: dict[str, Tensor], given: list[Tensor | None]
) -> dict[str, Tensor | None]:
    """By name of the input; a result with None in its place is not used."""
    pairs = [(out, g.to(out.dtype)) for out, g in zip(outputs, given, strict=True) if g is not None]
    leaves = {name: value for name, value in p.items() if value.requires_grad}
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
    )
    return dict(zip(leaves, found, strict=True))


def bound_of(case: Case, name: str, backward: bool) -> float:
    """The largest error, as a share of the largest number of the tensor.

    float32 sums of products: 2e-5, which leaves room for the three-fold tf32 products of a GPU.
    bf16 streams are multiplied with phi as the sum of two bf16 numbers, so that each of its numbers
    has a relative error below 2**-16; logits of the size of 2 and Sinkhorn's slopes: 2**-13.
    What is rounded to the streams' dtype has an error of eps / 2; in a backward up to three
    rounded numbers (the gradient of h's norm, the products with phi, the result) add up: 2 eps.
    """
    floor = 2.0**-13 if case.dtype == torch.bfloat16 else 2e-5
    unit = torch.finfo(case.dtype).eps
    if not backward:
        return floor + (unit / 2 if name in ("y", "h") else 0)
    # Nothing that was rounded enters the gradients of what is float32 itself, but for a seam.
    single = name in ("phi", "alpha", "bias") if case.op == "seam" else name not in ("x", "f")
    return floor if single and case.norm == "none" else floor + 2 * unit


def error(got: Tensor, right: Tensor, size: float = 0.0) -> float:
    """The largest difference as a share of the largest number; infinite for what is not finite.

    `size` counts as the largest number where it is larger.
    """
    if right.numel() == 0:
        return 0.0
    difference = float((got.detach().to(F64) - right.detach().to(F64)).abs().max())
    ratio = difference / max(float(right.detach().abs().max()), size, 1e-30)
    return ratio if math.isfinite(ratio) else math.inf


def _sizes(back: dict[str, Tensor | None], wide: dict[str, Tensor]) -> dict[str, float]:
    """Sums of the magnitudes that the gradients of alpha and bias add up: these may cancel."""
    grads = [back.get(name) for name in LOGITS]
    if all(g is None for g in grads) or wide["normed"].numel() == 0:
        return {}
    parts = wide["normed"].split([wide[name][0].numel() for name in LOGITS], -1)
    flat = [0 * part if g is None else g.reshape(part.shape)
            for g, part in zip(grads, parts, strict=True)]  # fmt: skip
    return {
        "bias": max(float(g.abs().sum(0).max()) for g in flat),
        "alpha": max(float((g * part).abs().sum()) for g, part in zip(flat, parts, strict=True)),
    }


def check(case: Case, p: dict[str, Tensor], used=None, bounds=bound_of) -> dict[str, float]:
    """Compares results and gradients; the errors by name."""
    got = run(case, p)
    wide = widened(p)
    right = run_reference(case, wide, got)
    given: list[Tensor | None] = list(cotangents(case, got))
    if used is not None:
        given = [g if name in used else None for name, g in zip(names_of(case), given, strict=True)]
    errors, allowed = {}, {}
    for name, a, b in zip(names_of(case), got, right, strict=True):
        kept = {"pre": 1, "post": 1, "res": 2}.get(name, 0)
        assert a.shape == b.shape and (as_components(a, kept) if kept else a).is_contiguous(), name
        assert not kept or as_components(a, kept).data_ptr() == a.data_ptr(), name
        assert a.dtype == (case.dtype if name in ("y", "h") else torch.float32), name
        errors[name], allowed[name] = error(a, b), bounds(case, name, False)
    back, right_back = gradients(got, p, given), gradients(right, wide, given)
    sizes = _sizes(right_back, wide)
    for name, a in back.items():
        b, label = right_back[name], f"gradient of {name}"
        if b is None or a is None:
            # An operator may give zeros where the reference has no dependence.
            zero = [t for t in (a, b) if t is not None]
            assert all(not t.any() for t in zero), label
            continue
        assert a.shape == p[name].shape and a.dtype == p[name].dtype, label
        rounding = torch.finfo(p[name].dtype).eps if p[name].dtype != torch.float32 else 0.0
        errors[label] = error(a, b, sizes.get(name, 0.0))
        allowed[label] = bounds(case, name, True) + rounding
    wrong = {name: (value, allowed[name]) for name, value in errors.items()
             if not value <= allowed[name]}  # fmt: skip
    assert not wrong, f"{case}: {wrong}"
    return errors
