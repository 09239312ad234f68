"""Bytes that the kernels move: in closed form, and counted while their source runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from mhc_compile.codegen.shares import shares_of
from mhc_compile.codegen.signature import Argument, arguments, counts
from mhc_compile.codegen.spec import KernelSpec
from mhc_compile.codegen.tiles import fits_whole
from mhc_compile.errors import MHCError


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written by one launch, by argument; each byte counts once.

    `scratch` is what a kernel writes and reads again at once, for one tile after another: it stays
    in the caches, so that neither `read` nor `written` has it.
    """

    read: dict[str, int]
    written: dict[str, int]
    scratch: dict[str, int] = field(default_factory=dict)


def _used(spec: KernelSpec) -> tuple[str, str]:
    """Names of the arguments that a kernel reads, and of those that it writes."""
    split = spec.products == "split"
    low = " low" if split else ""
    normed = spec.norm != "none"
    weight = " weight" if normed and spec.weight else ""
    shift = " shift" if normed and spec.shift else ""
    if spec.op == "split_phi":
        return "phi", f"high{low}"
    if spec.op == "pad_phi":
        return "phi", "phi_high"
    if spec.op == "mix":
        return "x f post res", "y"
    if spec.op == "project":
        mix = " f post res" if spec.mix else ""
        return f"x{mix} high{low}", ("y " if spec.mix else "") + "partial"
    if spec.op == "seam_once":
        out = "y h pre post_next res_next proj square"
        return f"x f post res phi alpha bias{weight}{shift}", out
    if spec.op == "gates":
        return "partial alpha bias", "pre post res proj square"
    if spec.op == "read":
        return f"x partial alpha bias{weight}{shift}", "pre post res proj square h"
    if spec.op == "pre":
        return f"x pre{weight}{shift}", "h"
    if spec.op == "pre_backward":
        h = " h" if spec.again else ""
        if not normed:
            return "x g_out" + (" pre" if h else ""), f"g_pre{h}"
        sums = (" weight_shares" if weight else "") + (" shift_shares" if shift else "")
        return f"x pre g_out{weight}", f"{'norms' if fits_whole(spec) else 'g_h'} g_pre{h}{sums}"
    if spec.op == "spread":
        return "pre g_h", "g_x"
    if spec.op == "gates_backward":
        mixed, own = (" res post pre", "maps") if spec.mix else ("", "scale")
        mixed += " norms" if normed else ""
        return f"proj square alpha bias g_pre g_post g_res{mixed}", f"high{low} {own} sums"
    if spec.op == "seam_backward":
        low = " dh_low" if split else ""
        return f"x f g_y g_out{weight} maps phi_high dh_high{low}", "g_x g_f dots"
    if spec.op == "read_backward":
        more = (" dh_low" if split else "") + (" g_y" if spec.carry else "")
        return f"y pre g_h scale phi_high dh_high{more}", "g"
    if spec.op == "mix_backward":
        return "x f post res g_y", "g_x g_f dots"
    if spec.op == "phi_backward":
        return "y dh_high" + (" dh_low" if split else ""), "phi_shares"
    if spec.op == "add_shares":
        parts = shares_of(spec)
        results = (name for part in parts for name, _ in part.results)
        return " ".join(part.name for part in parts), " ".join(results)
    raise MHCError(f"the traffic of kernel {spec.op!r} is not stated: add it to traffic.py")


# What a kernel keeps in the caches between its own phases.
_SCRATCH = {"seam_backward": ("products",), "seam_once": ("partial", "arrived")}


def _sides(spec: KernelSpec) -> Iterator[list[Argument]]:
    by_name = {argument.name: argument for argument in arguments(spec)}
    for names in _used(spec):
        yield [by_name[name] for name in names.split()]


def _slice_bytes(spec: KernelSpec, argument: Argument) -> int:
    """Bytes that a kernel moves of one slice; the padding of phi's columns may stay where it is."""
    columns = spec.columns
    if spec.op == "project" and spec.mix:
        columns = spec.maps
    elif spec.tile.flat or spec.op == "phi_backward":
        columns = sum(width for _, width in spec.pieces)
    padded = argument.name in ("high", "low", "phi_high", "dh_high", "dh_low")
    return argument.slice_bytes * columns // spec.columns if padded else argument.slice_bytes


def traffic(spec: KernelSpec, tokens: int) -> Traffic:
    """Bytes of one launch in closed form: the sizes of what the operation reads and writes.

    What a kernel reads twice counts once, as it would with a cache that holds it; what it reads of
    its own results counts as written alone.

    Example:
        >>> from mhc_compile.codegen.spec import Tile
        >>> spec = KernelSpec("pre", 4, 512, "bf16", Tile(4, 512))
        >>> traffic(spec, 10)  # n C + n maps in, C out
        Traffic(read={'x': 40960, 'pre': 160}, written={'h': 10240}, scratch={})
    """
    count = counts(spec, tokens)
    read, written = (
        {argument.name: _slice_bytes(spec, argument) * count[argument.each] for argument in side}
        for side in _sides(spec)
    )
    scratch = {
        argument.name: argument.slice_bytes * count[argument.each]
        for argument in arguments(spec)
        if argument.name in _SCRATCH.get(spec.op, ())
    }
    return Traffic(read, written, scratch)


