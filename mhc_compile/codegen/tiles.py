"""How the work of each kernel is cut up, by its sizes."""

from __future__ import annotations

import math
from dataclasses import replace

from mhc_compile.codegen.spec import KernelSpec, Tile


def choose_tile(spec: KernelSpec, tokens: int) -> Tile:
    """The tile of a kernel; `tokens` matters by its order of magnitude alone.

    Args:
        spec: the kernel; `spec.tile.parts` counts where the parts come from another kernel.
        tokens: how many tokens there are.
    """
    c, n = spec.channels, spec.streams
    short = 1 << (c - 1).bit_length()
    if spec.op == "split_phi":
        return Tile(1, min(256, short))
    if spec.op == "mix":
        width = min(512, short)
        return Tile(4, width, math.ceil(c / width), 4)
    if spec.op == "project":
        width = max(16, min(64, short))
        parts = min(8, math.ceil(c / width))
        return Tile(16, width, parts, 2, 2) if spec.mix else Tile(64, width, parts, 4, 3)
    if spec.op == "seam_once":
        width = max(16, min(32, short))
        few = 1 if tokens <= 16 else 2
        return Tile(few, width, min(32, math.ceil(c / width)), 4)
    if spec.op in ("gates", "gates_backward"):
        tokens = 8 if n <= 4 else 4
        return replace(spec.tile, tokens=tokens, width=1, warps=1, stages=1)
    if spec.op == "pre":
        if spec.norm != "none":
            return Tile(1, short, 1, 8 if c > 2560 else 4)
        width = min(512, short)
        return Tile(4, width, math.ceil(c / width), 4)
    if spec.op == "pre_backward":
        if spec.norm != "none":
            return Tile(1, short, 1, 4)
        return Tile(1, min(1024, short), 1, 4)
    if spec.op == "seam_backward":
        width = max(16, min(256, short))
        return Tile(64, width, math.ceil(c / width), 4, 2, 128)
    if spec.op == "read_backward":
        width = max(16, min(32, short))
        return Tile(16, width, math.ceil(c / 128), 1, 2)
    if spec.op == "mix_backward":
        width = min(256, short)
        return Tile(4, width, math.ceil(c / width), 4)
    assert spec.op == "phi_backward"
    return Tile(32, max(16, min(128, 1 << (n * c - 1).bit_length())), 1, 4, 3)



def fits_whole(spec: KernelSpec) -> bool:
    """Whether one kernel can do a seam, or its backward: with more streams registers run out."""
    return spec.streams <= 4
