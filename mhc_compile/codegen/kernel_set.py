"""The kernels that one size of model needs."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Any

from mhc_compile.codegen.spec import OPS, KernelSpec, Tile
from mhc_compile.codegen.tiles import choose_tile, fits_whole
from mhc_compile.conventions import Convention

# The seam, forward and backward, and what stands at the ends of a stream: a read without a mix
# before it, a mix without a read after it.
_NORMS: tuple[dict[str, Any], ...] = (
    {"norm": "rms", "weight": True},
    {},
    {"norm": "rms"},
    {"norm": "layer"},
    {"norm": "layer", "weight": True},
    {"norm": "layer", "weight": True, "shift": True},
)
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "project": ({"mix": True}, {}),
    "pre": _NORMS,
    "pre_backward": _NORMS,
    "read_backward": ({"carry": True}, {}),
}


def has_template(op: str) -> bool:
    """Whether an operation is there as a generated kernel."""
    return (resources.files("mhc_compile.codegen") / "templates" / f"{op}.py.jinja").is_file()


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
        seam_only: only the kernels between two sublayers with an RMSNorm, none of a stream's ends.

    Raises:
        MHCError: a value that the kernels do not support.
    """
    products = "split" if dtype == "bf16" else "tf32x3"
    specs = []
    whole = fits_whole(KernelSpec("mix", streams, channels, dtype, Tile(16), products))
    ends = {"mix", "read_backward", "mix_backward"} if whole else {"mix"}
    for op in filter(has_template, OPS):
        if seam_only and op in ends or op == "seam_backward" and not whole:
            continue
        for fields in _VARIANTS.get(op, ({},))[: 1 if seam_only else None]:
            spec = KernelSpec(
                op, streams, channels, dtype, Tile(16), products, target=target, **fields,
            )  # fmt: skip
            if op.startswith("gates") and rule is not None:
                spec = replace(spec, rule=rule)
            specs.append(replace(spec, tile=choose_tile(spec, tokens)))
    # The parts that "gates" kernels add up are those of the kernel before.
    mixes = [spec.tile.parts for spec in specs if spec.op == "project"]
    return tuple(
        replace(spec, tile=replace(spec.tile, parts=mixes[0])) if spec.op == "gates" else spec
        for spec in specs
    )