def bytes_per_token(spec: KernelSpec) -> float:
    """Bytes read and written for each of many tokens: what does not grow with them is left out.

    So is scratch, whose size is that of the GPU and which stays in its caches.
    """
    share = {"tokens": 1.0, "tiles": 1 / spec.tile.tokens}
    return sum(a.slice_bytes * share.get(a.each, 0.0) for side in _sides(spec) for a in side)


@dataclass
class Counted:
    """What a run in the interpreter moved, by argument, in bytes.

    Attributes:
        read: distinct bytes, what a cache of any size must still fetch.
        written: distinct bytes.
        read_total: with repetitions, what the L2 cache serves.
        written_total: with repetitions.
    """

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    read_total: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    written_total: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@contextmanager
def count_traffic(tensors: dict[str, torch.Tensor]) -> Iterator[Counted]:
    """Counts the bytes that interpreted kernels move in these tensors while the context is open.

    Args:
        tensors: CPU tensors by argument name; the result is complete when the context closes.

    Example (needs TRITON_INTERPRET=1):
        with count_traffic(tensors) as counted:
            interpreter.run(spec, grid, **tensors)
    """
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
    starts = np.array([tensors[name].data_ptr() for name in names], dtype=np.uint64)
    seen = {side: defaultdict[str, list[Any]](list) for side in ("read", "written")}
    counted = Counted()

    def note(side: str, pointers: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[live]
        if addresses.size == 0:
            return
        owners = np.searchsorted(starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            tensor = tensors[names[owner]]
            mine = addresses[owners == owner]
            if owner < 0 or int(mine.max()) >= tensor.data_ptr() + tensor.nbytes:
                raise MHCError(f"a kernel has {side} outside of its tensors, near {names[owner]!r}")
            seen[side][names[owner]].append(np.unique(mine))
            total = counted.read_total if side == "read" else counted.written_total
            total[names[owner]] += mine.size * tensor.itemsize

    before = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        note("read", pointers, mask)
        return before["create_masked_load"](self, pointers, mask, *rest, **more)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        note("written", pointers, mask)
        return before["create_masked_store"](self, pointers, value, mask, *rest, **more)

    def atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("written", pointers, mask)
        return before["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    try:
        for name, function in zip(before, (load, store, atomic), strict=True):
            setattr(builder, name, function)
        yield counted
    finally:
        for name, function in before.items():
            setattr(builder, name, function)
    for side, total in (("read", counted.read), ("written", counted.written)):
        for name, chunks in seen[side].items():
            total[name] = np.unique(np.concatenate(chunks)).size * tensors[name].itemsize


# Other designs, as (a, b) for (a n + b) C elements a token and seam, forward and backward.
# The bound and the paper's kernels: arXiv 2512.24880, section 4.3.1 and table 2. The others: read
# off their public code, without the sublayer's norm, with what autograd adds.
_DESIGNS: tuple[tuple[str, tuple[int, int], tuple[int, int] | None], ...] = (
    ("bound: each tensor read once, written once", (2, 2), (3, 3)),
    ("the paper's three kernels", (4, 2), None),
    ("TileKernels 1.0.0", (4, 2), (9, 3)),
    ("TransformerEngine 2.20.2, at its best", (4, 2), (14, 3)),
    ("Liger 0.8.5", (8, 6), (25, 11)),
)


def seam_units(specs: Iterable[KernelSpec]) -> tuple[float, float]:
    """Bytes a token of the forward and the backward seam, in units of C elements.

    Args:
        specs: the kernels of one seam, see `kernel_set`; those for phi alone move nothing a token,
            what computes h again is for recompute.
    """
    forward = backward = 0.0
    for spec in specs:
        if spec.again:
            continue
        itemsize = 4 if spec.dtype == "fp32" else 2
        units = bytes_per_token(spec) / (spec.channels * itemsize)
        if spec.op.endswith("_backward") or spec.op == "add_shares":
            backward += units
        else:
            forward += units
    return forward, backward


def seam_table(specs: Iterable[KernelSpec]) -> str:
    """A Markdown table: these kernels beside the bound, the paper and other libraries."""
    specs = tuple(specs)
    n = specs[0].streams

    def cell(units: tuple[int, int] | None) -> str:
        return f"({units[0]}n + {units[1]})C = {units[0] * n + units[1]}C" if units else ""

    rows = [(name, cell(first), cell(second)) for name, first, second in _DESIGNS]
    forward, backward = (f"{units:.2f}C" for units in seam_units(specs))
    rows.append((f"these kernels, C = {specs[0].channels}", forward, backward))
    headers = (f"elements a token and seam, n = {n}", "forward", "backward")
    return tabulate(rows, headers, tablefmt="github")
