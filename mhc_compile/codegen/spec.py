"""What one generated kernel is for: everything that its source text depends on."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mhc_compile.conventions import Convention
from mhc_compile.errors import MHCError

OPS = (
    "split_phi", "pad_phi", "mix", "project", "gates", "pre", "read", "seam_once", "pre_backward",
    "spread", "gates_backward", "seam_backward", "read_backward", "mix_backward", "phi_backward",
    "add_shares",
)  # fmt: skip
GATED = ("gates", "read", "gates_backward", "seam_once")
"""Operations that depend on the convention."""
EQUAL = {
    "mix": "x", "project": "x", "read": "x", "pre": "x", "pre_backward": "x", "mix_backward": "x",
    "seam_backward": "x", "read_backward": "y", "phi_backward": "y",
}  # fmt: skip
"""Operations that may be told that all streams are equal, and the argument that then has one."""
DTYPES = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
PRODUCTS = ("split", "bf16", "tf32x3", "tf32")
NORMS = ("none", "rms", "layer")
TARGETS = ("cuda", "hip", "interpret")
MAX_STREAMS = 8
FLAGS = ("mix", "carry", "again", "equal")
"""Variants other than those of norms, as they stand in a kernel's name."""


@dataclass(frozen=True)
class Tile:
    """How the work of one kernel is cut up.

    Attributes:
        tokens: tokens a program works on at a time, a power of two.
        width: channels a program works on at a time, a power of two.
        parts: in how many parts programs share the channels of one token tile.
        warps: warps of a program.
        stages: depth of the software pipeline.
        inner: channels of one matrix product, a power of two.
        shares: in how many parts products come to "read" from the kernel before.
        gated: tokens of a program of "read" that computes gates, a power of two.
        joined: parts that a program of "seam_backward" takes one after another, whose sums over
            channels it adds up.
        registers: most registers of a thread on NVIDIA's GPUs, a multiple of 8, so that more
            programs fit; 0 is as many as Triton comes to.
        flat: the code has one loop over all streams, or one product of them, instead of a copy for
            each: for many streams, and bf16 products alone.
    """

    tokens: int
    width: int = 1
    parts: int = 1
    warps: int = 4
    stages: int = 1
    inner: int = 64
    shares: int = 1
    gated: int = 1
    joined: int = 1
    registers: int = 0
    flat: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: the operation, its sizes and types, and how its work is cut up.

    Attributes:
        op: a name in `OPS`, which is also that of the template.
        streams: n.
        channels: C, channels of one stream.
        dtype: of streams, sublayer results and their gradients: "bf16", "fp16" or "fp32".
        products: how vec(x) @ phi is computed. "split": phi as the sum of two bf16 numbers
            (relative error of phi below 2**-16), exact bf16 products, float32 sums; "bf16": phi in
            bf16 alone; "tf32x3" and "tf32": as in Triton, on float32 operands. In the gradient of x
            phi is in bf16 for "split" too, and what it is multiplied by is such a sum.
        tile: see `Tile`.
        rule: the numerical axes; only those of `GATED` depend on it.
        mix: the streams are mixed first, y = res x + post f ("project"), or were ("gates_backward",
            "add_shares").
        carry: a gradient of the streams is added ("read_backward").
        norm: the norm of the next sublayer, done with the read ("pre", "read", "pre_backward",
            "seam_once", "add_shares"), or whose gradient enters ("gates_backward", "seam_backward",
            with the tile of without).
        weight: that norm has a weight.
        shift: that norm has a shift.
        equal: all streams are the same memory, `[tokens, C]`, as where a stream starts (`EQUAL`),
            with the tile of without.
        again: h is computed too ("pre_backward" without shift), with the tile of without.
        target: "cuda", "hip" or "interpret" (Triton's interpreter on a CPU).
    """

    op: str
    streams: int
    channels: int
    dtype: str
    tile: Tile
    products: str = "split"
    rule: Convention = field(default_factory=lambda: Convention("paper"))
    mix: bool = False
    carry: bool = False
    norm: str = "none"
    weight: bool = False
    shift: bool = False
    again: bool = False
    equal: bool = False
    target: str = "cuda"

    def __post_init__(self) -> None:
        """Checks each field; the kernels themselves check nothing."""
        for name, value, allowed in (
            ("op", self.op, OPS), ("dtype", self.dtype, tuple(DTYPES)),
            ("products", self.products, PRODUCTS), ("norm", self.norm, NORMS),
            ("target", self.target, TARGETS),
        ):  # fmt: skip
            if value not in allowed:
                raise MHCError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise MHCError(f"streams must be 1 to {MAX_STREAMS}, got {self.streams!r}")
        if self.channels < 1:
            raise MHCError(f"channels must be at least 1, got {self.channels!r}")
        if self.products in ("split", "bf16") and self.dtype != "bf16":
            raise MHCError(f"products={self.products!r} needs dtype 'bf16', got {self.dtype!r}")
        if self.equal and self.op not in EQUAL:
            raise MHCError(f"{self.op!r} has no form for equal streams")
        for name, size in (("tokens", self.tile.tokens), ("width", self.tile.width)):
            if size < 1 or size & (size - 1):
                raise MHCError(f"tile.{name} must be a power of two, got {size!r}")

    def __hash__(self) -> int:
        """Of all fields, once: every launch looks its kernel up."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, each.name) for each in fields(self)))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: in another process strings have other hashes."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def function(self) -> str:
        """The kernel's name in its module and in profiles."""
        return f"mhc_{self.op}"

    @property
    def name(self) -> str:
        """The operation and its variant, as in "project_mix" or "pre_rms_weight"."""
        flags = [flag for flag in FLAGS if getattr(self, flag)]
        norm = [self.norm] if self.norm != "none" else []
        affine = [flag for flag in ("weight", "shift") if norm and getattr(self, flag)]
        return "_".join([self.op, *flags, *norm, *affine])

    @property
    def tiled_as(self) -> KernelSpec:
        """The kernel whose measured tile this one runs with: most often itself."""
        if self.op in ("seam_backward", "gates_backward"):
            return replace(self, norm="none", weight=False, equal=False)
        return replace(self, again=False, equal=False) if self.again or self.equal else self

    @staticmethod
    def fields_of(name: str) -> dict[str, Any]:
        """The operation and the variant that a `name` stands for, as fields."""
        for op in sorted(OPS, key=len, reverse=True):
            flags = name[len(op) :].split("_")[1:]
            if name != "_".join([op, *flags]):
                continue
            norm = [flag for flag in flags if flag in NORMS[1:]]
            known = [f for f in flags if f in (*FLAGS, "weight", "shift")]
            if len(norm) < 2 and len(norm) + len(known) == len(flags):
                return {"op": op, "norm": norm[0] if norm else "none", **dict.fromkeys(known, True)}
        raise MHCError(f"there is no kernel {name!r}: the operations are {', '.join(OPS)}")

    @property
    def norm_numbers(self) -> int:
        """Numbers of a token that a norm's backward leaves for "gates_backward"."""
        return {"none": 0, "rms": 2, "layer": 3}[self.norm]

    @property
    def token_maps(self) -> int:
        """Numbers of a token that "gates_backward" leaves for "seam_backward", a multiple of 4."""
        return -(-(self.maps + 2 + self.streams * (self.streams + 1)) // 4) * 4

    @property
    def maps(self) -> int:
        """Columns of phi: n pre, n post and n * n res."""
        return self.streams * (self.streams + 2)

    @property
    def columns(self) -> int:
        """`maps` padded for the matrix units: a power of two of at least 16."""
        return max(16, 1 << (self.maps - 1).bit_length())

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """First column and width of the powers of two that `maps` is cut into, 16 at least."""
        found: list[tuple[int, int]] = []
        first, end = 0, -(-self.maps // 16) * 16
        while first < end:
            width = 1 << ((end - first).bit_length() - 1)
            found.append((first, width))
            first += width
        return tuple(found)

    @property
    def span(self) -> int:
        """Channels that one of `tile.parts` programs works on, a multiple of `tile.width`."""
        return math.ceil(self.channels / (self.tile.parts * self.tile.width)) * self.tile.width

    @property
    def dots(self) -> int:
        """In how many parts sums over channels are left by a backward."""
        return self.tile.parts // self.tile.joined

    @property
    def ragged(self) -> bool:
        """Whether some channel tiles stick out, so that loads need a mask."""
        return self.span * self.tile.parts != self.channels

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the source, by its own names."""
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        if self.tile.registers and self.target == "cuda":
            options["maxnreg"] = self.tile.registers
        return options

    @property
    def row(self) -> int:
        """C padded to a power of two, for programs that hold whole rows."""
        return 1 << (self.channels - 1).bit_length()

    def to_json(self) -> str:
        """All fields, for the header of the source and for hashing."""
        values = asdict(self)
        values["rule"] = {k: v for k, v in values["rule"].items() if k != "alpha_init"}
        return json.dumps(values, sort_keys=True)

    @property
    def key(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all fields."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
