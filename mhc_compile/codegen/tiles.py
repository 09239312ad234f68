"""How the work of each kernel is cut up, by its sizes."""

from __future__ import annotations

import math
from dataclasses import replace

from mhc_compile.codegen.spec import KernelSpec, Tile

FLAT = ("project", "read_backward", "mix_backward")
"""Operations with a second template, see `Tile.flat`."""
WHOLE_ROWS = ("read", "pre", "pre_backward")
"""Operations whose programs hold whole rows of channels, those of a norm at least."""
GIVEN = ("add_shares",)
"""Operations whose tile says how others cut up their work: there is nothing to choose."""
PRODUCTS = ("project", "seam_backward", "read_backward", "phi_backward")
"""Operations whose tokens and channels are sides of matrix products."""


def choose_tile(spec: KernelSpec, tokens: int) -> Tile:
    """The tile of a kernel; `tokens` matters by its order of magnitude.

    Registers decide: more than 4 streams, and rows of channels that do not begin at multiples of
    16 bytes and are loaded number by number, take smaller tiles or more warps for the same tile.

    Args:
        spec: the kernel; its tile's tokens, parts or shares count where they are another kernel's.
        tokens: how many tokens there are.
    """
    if spec.op in GIVEN:
        return replace(spec.tile, width=1, warps=4, stages=1)
    if spec.op in ("gates", "gates_backward"):
        # "gates_backward" keeps all states, and of sums that may be clamped whether they were.
        full = spec.op == "gates_backward" and spec.rule.sinkhorn_eps_mode == "clamp"
        tokens = 4 if spec.streams > (2 if full else 4) else 8
        return replace(spec.tile, tokens=tokens, width=1, warps=1, stages=1)
    if spec.op == "seam_once":
        width = _width(32, spec.channels)
        return Tile(1, width, min(32, math.ceil(spec.channels / width)))
    if spec.streams > 4 and (flat := flat_tile(spec)):
        return flat
    if spec.op == "project":
        return _project(spec)
    if spec.op == "read":  # whole rows, and programs of as many warps for the gates
        tile = _norm(replace(spec, op="pre"))
        gated = (4 if spec.streams > 4 else 8) * tile.warps
        return replace(tile, shares=spec.tile.shares, gated=gated)
    if spec.norm != "none" and spec.op in WHOLE_ROWS:
        return _norm(spec)
    c, many, odd = spec.channels, spec.streams > 4, spec.channels % 8 != 0
    full = spec.products not in ("split", "bf16")  # products of float32 numbers

    def strips(tokens: int, width: int, warps: int = 4, stages: int = 1, inner: int = 64) -> Tile:
        width = _width(width, c)
        return Tile(tokens, width, math.ceil(c / width), warps, stages, inner)

    if spec.op in ("split_phi", "pad_phi"):
        return strips(1, 8192 // spec.columns, 8 if many or odd else 4)
    if spec.op == "mix":
        if many and not odd and not full:
            return strips(4, 256, 2)
        return strips(2 if many else 4, 512)
    if spec.op in ("pre", "spread"):
        return strips(4, 512)
    if spec.op == "pre_backward":
        return Tile(1, _width(1024, c))
    if spec.op == "seam_backward":
        inner = 128 if spec.streams > 2 else 64
        if full:
            return strips(16 if spec.streams == 3 else 32, 128, 8, 2, inner)
        tile = strips(16, 128, 8 if odd and spec.streams == 4 else 4, 3, inner)
        # What that saves is "add_shares", which reads half; few tokens need all programs.
        joined = tokens >= 2048 and spec.streams == 4 and tile.parts >= 32 and tile.parts % 2 == 0
        return replace(tile, joined=2 if joined else 1)
    if spec.op == "read_backward":
        warps = 8 if many else 2 if odd else 1
        return Tile(16, _width(32, c), math.ceil(c / 128), warps, 1 if many else 2)
    if spec.op == "mix_backward":
        return strips(2 if many else 4, 256)
    assert spec.op == "phi_backward"
    width = 32 if many and full else 128
    return Tile(32, _width(width, spec.streams * c), 1, 4, 2 if many and not full else 3)


def flat_tile(spec: KernelSpec) -> Tile | None:
    """The tile of a kernel's flat form; None if it has none."""
    fewest = 16 >> (spec.streams - 1).bit_length()  # tokens whose streams are 16 rows
    odd, ragged = spec.channels % 8 != 0, spec.channels % 64 != 0
    shapes = {
        "project": (128, 64, 8, 3),
        "read_backward": (64, 64, 8 if ragged else 4, 2),  # masks need registers
        "mix_backward": (max(4, fewest), 256, 4, 1) if odd else (max(8, fewest), 64, 4, 1),
    }
    if spec.op not in FLAT or spec.products not in ("split", "bf16") or spec.mix:
        return None
    tokens, width, warps, stages = shapes[spec.op]
    width = _width(width, spec.channels)
    parts = even_parts(8, spec.channels, width)
    return Tile(tokens, width, parts, warps, stages, flat=True)


def _width(most: int, channels: int) -> int:
    """A power of two of at least 16, as products need, that covers the channels if it may."""
    return max(16, min(most, 1 << (channels - 1).bit_length()))


def even_parts(most: int, channels: int, width: int) -> int:
    """Parts with equally many strips of channels, so that none sticks out, if there are enough."""
    strips = math.ceil(channels / _width(width, channels))
    even = max(parts for parts in range(1, most + 1) if strips % parts == 0)
    return even if 2 * even >= min(most, strips) else min(most, strips)


def _project(spec: KernelSpec) -> Tile:
    """Two warps stream best, but have no registers left for masks or float32 products."""
    full = spec.products not in ("split", "bf16")

    def tile(tokens: int, width: int, warps: int, stages: int = 1) -> Tile:
        width = _width(width, spec.channels)
        return Tile(tokens, width, even_parts(8, spec.channels, width), warps, stages)

    if not spec.mix and spec.streams > 4:
        return tile(16, 16, 8)
    if not spec.mix:
        return tile(64, 32, 4, 2)
    if full:
        return tile(16, 16, 4)
    best = tile(16, 64, 2, 2)
    return tile(16, 32, 4) if replace(spec, tile=best).ragged else best


def _norm(spec: KernelSpec) -> Tile:
    """Whole rows; the backward also keeps sums for the gradients of weight and shift.

    It fetches the next rows ahead where they fit into shared memory and loads are of 16 bytes.
    """
    if spec.op == "pre":
        return Tile(1, spec.row, 1, 8 if spec.channels > 2560 else 4)
    size = (spec.streams + 1) * spec.row
    fit = size <= 5 * 4096 and spec.channels % 8 == 0
    ahead = fit and spec.dtype != "fp32" and spec.target != "hip"
    elements = 512 if spec.streams > (2 if ahead else 4) else 1024  # of a row in each warp
    warps = max(4, min(32, spec.row // elements))
    # Of the longest rows registers hold one program, which may have all of the shared memory.
    return Tile(1, spec.row, 1, warps, 1 if not ahead else 3 if size <= 4 * 4096 else 4)


def tile_fault(spec: KernelSpec) -> str:
    """Why a kernel cannot run with its tile, which would compute something else; "" if it can."""
    tile, c = spec.tile, spec.channels
    sizes = (tile.tokens, tile.width, tile.warps, tile.inner, tile.gated)
    if any(size < 1 or size & (size - 1) for size in sizes):
        return "tokens, width, warps, inner and gated must be powers of two"
    if tile.registers and (tile.registers % 8 or not 32 <= tile.registers <= 256):
        return "registers must be a multiple of 8 from 32 to 256, or 0"
    if tile.warps > 32 or not 1 <= tile.stages <= 8:
        return "it takes up to 32 warps and 1 to 8 stages"
    if min(tile.parts, tile.shares) < 1:
        return "it takes at least 1 part and share"
    if tile.joined != 1 and (
        spec.op != "seam_backward" or tile.joined < 1 or tile.parts % tile.joined
    ):
        return f"{tile.parts} parts of {spec.op} cannot be joined by {tile.joined}"
    if tile.tokens * tile.width > 2**20:
        return "a tile has at most 2**20 elements"
    if tile.flat and not flat_tile(spec):
        return f"{spec.name} in {spec.dtype} has no flat form"
    if spec.op in WHOLE_ROWS and not (spec.op in ("pre", "pre_backward") and spec.norm == "none"):
        whole = tile.tokens == 1 and tile.width == spec.row and tile.parts == 1
        return "" if whole else f"its tile is one whole row, width {spec.row}"
    one_strip = spec.op in ("pre", "spread", "seam_backward", "mix_backward") and not tile.flat
    if one_strip and tile.parts * tile.width < c:
        return f"{tile.parts} parts of {tile.width} channels do not cover {c}"
    if spec.op == "pre_backward" and tile.parts != 1:
        return "it has one part"
    if spec.op in PRODUCTS and min(tile.tokens, tile.width, tile.inner) < 16:
        return "products take at least 16 tokens and 16 channels"
    if spec.op == "mix_backward" and tile.flat:
        rows = tile.tokens << (spec.streams - 1).bit_length()
        return "" if min(rows, tile.width) >= 16 else "products take at least 16 rows and channels"
    return ""


def fits_whole(spec: KernelSpec) -> bool:
    """Whether one kernel can do a seam, or its backward: with more streams registers run out."""
    return spec.streams <= 4
