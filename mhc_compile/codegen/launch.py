"""Calls the generated kernels: one function an operator, forward and backward.

Shapes and meanings are those of `runtime.ops`. Maps (pre, post, res) and their gradients lie
component by component in memory, `[k, tokens]`, so that the values of neighbouring tokens are
neighbours; what the caller sees are views with the tokens first.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mhc_compile.codegen.cache import load
from mhc_compile.codegen.spec import MAX_STREAMS, KernelSpec, Tile
from mhc_compile.codegen.tiles import choose_tile
from mhc_compile.conventions import Convention

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_GROUPS = 8  # parts of the tokens whose shares of phi's gradient are added up in a fixed order
_PROGRAMS = 1024  # that share the tokens where a norm's gradients are summed


def supports(x: Tensor) -> bool:
    """Whether there are kernels for these streams, `[..., n, C]`."""
    return x.is_cuda and x.dtype in _NAMES and x.shape[-2] <= MAX_STREAMS and x.shape[-1] > 0


class _Call:
    """The kernels for one set of streams `[..., n, C]`."""

    def __init__(self, x: Tensor, rule: Convention | None = None, products: str | None = None):
        self.lead, (self.n, self.channels) = x.shape[:-2], x.shape[-2:]
        self.tokens = math.prod(self.lead)
        self.dtype, self.device = x.dtype, x.device
        self.maps = self.n * (self.n + 2)
        target = "interpret" if not x.is_cuda else "hip" if torch.version.hip else "cuda"
        name = _NAMES[x.dtype]
        products = products or ("split" if name == "bf16" else "tf32x3")
        self.base = KernelSpec(
            "mix", self.n, self.channels, name, Tile(16), products,
            rule or Convention("paper"), target=target,
        )  # fmt: skip

    def spec(self, op: str, **fields: Any) -> KernelSpec:
        """The kernel of an operation for these streams; "gates" alone depend on the rule."""
        if not op.startswith("gates"):
            fields["rule"] = Convention("paper")
        spec = replace(self.base, op=op, **fields)
        return replace(spec, tile=choose_tile(spec, self.tokens))

    def run(self, spec: KernelSpec, grid: tuple[int, ...], *args: Any) -> None:
        """Launches a kernel; None stands for an argument that it does not read."""
        if self.tokens:
            tile = spec.tile
            load(spec)[grid](*args, num_warps=tile.warps, num_stages=tile.stages)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def flat(self, tensor: Tensor, *shape: int) -> Tensor:
        """`[tokens, *shape]`, contiguous and in the streams' dtype."""
        return tensor.to(self.dtype).reshape(self.tokens, *shape).contiguous()

    def by_component(self, tensor: Tensor | None, count: int) -> Tensor:
        """Maps or their gradients as `[count, tokens]` float32; zeros for a missing gradient."""
        if tensor is None:
            return torch.zeros(count, self.tokens, device=self.device)
        return tensor.float().reshape(self.tokens, count).t().contiguous()

    def by_token(self, maps: Tensor, *shape: int) -> Tensor:
        """A view `[..., *shape]` of `[count, tokens]`."""
        return maps.t().unflatten(0, self.lead).unflatten(-1, shape) if self.lead else maps.view(shape)

    def tiles(self, spec: KernelSpec) -> int:
        """Token tiles of a kernel."""
        return math.ceil(self.tokens / spec.tile.tokens)

    # --- one method a kernel --------------------------------------------------------------

    def split_phi(self, phi: Tensor) -> tuple[Tensor, Tensor | None]:
        """phi as `[n, columns, C]` and `[n, C, columns]`: bf16 high and low parts, or float32."""
        spec = self.spec("split_phi")
        narrow = spec.products in ("split", "bf16")
        shape = (2, self.n * spec.columns * self.channels)
        high = self.empty(*shape, dtype=torch.bfloat16 if narrow else torch.float32)
        low = torch.empty_like(high) if spec.products == "split" else None
        grid = (math.ceil(self.channels / spec.tile.width), self.n)
        self.run(spec, grid, phi.contiguous(), high, low, self.tokens)
        return high, low

    def mix(
        self, x: Tensor, f: Tensor | None, post: Tensor | None, res: Tensor | None,
        phi: tuple[Tensor, Tensor | None] | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """y = res x + post f where f is given, and the partial products where phi is."""
        spec = self.spec("mix", mix=f is not None, read=phi is not None)
        parts = spec.tile.parts
        y = torch.empty_like(x) if f is not None else x
        partial = self.empty(parts, self.maps + 1, self.tokens) if phi is not None else None
        high, low = phi or (None, None)
        self.run(spec, (self.tiles(spec) * parts,), x, f, post, res, high, low, y, partial,
                 self.tokens)  # fmt: skip
        return y, partial

    def gates(self, partial: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """pre, post, res, proj `[k, tokens]` and square `[tokens]` of the partial products."""
        spec = self.spec("gates", tile=replace(self.base.tile, parts=partial.shape[0]))
        n = self.n
        out = [self.empty(k, self.tokens) for k in (n, n, n * n, self.maps)]
        square = self.empty(self.tokens)
        self.run(spec, (self.tiles(spec),), partial, alpha, bias, *out, square, self.tokens)
        return (*out, square)

    def pre(
        self, x: Tensor, pre: Tensor, weight: Tensor | None, shift: Tensor | None, norm: str,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """h = sum_i pre_i x_i, normed."""
        spec = self.spec("pre", norm=norm, weight=weight is not None, shift=shift is not None)
        h = self.empty(self.tokens, self.channels, dtype=self.dtype)
        grid = (self.tiles(spec) * spec.tile.parts,)
        self.run(spec, grid, x, pre, weight, shift, h, self.tokens, eps)
        return h

    def pre_backward(
        self, x: Tensor, pre: Tensor, g: Tensor, weight: Tensor | None, shift: Tensor | None,
        norm: str, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients of the norm's input, of pre `[n, tokens]`, of weight and of shift."""
        spec = self.spec("pre_backward", norm=norm, weight=weight is not None,
                         shift=shift is not None)  # fmt: skip
        g_pre = self.empty(self.n, self.tokens)
        if norm == "none":
            self.run(spec, (self.tiles(spec),), x, pre, None, g, None, g_pre, None, None,
                     self.tokens, eps)  # fmt: skip
            return g, g_pre, None, None
        programs = min(self.tokens, _PROGRAMS)
        g_h = torch.empty_like(g)
        sums = [self.empty(programs, self.channels) if v is not None else None
                for v in (weight, shift)]  # fmt: skip
        self.run(spec, (programs,), x, pre, weight, g, g_h, g_pre, *sums, self.tokens, eps)
        totals = [s.sum(0).to(v.dtype) if s is not None and v is not None else None
                  for s, v in zip(sums, (weight, shift), strict=True)]  # fmt: skip
        return g_h, g_pre, totals[0], totals[1]

    def gates_backward(
        self, proj: Tensor, square: Tensor, alpha: Tensor, bias: Tensor, g_pre: Tensor,
        g_post: Tensor, g_res: Tensor,
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor, Tensor, Tensor]:  # fmt: skip
        """dh (high and low, `[tokens, columns]`), scale `[tokens]`, and gradients of alpha, bias."""
        spec = self.spec("gates_backward", tile=replace(self.base.tile, parts=g_pre.shape[0]))
        narrow = spec.products in ("split", "bf16")
        high = self.empty(self.tokens, spec.columns,
                          dtype=torch.bfloat16 if narrow else torch.float32)  # fmt: skip
        low = torch.empty_like(high) if spec.products == "split" else None
        scale = self.empty(self.tokens)
        sums = self.empty(self.tiles(spec), self.maps + 3)
        self.run(spec, (self.tiles(spec),), proj, square, alpha, bias, g_pre, g_post, g_res, high,
                 low, scale, sums, self.tokens)  # fmt: skip
        total = sums.sum(0)
        return (high, low), scale, total[self.maps :], total[: self.maps]

    def apply_backward(
        self, x: Tensor, mixed: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        read: tuple[Tensor, Tensor, Any, Any, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """g_x, and with `mixed` = (f, post, res, g_y) also g_f and `[n*n + n, tokens]` dots.

        `read` is (pre, g_h, phi, dh, scale).
        """
        spec = self.spec("apply_backward", mix=mixed is not None, read=read is not None)
        parts = spec.tile.parts
        f, post, res, g_y = mixed or (None,) * 4
        pre, g_h, phi, dh, scale = read or (None, None, (None, None), (None, None), None)
        g_x = torch.empty_like(x)
        g_f = torch.empty_like(f) if f is not None else None
        dots = self.empty(parts, self.n * (self.n + 1), self.tokens) if f is not None else None
        programs = self.tiles(spec) * parts
        self.run(spec, (programs,), x, f, post, res, g_y, pre, g_h,
                 *(p if p is None else p[1] for p in phi), *dh, scale, g_x, g_f, dots,
                 self.tokens)  # fmt: skip
        return g_x, g_f, None if dots is None else dots.sum(0)

    def phi_backward(self, y: Tensor, dh: tuple[Tensor, Tensor | None]) -> Tensor:
        """The gradient of phi, `[nC, maps]`; each group of tokens writes its share."""
        spec = self.spec("phi_backward")
        groups = max(1, min(_GROUPS, math.ceil(self.tokens / 512)))
        span = math.ceil(self.tokens / (groups * spec.tile.tokens)) * spec.tile.tokens
        shares = self.empty(groups, self.n * self.channels, self.maps)
        grid = (math.ceil(self.n * self.channels / spec.tile.width), groups)
        self.run(spec, grid, y, *dh, shares, self.tokens, span)
        return shares.sum(0) if groups > 1 else shares[0]


def seam(
    x: Tensor, f: Tensor, post: Tensor, res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    weight: Tensor | None, shift: Tensor | None, norm: str, norm_eps: float, rule: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`ops.seam` on a GPU: mix with products, gates, pre with norm."""
    call = _Call(x, Convention.from_key(rule))
    n, c = call.n, call.channels
    y, partial = call.mix(
        call.flat(x, n, c), call.flat(f, c), call.by_component(post, n),
        call.by_component(res, n * n), call.split_phi(phi),
    )  # fmt: skip
    assert partial is not None
    pre, post, res, proj, square = call.gates(partial, alpha, bias)
    h = call.pre(y, pre, weight, shift, norm, norm_eps)
    return (y.view(x.shape), h.view(f.shape), call.by_token(pre, n), call.by_token(post, n),
            call.by_token(res, n, n), proj, square)  # fmt: skip


def seam_backward(
    g_y: Tensor | None, g_h: Tensor, g_pre: Tensor | None, g_post: Tensor | None,
    g_res: Tensor | None, x: Tensor, f: Tensor, post: Tensor, res: Tensor, y: Tensor, phi: Tensor,
    alpha: Tensor, bias: Tensor, weight: Tensor | None, shift: Tensor | None, pre: Tensor,
    proj: Tensor, square: Tensor, norm: str, norm_eps: float, rule: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`ops.seam_backward` on a GPU."""
    call = _Call(x, Convention.from_key(rule))
    n, c = call.n, call.channels
    flat_x, flat_y, flat_f = call.flat(x, n, c), call.flat(y, n, c), call.flat(f, c)
    flat_g = torch.zeros_like(flat_y) if g_y is None else call.flat(g_y, n, c)
    maps = call.by_component(pre, n)
    gradient, parts, g_weight, g_shift = call.pre_backward(
        flat_y, maps, call.flat(g_h, c), weight, shift, norm, norm_eps
    )
    dh, scale, g_alpha, g_bias = call.gates_backward(
        proj, square, alpha, bias, _with_direct(call, parts, g_pre), call.by_component(g_post, n),
        call.by_component(g_res, n * n),
    )  # fmt: skip
    g_x, g_f, dots = call.apply_backward(
        flat_x, (flat_f, call.by_component(post, n), call.by_component(res, n * n), flat_g),
        (maps, gradient, call.split_phi(phi), dh, scale),
    )  # fmt: skip
    assert g_f is not None and dots is not None
    g_phi = call.phi_backward(flat_y, dh)
    return (g_x.view(x.shape), g_f.view(f.shape), call.by_token(dots[n * n :], n),
            call.by_token(dots[: n * n], n, n), g_phi, g_alpha, g_bias, g_weight, g_shift)  # fmt: skip


def _with_direct(call: _Call, parts: Tensor, g_pre: Tensor | None) -> Tensor:
    """Gradients of pre by way of h and given directly, `[parts, n, tokens]`."""
    if g_pre is None:
        return parts.unsqueeze(0)
    return torch.stack([parts, call.by_component(g_pre, call.n)])
