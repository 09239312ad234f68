"""Launches of the generated kernels: one method a kernel, with memory for its results.

Kernels take maps (pre, post, res) and their gradients component by component, `[k, tokens]`, so
that the values of neighbouring tokens are neighbours in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mhc_compile.codegen.cache import load
from mhc_compile.codegen.kernel_set import affine_sums
from mhc_compile.codegen.shares import shares_of
from mhc_compile.codegen.signature import counts, grid, group_tokens, learn_residents
from mhc_compile.codegen.spec import GATED, KernelSpec, Tile
from mhc_compile.codegen.tiles import fits_whole
from mhc_compile.codegen.tuning import Tuning, tile_for, tuning_of
from mhc_compile.conventions import Convention
from mhc_compile.map_layout import as_components, as_maps

Pair = tuple[Tensor, Tensor | None]
"""What enters products: high and low parts in bf16, or float32 and None."""
_Sums = tuple[KernelSpec, dict[str, tuple[int, ...]]]
_arrivals: dict[tuple[torch.device, int], Tensor] = {}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@functools.lru_cache(maxsize=256)
def kernel_calls(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, rule: str | None, tuning: Tuning
) -> KernelCalls:
    """`KernelCalls`, the same as long as the sizes are, with what earlier calls found out.

    Python launches a layer's kernels one by one: where they are short, its time is the model's.
    """
    return KernelCalls(shape, dtype, device, rule, tuning)


class KernelCalls:
    """The kernels for streams `x: [..., n, C]` of one shape.

    Args:
        shape: of x.
        dtype: of x.
        device: of x.
        rule: the convention, as `Convention.key` writes it.
        tuning: how tiles are chosen; None is as the device's tables and the process say.

    Attributes:
        lead: the leading dimensions.
        n: the number of streams.
        channels: C.
        tokens: the product of `lead`.
        maps: columns of phi.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device,
        rule: str | None = None, tuning: Tuning | None = None,
    ) -> None:  # fmt: skip
        self.lead, (self.n, self.channels) = shape[:-2], shape[-2:]
        self.tokens = math.prod(self.lead)
        self.dtype, self.device = dtype, device
        self.tuning = tuning or tuning_of(device)
        self.maps = self.n * (self.n + 2)
        gpu = device.type == "cuda"
        target = "interpret" if not gpu else "hip" if torch.version.hip else "cuda"
        name = NAMES[dtype]
        self.base = KernelSpec(
            "mix", self.n, self.channels, name, Tile(16), "split" if name == "bf16" else "tf32x3",
            Convention("paper") if rule is None else Convention.from_key(rule), target=target,
        )  # fmt: skip
        self._specs: dict[tuple[Any, ...], KernelSpec] = {}
        self._tiles: dict[tuple[str, int], Tile] = {}
        self._sums: dict[tuple[Any, ...], _Sums] = {}
        self._counts: dict[tuple[KernelSpec, str], int] = {}
        self._launches: dict[tuple[Any, ...], tuple[Any, Callable[..., None]]] = {}

    def spec(self, op: str, **fields: Any) -> KernelSpec:
        """The kernel of an operation for these streams."""
        key = op, *fields, *fields.values()
        found = self._specs.get(key)
        if found is None:
            rule = self.base.rule if op in GATED else Convention("paper")
            found = replace(self.base, op=op, **{"rule": rule, **fields})
            found = replace(found, tile=tile_for(found, self.tokens, self.tuning))
            self._specs[key] = found
        return found

    def given(self, name: str, number: int) -> Tile:
        """A tile of which one field is another kernel's, the rest is chosen."""
        key = name, number
        if key not in self._tiles:
            self._tiles[key] = replace(self.base.tile, **{name: number})  # type: ignore[arg-type]
        return self._tiles[key]

    def run(self, spec: KernelSpec, *args: Any, programs: int | None = None) -> Any:
        """Launches a kernel, which is returned; None is for an argument that it does not read."""
        if not self.tokens:
            return None
        key = spec, programs, *map(_kind, args)
        known = self._launches.get(key)
        if known is not None:
            compiled, again = known
            again(*args)
            return compiled
        size = grid(spec, self.tokens) if programs is None else (programs,)
        compiled = load(spec)[size](*args, **spec.options)
        if spec.target == "cuda" and hasattr(type(compiled), "__getitem__"):
            # Without Triton's own search for it, which compares more than can differ here; what is
            # changed later of its settings for debugging, hooks of launches apart, comes too late.
            self._launches[key] = compiled, compiled[(*size, 1, 1)[:3]]
        return compiled

    def count(self, spec: KernelSpec, what: str) -> int:
        """Tiles, programs, workers or groups of a launch, see `signature.counts`."""
        key = spec, what
        found = self._counts.get(key)
        if found is None:
            found = counts(spec, self.tokens)[what]
            if what != "workers":  # of which there may be more from the second launch on
                self._counts[key] = found
        return found

    # --- shapes ---------------------------------------------------------------------------

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def streams(self, tensor: Tensor) -> Tensor:
        """Streams or their gradients as `[tokens, n, C]`, contiguous."""
        return self._cast(tensor).reshape(self.tokens, self.n, self.channels).contiguous()

    def read_only(self, x: Tensor) -> Tensor:
        """As `streams`; `[tokens, C]` of streams that are all the same memory, of stride 0.

        Kernels of their own (`KernelSpec.equal`) read it once for all streams.
        """
        once = self.n > 1 and x.stride(-2) == 0
        return self.single(x.select(-2, 0)) if once else self.streams(x)

    def single(self, tensor: Tensor) -> Tensor:
        """A sublayer's input or result, or a gradient of it, as `[tokens, C]`, contiguous."""
        return self._cast(tensor).reshape(self.tokens, self.channels).contiguous()

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype is self.dtype else tensor.to(self.dtype)

    def by_component(self, tensor: Tensor | None, *shape: int) -> Tensor:
        """Maps `[..., *shape]` or their gradients as `[k, tokens]` float32; zeros for None."""
        if tensor is None:
            return torch.zeros(math.prod(shape), self.tokens, device=self.device)
        plain = tensor if tensor.dtype is torch.float32 else tensor.float()
        return as_components(plain, len(shape))

    def by_token(self, components: Tensor, *shape: int) -> Tensor:
        """The view `[..., *shape]` of `[k, tokens]`."""
        return as_maps(components, self.lead, shape)

    def mixing(self, post: Tensor, res: Tensor) -> tuple[Tensor, Tensor]:
        """The maps of a mix, component by component."""
        return self.by_component(post, self.n), self.by_component(res, self.n, self.n)

    # --- forward --------------------------------------------------------------------------

    def split_phi(self, phi: Tensor) -> Pair:
        """Pads phi and takes it apart, `[n, columns, C]`."""
        spec = self.spec("split_phi")
        high = self.empty(self.n, spec.columns, self.channels, dtype=operand_dtype(spec))
        low = torch.empty_like(high) if spec.products == "split" else None
        if phi.numel():
            self.run(spec, phi.contiguous(), high, low, self.tokens)
        return high, low

    def mix(self, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
        """Mixes the streams, y = res x + post f."""
        y = self.empty(self.tokens, self.n, self.channels, dtype=self.dtype)
        self.run(self.spec("mix", equal=x.dim() == 2), x, f, post, res, y, self.tokens)
        return y

    def project(
        self, x: Tensor, f: Tensor | None, post: Tensor | None, res: Tensor | None, phi: Pair
    ) -> tuple[Tensor, Tensor]:
        """Mixes where f is given; returns y and its products `[parts, maps + 1, tokens]`."""
        equal = x.dim() == 2
        if f is not None and post is not None and res is not None and not fits_whole(self.base):
            x, f, post, res = self.mix(x, f, post, res), None, None, None
            equal = False
        spec = self.spec("project", mix=f is not None, equal=equal)
        y = x
        if f is not None:
            y = self.empty(self.tokens, self.n, self.channels, dtype=self.dtype)
        partial = self.empty(spec.tile.parts, self.maps + 1, self.tokens)
        self.run(spec, x, f, post, res, *phi, y, partial, self.tokens)
        return y, partial

    def gates(self, partial: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """pre, post, res, proj `[k, tokens]` and square `[tokens]` of the partial products."""
        spec = self.spec("gates", tile=self.given("parts", partial.shape[0]))
        n = self.n
        out = [self.empty(k, self.tokens) for k in (n, n, n * n, self.maps)]
        square = self.empty(self.tokens)
        self.run(spec, partial, *_plain(alpha, bias), *out, square, self.tokens)
        return (*out, square)

    def read(
        self, x: Tensor, partial: Tensor, alpha: Tensor, bias: Tensor, weight: Tensor | None,
        shift: Tensor | None, norm: str, eps: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Gates and the read by them in one launch: what `pre` and `gates` return."""
        tile, equal = self.given("shares", partial.shape[0]), x.dim() == 2
        spec = self.spec("read", norm=norm, weight=weight is not None, shift=shift is not None,
                         equal=equal, tile=tile)  # fmt: skip
        n = self.n
        out = [self.empty(k, self.tokens) for k in (n, n, n * n, self.maps)]
        square = self.empty(self.tokens)
        h = self.empty(self.tokens, self.channels, dtype=self.dtype)
        self.run(spec, x, partial, *_plain(alpha, bias), weight, shift, *out, square, h,
                 self.tokens, eps)  # fmt: skip
        return h, (*out, square)

    def pre(
        self, x: Tensor, pre: Tensor, weight: Tensor | None, shift: Tensor | None, norm: str,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """Reads h = sum_i pre_i x_i, normed, `[tokens, C]`."""
        spec = self.spec("pre", norm=norm, weight=weight is not None, shift=shift is not None,
                         equal=x.dim() == 2)  # fmt: skip
        h = self.empty(self.tokens, self.channels, dtype=self.dtype)
        self.run(spec, x, pre, weight, shift, h, self.tokens, eps)
        return h

    def seam_once(
        self, x: Tensor, f: Tensor, post: Tensor, res: Tensor, phi: Tensor, alpha: Tensor,
        bias: Tensor, weight: Tensor | None, shift: Tensor | None, norm: str, eps: float,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """A whole seam in one launch: y, h, and what `gates` returns."""
        spec = self.spec("seam_once", norm=norm, weight=weight is not None,
                         shift=shift is not None)  # fmt: skip
        n = self.n
        y, h = torch.empty_like(x), torch.empty_like(f)
        partial = self.empty(spec.tile.parts, self.maps + 1, self.tokens)
        out = [self.empty(k, self.tokens) for k in (n, n, n * n, self.maps)]
        square = self.empty(self.tokens)
        self.run(spec, x, f, post, res, phi.contiguous(), *_plain(alpha, bias),
                 weight, shift, y, h, partial, arrivals(self.device, self.count(spec, "tiles")),
                 *out, square, self.tokens, eps)  # fmt: skip
        return y, h, (*out, square)

    # --- backward -------------------------------------------------------------------------

    def pad_phi(self, phi: Tensor) -> Tensor:
        """Pads phi for the products of a backward, `[n, C, columns]`."""
        spec = self.spec("pad_phi")
        high = self.empty(self.n, self.channels, spec.columns, dtype=operand_dtype(spec))
        if phi.numel():
            self.run(spec, phi.contiguous(), high, self.tokens)
        return high

    def pre_backward(
        self, x: Tensor, pre: Tensor, g: Tensor, weight: Tensor | None = None,
        shift: Tensor | None = None, norm: str = "none", eps: float = 0.0, again: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Sequence[Tensor | None]]:  # fmt: skip
        """What is left of the norm's backward; `g` is the gradient of h.

        Returns:
            The gradient of pre `[n, tokens]`; that of the norm's input, or `g` where the next is
            not None; numbers `[2 or 3, tokens]` with which "gates_backward" and "seam_backward"
            make that gradient of `g`; h if `again`; shares of the gradients of weight and shift.
        """
        spec = self.spec("pre_backward", norm=norm, weight=weight is not None,
                         shift=shift is not None, again=again, equal=x.dim() == 2)  # fmt: skip
        g_pre, h = self.empty(self.n, self.tokens), torch.empty_like(g) if again else None
        if norm == "none":
            self.run(spec, x, pre, None, g, None, None, g_pre, h, None, None, self.tokens, eps)
            return g_pre, g, None, h, (None, None)
        whole = fits_whole(spec)
        g_h = None if whole else torch.empty_like(g)
        norms = self.empty(spec.norm_numbers, self.tokens) if whole else None
        programs = self.count(spec, "programs")
        sums = [self.empty(programs, self.channels) if v is not None else None
                for v in (weight, shift)]  # fmt: skip
        self.run(spec, x, pre, weight, g, g_h, norms, g_pre, h, *sums, self.tokens, eps)
        return g_pre, g if g_h is None else g_h, norms, h, sums

    def spread(self, pre: Tensor, g_h: Tensor) -> Tensor:
        """The gradient of the streams that were read by the maps pre, `[tokens, n, C]`."""
        g_x = self.empty(self.tokens, self.n, self.channels, dtype=self.dtype)
        self.run(self.spec("spread"), pre, g_h, g_x, self.tokens)
        return g_x

    def gates_backward(
        self, proj: Tensor, square: Tensor, alpha: Tensor, bias: Tensor, g_pre: Tensor,
        g_post: Tensor, g_res: Tensor, mixed: Sequence[Tensor | None] = (), norm: str = "none",
        norms: Tensor | None = None,
    ) -> tuple[Pair, Tensor, Tensor]:  # fmt: skip
        """The pair dh `[tokens, columns]`, scale `[tokens]`, shares of the gates' parameters'.

        `g_pre: [terms, n, tokens]` is summed over its terms. With `mixed`, the maps res, post and
        pre of a seam, and the numbers of its norm, there is in place of scale
        `[tokens, token_maps]`: what "seam_backward" takes.
        """
        spec = self.spec("gates_backward", tile=self.given("parts", g_pre.shape[0]),
                         mix=bool(mixed), norm=norm)  # fmt: skip
        high = self.empty(self.tokens, spec.columns, dtype=operand_dtype(spec))
        low = torch.empty_like(high) if spec.products == "split" else None
        own = self.empty(self.tokens, *[spec.token_maps] * spec.mix)
        outs = (None, own) if mixed else (own, None)
        sums = self.empty(self.count(spec, "tiles"), self.maps + 3)
        mixed = mixed or (None, None, None)
        self.run(spec, proj, square, *_plain(alpha, bias), g_pre, g_post, g_res, *mixed, norms,
                 high, low, *outs, sums, self.tokens)  # fmt: skip
        return (high, low), own, sums

    def seam_backward(
        self, x: Tensor, f: Tensor, g_y: Tensor, g: Tensor, maps: Tensor, phi: Tensor, dh: Pair,
        norm: str = "none", weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """g_x, g_f and parts of the gradients of res and post, `[dots, n*n + n, tokens]`.

        `maps` are those of `gates_backward`; `g` is the gradient of what the norm returns, or,
        without a norm, of what was read.
        """
        spec = self.spec("seam_backward", norm=norm, weight=weight is not None,
                         equal=x.dim() == 2)  # fmt: skip
        g_x, g_f = torch.empty_like(g_y), torch.empty_like(f)
        dots = self.empty(spec.dots, self.n * (self.n + 1), self.tokens)
        workers = self.count(spec, "workers")
        products = self.empty(workers, self.n, spec.tile.tokens, spec.tile.width, dtype=self.dtype)
        compiled = self.run(
            spec, x, f, g_y, g, weight, maps, phi, *dh, g_x, g_f, dots, products,
            self.tokens, programs=workers,
        )  # fmt: skip
        if compiled is not None:
            learn_residents(spec, compiled)
        return g_x, g_f, dots

    def read_backward(
        self, y: Tensor, g_y: Tensor | None, pre: Tensor, g_h: Tensor, phi: Tensor, dh: Pair,
        scale: Tensor,
    ) -> Tensor:  # fmt: skip
        """The gradient of the streams that were read, added to g_y."""
        spec = self.spec("read_backward", carry=g_y is not None, equal=y.dim() == 2)
        g = self.empty(self.tokens, self.n, self.channels, dtype=self.dtype)
        self.run(spec, y, g_y, pre, g_h, phi, *dh, scale, g, self.tokens)
        return g

    def mix_backward(
        self, x: Tensor, f: Tensor, post: Tensor, res: Tensor, g_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g_x, g_f and parts of the gradients of res and post, `[parts, n*n + n, tokens]`."""
        spec = self.spec("mix_backward", equal=x.dim() == 2)
        g_x, g_f = torch.empty_like(g_y), torch.empty_like(f)
        dots = self.empty(spec.tile.parts, self.n * (self.n + 1), self.tokens)
        self.run(spec, x, f, post, res, g_y, g_x, g_f, dots, self.tokens)
        return g_x, g_f, dots

    def phi_backward(self, y: Tensor, dh: Pair) -> Tensor:
        """Shares of the gradient of phi, `[groups, nC, maps]`, one a group of tokens."""
        spec = self.spec("phi_backward", equal=y.dim() == 2)
        shares = self.empty(self.count(spec, "groups"), self.n * self.channels, self.maps)
        self.run(spec, y, *dh, shares, self.tokens, group_tokens(spec, self.tokens))
        return shares

    def add_shares(
        self, sums: Tensor, phi_shares: Tensor | None, affine: Sequence[Tensor | None],
        dots: Tensor | None, like: dict[str, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """All sums of a backward in one launch, in the order of the shares.

        Args:
            sums: of `gates_backward`.
            phi_shares: of `phi_backward`; None where phi needs no gradient.
            affine: of `pre_backward`, of weight and shift.
            dots: of `seam_backward` or `mix_backward`.
            like: parameters and maps by name; their gradients have the same dtype.

        Returns:
            Gradients by the names of `like`; those of maps are `[k, tokens]`. What has no shares is
            empty.
        """
        weight, shift = affine[0] is not None, affine[1] is not None
        parts = 0 if dots is None else dots.shape[0]
        sizes = (value.shape for value in like.values())
        key = weight, shift, phi_shares is None, parts, *sizes
        spec, shapes = self._sums.get(key) or self._sum_up(key, like)
        make = torch.empty if self.tokens else torch.zeros
        out = {
            name: make(shapes[name], dtype=value.dtype, device=self.device)
            for name, value in like.items()
        }
        # Of no groups no program reads anything.
        phi, groups = (sums, 0) if phi_shares is None else (phi_shares, phi_shares.shape[0])
        self.run(
            spec, sums, out["bias"], out["alpha"], affine[0], out.get("weight"), affine[1],
            out.get("shift"), phi, out["phi"], dots, out.get("res"), out.get("post"),
            sums.shape[0], self.count(spec, "programs"), groups, self.tokens,
        )  # fmt: skip
        return out

    def _sum_up(self, key: tuple[Any, ...], like: dict[str, Tensor]) -> _Sums:
        """The kernel of `add_shares` and the shapes of its results."""
        weight, shift, no_phi, parts = key[:4]
        gated = self.spec("gates_backward", tile=self.base.tile).tile
        spec = self.spec("add_shares", tile=replace(gated, parts=parts or 1), mix=parts > 0,
                         **affine_sums(weight, shift))  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(like, (0,))
        for part in shares_of(spec):
            for name, size in part.results:
                stem = name.removeprefix("g_")
                if not (no_phi and stem == "phi"):
                    shapes[stem] = (size, self.tokens) if part.by_token else like[stem].shape
        self._sums[key] = found = spec, shapes
        return found


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel anew for: CUDA kernels take wider loads of aligned memory."""
    if isinstance(argument, Tensor):
        return (argument.dtype, "odd") if argument.data_ptr() % 16 else argument.dtype
    return float if isinstance(argument, float) else argument


def _plain(*parameters: Tensor) -> tuple[Tensor, ...]:
    """Gates' parameters as the kernels compute with them, whatever the module was cast to."""
    return tuple(
        p.contiguous() if p.dtype is torch.float32 else p.float().contiguous() for p in parameters
    )


def arrivals(device: torch.device, tiles: int) -> Tensor:
    """Counters at zero, int32, of one stream of a device; kernels leave them at zero."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Memory of a CUDA graph is the graph's own: its launches zero counters of theirs.
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    known = _arrivals.get(key)
    if known is None or known.numel() < tiles:
        _arrivals[key] = known = torch.zeros(max(tiles, 64), dtype=torch.int32, device=device)
    return known


def operand_dtype(spec: KernelSpec) -> torch.dtype:
    """Of what enters products."""
    return torch.bfloat16 if spec.products in ("split", "bf16") else torch.float32
