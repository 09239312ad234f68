"""The kernels that one size of model needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mhc_compile.codegen.spec import EQUAL, GATED, OPS, KernelSpec, Tile
from mhc_compile.codegen.tiles import choose_tile, fits_whole
from mhc_compile.conventions import Convention

_NORMS: tuple[dict[str, Any], ...] = (
    {"norm": "rms", "weight": True},
    {},
    {"norm": "rms"},
    {"norm": "layer"},
    {"norm": "layer", "weight": True},
    {"norm": "layer", "weight": True, "shift": True},
)


def _variants(whole: bool, seam_only: bool) -> list[tuple[str, dict[str, Any]]]:
    """Operations with their fields, as `launch.py` asks for them."""
    norms = _NORMS[:1] if seam_only else _NORMS
    found: list[tuple[str, dict[str, Any]]] = [
        (op, {}) for op in ("split_phi", "pad_phi", "phi_backward")
    ]
    if whole:
        kinds = dict.fromkeys(norm.get("norm", "none") for norm in norms)
        found += [("gates_backward", {"mix": True, "norm": kind}) for kind in kinds]
    if not (whole and seam_only):
        found += [("gates_backward", {})]
    found += [(op, norm) for op in ("read", "pre_backward") for norm in norms]
    if whole:
        # A shift is nothing to seam_backward, and with one h is not made again.
        plain = [norm for norm in norms if not norm.get("shift")]
        found += [("project", {"mix": True}), *(("seam_backward", norm) for norm in plain)]
        found += [("pre_backward", norm | {"again": True}) for norm in plain]
    else:
        found += [("read_backward", {"carry": True})]
    affine = dict.fromkeys((norm.get("weight", False), norm.get("shift", False)) for norm in norms)
    found += [("add_shares", affine_sums(*given) | {"mix": True}) for given in affine]
    if not (whole and seam_only):
        found += [(op, {}) for op in ("mix", "project", "mix_backward")]
    if not seam_only:
        found += [("add_shares", {})]
        found += [("pre", norm) for norm in norms]
        found += [(op, {}) for op in ("gates", "spread", "read_backward")]
        found += [(op, {"equal": True}) for op in EQUAL if op != "seam_backward"]
        if whole:
            found += [("project", {"mix": True, "equal": True})]
            found += [("seam_backward", norm | {"equal": True}) for norm in plain]
        found += [("seam_once", norm) for norm in norms if whole]
    return sorted(found, key=lambda pair: OPS.index(pair[0]))


def affine_sums(weight: bool, shift: bool) -> dict[str, Any]:
    """The fields of "add_shares" for a norm that has these; which norm makes no difference."""
    norm = "layer" if shift else "rms" if weight else "none"
    return {"norm": norm, "weight": weight, "shift": shift}


def kernel_set(
    streams: int,
    channels: int,
    dtype: str = "bf16",
    *,
    tokens: int = 8192,
    rule: Convention | None = None,
    target: str = "cuda",
    seam_only: bool = False,
) -> tuple[KernelSpec, ...]:
    """All kernels for n streams of C channels, each with the tile it would run with.

    Args:
        streams: n.
        channels: C.
        dtype: of the streams, "bf16", "fp16" or "fp32".
        tokens: how many tokens a call has; the tiles depend on its order of magnitude.
        rule: the convention, the paper's where left out.
        target: "cuda", "hip" or "interpret".
        seam_only: only the kernels between two sublayers with an RMSNorm, for many tokens: none of
            a stream's ends, nor the one of few tokens.

    Raises:
        MHCError: a value that the kernels do not support.
    """
    base = KernelSpec(
        "mix", streams, channels, dtype, Tile(16), "split" if dtype == "bf16" else "tf32x3",
        target=target,
    )  # fmt: skip
    specs = []
    for op, fields in _variants(fits_whole(base), seam_only):
        spec = replace(base, op=op, **fields)
        if op in GATED and rule is not None:
            spec = replace(spec, rule=rule)
        specs.append(replace(spec, tile=choose_tile(spec, tokens)))
    # What some add up are the parts of the kernels before.
    tiles = {spec.op: spec.tile for spec in specs if not spec.equal}
    products, last = tiles["project"], "seam_backward" if fits_whole(base) else "mix_backward"
    (dots,) = {spec.dots for spec in specs if spec.op == last}
    given: dict[str, dict[str, Any]] = {
        "gates": {"parts": products.parts},
        "read": {"shares": products.parts},
        "add_shares": {"parts": dots, "tokens": tiles["gates_backward"].tokens},
    }
    return tuple(
        replace(spec, tile=replace(spec.tile, **given[spec.op])) if spec.op in given else spec
        for spec in specs
    )
