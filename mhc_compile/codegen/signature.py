"""What the arguments of a generated kernel are: names, Triton types, shapes; and its launch."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mhc_compile.codegen.render import render
from mhc_compile.codegen.shares import shares_of
from mhc_compile.codegen.spec import EQUAL, KernelSpec
from mhc_compile.errors import MHCError

Dims = tuple[int | str, ...]
_GROUP_TOKENS = 512  # fewest tokens of a group of "phi_backward"
_GROUPS = 8
_residents: dict[KernelSpec, int] = {}  # see `learn_residents`


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel.

    Attributes:
        name: as in the kernel's parameter list.
        type: as `triton.compiler.ASTSource` takes it: "*bf16", "*fp32", "i32", "fp32".
        dims: shape of the tensor; a string is a key of `counts`. Empty for a scalar.
    """

    name: str
    type: str
    dims: Dims = ()

    @property
    def pointer(self) -> bool:
        """Whether a tensor is passed."""
        return self.type.startswith("*")

    @property
    def each(self) -> str:
        """What the tensor has a slice for: a key of `counts`, or "launch" for all of it."""
        return next((dim for dim in self.dims if isinstance(dim, str)), "launch")

    @property
    def slice_bytes(self) -> int:
        """Bytes of the slice for one `each`."""
        itemsize = 4 if self.type.endswith("32") else 2
        return math.prod(dim for dim in self.dims if isinstance(dim, int)) * itemsize

    def shape(self, counts: dict[str, int]) -> tuple[int, ...]:
        """The tensor's shape for the `counts` of a launch."""
        return tuple(counts[dim] if isinstance(dim, str) else dim for dim in self.dims)


# Streams and what has their dtype.
_STREAMS: dict[str, Callable[[KernelSpec], Dims]] = {
    "x": lambda s: ("tokens", s.streams, s.channels),
    "y": lambda s: ("tokens", s.streams, s.channels),
    "f": lambda s: ("tokens", s.channels),
    "h": lambda s: ("tokens", s.channels),
    "g": lambda s: ("tokens", s.streams, s.channels),
    "products": lambda s: ("workers", s.streams, s.tile.tokens, s.tile.width),
    "out": lambda s: ("tokens", s.channels),
    "weight": lambda s: (s.channels,),
    "shift": lambda s: (s.channels,),
}
# Maps and parameters of a connection: float32, tokens last, so that neighbours load together.
_FLOATS: dict[str, Callable[[KernelSpec], Dims]] = {
    "phi": lambda s: (s.streams, s.channels, s.maps),
    "alpha": lambda s: (3,),
    "bias": lambda s: (s.maps,),
    "post_next": lambda s: (s.streams, "tokens"),
    "res_next": lambda s: (s.streams, s.streams, "tokens"),
    "partial": lambda s: (s.tile.parts, s.maps + 1, "tokens"),
    "proj": lambda s: (s.maps, "tokens"),
    "square": lambda s: ("tokens",),
    "scale": lambda s: ("tokens",),
    "maps": lambda s: ("tokens", s.token_maps),
    "norms": lambda s: (s.norm_numbers, "tokens"),
    "pre": lambda s: (s.streams, "tokens"),
    "post": lambda s: (s.streams, "tokens"),
    "res": lambda s: (s.streams, s.streams, "tokens"),
    "dots": lambda s: (s.dots, s.streams * (s.streams + 1), "tokens"),
    "sums": lambda s: ("tiles", s.maps + 3),
    "phi_shares": lambda s: ("groups", s.streams, s.channels, s.maps),
    "weight_shares": lambda s: ("programs", s.channels),
    "shift_shares": lambda s: ("programs", s.channels),
    "g_weight": lambda s: (s.channels,),
    "g_shift": lambda s: (s.channels,),
}
# Operands of products: phi, see the template "split_phi", and the gradients of the projections.
_PRODUCTS: dict[str, Callable[[KernelSpec], Dims]] = {
    "high": lambda s: (s.streams, s.columns, s.channels),
    "phi_high": lambda s: (s.streams, s.channels, s.columns),
    "dh_high": lambda s: ("tokens", s.columns),
}
_NUMBERS = ("tokens", "group_tokens", "tiles", "programs", "groups")
_SCALARS = dict.fromkeys(_NUMBERS, "i32") | {"eps": "fp32"}
# Names that mean something else in one kernel.
_SPECIAL: dict[tuple[str, str], Callable[[KernelSpec], Dims]] = {
    ("gates_backward", "high"): lambda s: ("tokens", s.columns),
    ("read", "partial"): lambda s: (s.tile.shares, s.maps + 1, "tokens"),
    ("gates_backward", "g_pre"): lambda s: (s.tile.parts, s.streams, "tokens"),
}


def parameters(source: str) -> tuple[str, ...]:
    """The parameter names of the kernel in a module's text."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("mhc_"):
            return tuple(arg.arg for arg in node.args.args)
    raise MHCError("the template has no kernel: define it at the top level as {{ FUNCTION }}")


def _argument(spec: KernelSpec, name: str) -> Argument:
    if name == "arrived":
        return Argument(name, "*i32", ("tiles",))
    if name in _SCALARS:
        return Argument(name, _SCALARS[name])
    if spec.equal and name == EQUAL[spec.op]:
        return Argument(name, f"*{spec.dtype}", ("tokens", spec.channels))
    stem = name if name in _FLOATS else name.removeprefix("g_")  # a gradient is like its value
    stem = stem.replace("low", "high")
    products = "*bf16" if spec.products in ("split", "bf16") else "*fp32"
    for table, kind in (
        (_PRODUCTS, products), (_STREAMS, f"*{spec.dtype}"), (_FLOATS, "*fp32"),
    ):  # fmt: skip
        if stem in table:
            special = _SPECIAL.get((spec.op, name.replace("low", "high")), table[stem])
            return Argument(name, kind, special(spec))
    raise MHCError(
        f"kernel {spec.op!r} has an argument {name!r} of unknown type: "
        "add it to the tables of mhc_compile/codegen/signature.py"
    )


@functools.cache
def arguments(spec: KernelSpec) -> tuple[Argument, ...]:
    """The kernel's parameters, in order, read off its source.

    Raises:
        MHCError: a parameter's name is in no table of this file.

    Example:
        >>> from mhc_compile.codegen.spec import Tile
        >>> [a.name for a in arguments(KernelSpec("split_phi", 4, 64, "bf16", Tile(1, 64)))]
        ['phi', 'high', 'low', 'tokens']
    """
    return tuple(_argument(spec, name) for name in parameters(render(spec)))


def signature(spec: KernelSpec) -> dict[str, str]:
    """Triton types by parameter name, as `triton.compiler.ASTSource` takes them."""
    return {argument.name: argument.type for argument in arguments(spec)}


def counts(spec: KernelSpec, tokens: int) -> dict[str, int]:
    """How many tokens, token tiles, programs and groups of tokens a launch has.

    "programs" are those of a kernel that loops over tokens, "workers" those of one that loops over
    tiles and keeps something in the caches for each.
    """
    tiles = math.ceil(tokens / spec.tile.tokens)
    residents = _residents.get(spec, 2) if spec.op == "seam_backward" else 2
    return {
        "tokens": tokens,
        "tiles": tiles,
        "programs": min(tokens, 2 * multiprocessors()),
        "groups": max(1, min(_GROUPS, math.ceil(tokens / _GROUP_TOKENS))),
        "workers": min(tiles * spec.dots, residents * multiprocessors()),
        "launch": 1,
    }


@functools.cache
def multiprocessors() -> int:
    """Those of the GPU; an H100's where there is none."""
    if not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def learn_residents(spec: KernelSpec, compiled: Any) -> None:
    """Notes how many programs of a kernel a multiprocessor has at a time, for its next launches.

    Of NVIDIA's GPUs, from the registers and the shared memory of what a launch returned; 2 before.
    """
    registers = getattr(compiled, "n_regs", None)
    if spec in _residents or spec.target != "cuda" or not registers:
        return
    gpu, warps = torch.cuda.get_device_properties(0), spec.tile.warps
    warp = math.ceil(32 * registers / 256) * 256  # they are handed out by 256
    fit = (
        2**16 // (warp * warps),
        gpu.shared_memory_per_multiprocessor // (compiled.metadata.shared + 1024),
        gpu.max_threads_per_multi_processor // (32 * warps),
    )
    _residents[spec] = max(1, min(fit))


def group_tokens(spec: KernelSpec, tokens: int) -> int:
    """Tokens of one group of a "phi_backward" launch, a multiple of its tile."""
    step = counts(spec, tokens)["groups"] * spec.tile.tokens
    return math.ceil(tokens / step) * spec.tile.tokens


def numbers(spec: KernelSpec, tokens: int) -> dict[str, int]:
    """The integers that a launch passes, by argument."""
    own = {argument.name for argument in arguments(spec)}
    known = counts(spec, tokens) | {"group_tokens": group_tokens(spec, tokens)}
    return {name: value for name, value in known.items() if name in own and name in _NUMBERS}


def grid(spec: KernelSpec, tokens: int) -> tuple[int, ...]:
    """How many programs a launch has."""
    count, tile = counts(spec, tokens), spec.tile
    if spec.op in ("split_phi", "pad_phi"):
        return (math.ceil(spec.channels / tile.width), spec.streams)
    if spec.op == "phi_backward":
        columns = spec.channels * (1 if spec.equal else spec.streams)
        return (math.ceil(columns / tile.width), count["groups"])
    if spec.op == "pre_backward" and spec.norm != "none":
        return (count["programs"],)
    if spec.op == "seam_backward":
        return (count["workers"],)
    if spec.op in ("gates", "gates_backward"):  # their parts were computed by another kernel
        return (count["tiles"],)
    if spec.op == "add_shares":
        return (sum(part.programs(count) for part in shares_of(spec)),)
    gated = math.ceil(tokens / tile.gated) if spec.op == "read" else 0
    return (count["tiles"] * tile.parts + gated,)
