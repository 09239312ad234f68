"""The steps of the operators in `mhc_compile.runtime.fused`, on streams `x: [T, n, C]`.

They run over blocks of tokens, so that narrow dtypes are widened a block at a time and a block that
is needed twice is still in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_compile.conventions import Convention
from mhc_compile.map_layout import as_components, as_maps
from mhc_compile.runtime.fused_gates import apply_gates_backward, norm_divisor
from mhc_compile.runtime.fused_norm import Norm, apply_norm, apply_norm_backward
from mhc_compile.runtime.precision import working_dtype

Tensors = tuple[Tensor, ...]
BLOCK_ELEMENTS = {"cpu": 2**20}
"""Elements in a block of widened tokens; other devices take larger blocks, to launch less."""
NO_NORM = Norm("none", 0.0, None, None)


class Source(NamedTuple):
    """What a read started from and what it kept for the backward."""

    x: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    proj: Tensor
    square: Tensor
    rule: str
    need_phi: bool


def project(streams: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the products `[K, T]` and the sums of squares `[T]`."""
    dtype = working_dtype(streams.dtype)
    flat, phi = streams.flatten(1), phi.to(dtype)
    products = flat.new_empty((flat.shape[0], phi.shape[1]), dtype=dtype)
    for rows in blocks(streams):
        torch.mm(flat[rows].to(dtype), phi, out=products[rows])
    square = torch.linalg.vector_norm(flat, dim=1, dtype=dtype).square()
    return products.t().contiguous(), square


def mix(x: Tensor, pre: Tensor, norm: Norm) -> Tensor:
    """The normed mix `[..., C]`; what the norm reads is not rounded to x's dtype."""
    dtype, streams, weight = working_dtype(x.dtype), by_token(x, 2), packed(pre, 1)
    h = streams.new_empty((streams.shape[0], streams.shape[2]))
    for rows in blocks(streams):
        mixed = torch.bmm(weight[rows].to(dtype).unsqueeze(1), streams[rows].to(dtype))
        h[rows] = apply_norm(mixed.squeeze(1), norm)
    return h.view(*x.shape[:-2], x.shape[-1])


def mix_backward(
    g_h: Tensor, x: Tensor, pre: Tensor, norm: Norm
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Returns gradients by the mix `[T, C]`, by pre `[T, n]` and by the norm's weight and shift."""
    dtype, streams, grad = working_dtype(x.dtype), by_token(x, 2), by_token(g_h, 1)
    plain = norm.kind == "none"
    g_mix = grad if plain else grad.new_empty(grad.shape, dtype=dtype)
    g_pre = streams.new_empty(streams.shape[:2], dtype=dtype)
    g_weight, g_shift = (streams.new_zeros(streams.shape[2], dtype=dtype) for _ in range(2))
    weight = packed(pre, 1)
    for rows in blocks(streams):
        block, g = streams[rows].to(dtype), grad[rows].to(dtype)
        if not plain:
            h = torch.bmm(weight[rows].to(dtype).unsqueeze(1), block).squeeze(1)
            through = apply_norm_backward(g, h, norm)
            g = g_mix[rows] = through.h
            g_weight += through.weight
            g_shift += through.shift
        torch.bmm(block, g.unsqueeze(2), out=g_pre[rows].unsqueeze(2))
    affine = [
        x.new_empty(0) if given is None or plain else total.to(given.dtype)
        for given, total in ((norm.weight, g_weight), (norm.shift, g_shift))
    ]
    return g_mix, g_pre, (affine[0], affine[1])


def streams_gradient(
    source: Source,
    g_pre: Tensor | None,
    g_post: Tensor | None,
    g_res: Tensor | None,
    pre: Tensor | None = None,
    g_mix: Tensor | None = None,
    g_y: Tensor | None = None,
    back: MergeBackward | None = None,
) -> Tensors:
    """Gradients by `(x, phi, alpha, bias)` of what was read.

    g_x = g_y + pre g_mix + g_proj phi^T + (dr/dx) g_r. With `back` each block of it goes there
    instead of into a tensor of its own.
    """
    streams, n = by_token(source.x, 2), source.x.shape[-2]
    dtype, convention = working_dtype(streams.dtype), Convention.from_key(source.rule)
    divisor = norm_divisor(streams, source.square, convention)
    g_proj, g_divisor, g_alpha, g_bias = apply_gates_backward(
        None if g_pre is None else by_token(g_pre, 1),
        None if g_post is None else by_token(g_post, 1),
        None if g_res is None else by_token(g_res, 2),
        source.proj, divisor.value, source.alpha, source.bias, n, convention,
    )  # fmt: skip
    scale = (g_divisor * divisor.slope).view(-1, 1, 1)
    phi = source.phi.to(dtype)
    g_phi = phi.new_zeros(phi.shape[::-1] if source.need_phi else (0,))
    g_x = streams.new_empty(streams.shape if back is None else (0,))
    weights = None if pre is None else packed(pre, 1)
    for rows in blocks(streams):
        block = streams[rows].to(dtype)
        out = torch.empty_like(block) if back else _block_of(g_x, rows, dtype)
        if g_y is None:
            torch.mul(block, scale[rows], out=out)
        else:
            torch.addcmul(by_token(g_y, 2)[rows].to(dtype), block, scale[rows], out=out)
        out.flatten(1).addmm_(g_proj[:, rows].t(), phi.t())
        if weights is not None and g_mix is not None:
            weight = weights[rows].to(dtype).unsqueeze(2)
            out.addcmul_(weight, g_mix[rows].to(dtype).unsqueeze(1))
        if source.need_phi:
            g_phi.addmm_(g_proj[:, rows], block.flatten(1))
        if back is None:
            _store(g_x, rows, out)
        else:
            back.add(rows, out)
    return (
        g_x.view(source.x.shape) if back is None else g_x,
        g_phi.t().to(source.phi.dtype).contiguous() if source.need_phi else g_phi,
        g_alpha.to(source.alpha.dtype),
        g_bias.to(source.bias.dtype),
    )


def merge(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`y_i = sum_j res_ij x_j + post_i f`, `[..., n, C]`."""
    dtype, streams, branch = working_dtype(x.dtype), by_token(x, 2), by_token(f, 1)
    weights, matrices = packed(post, 1), packed(res, 2)
    y = streams.new_empty(streams.shape)
    for rows in blocks(streams):
        out = _block_of(y, rows, dtype)
        torch.bmm(matrices[rows].to(dtype), streams[rows].to(dtype), out=out)
        out.addcmul_(weights[rows].to(dtype).unsqueeze(2), branch[rows].to(dtype).unsqueeze(1))
        _store(y, rows, out)
    return y.view(x.shape)


class MergeBackward:
    """Gradients of `merge`, block by block."""

    def __init__(self, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> None:
        self.inputs = (x, f, post, res)
        self.dtype = working_dtype(x.dtype)
        self.x, self.f = by_token(x, 2), by_token(f, 1)
        self.post, self.res = packed(post, 1), packed(res, 2)
        self.g_x, self.g_f = self.x.new_empty(self.x.shape), self.f.new_empty(self.f.shape)
        self.g_post = self.post.new_empty(self.post.shape, dtype=self.dtype)
        self.g_res = self.res.new_empty(self.res.shape, dtype=self.dtype)

    def add(self, rows: slice, grad: Tensor) -> None:
        """Takes the gradient of a block of results, `[block, n, C]`."""
        dtype = self.dtype
        g_x, g_f = _block_of(self.g_x, rows, dtype), _block_of(self.g_f, rows, dtype)
        torch.bmm(self.res[rows].to(dtype).mT, grad, out=g_x)
        torch.bmm(self.post[rows].to(dtype).unsqueeze(1), grad, out=g_f.unsqueeze(1))
        torch.bmm(grad, self.x[rows].to(dtype).mT, out=self.g_res[rows])
        branch = self.f[rows].to(dtype).unsqueeze(2)
        torch.bmm(grad, branch, out=self.g_post[rows].unsqueeze(2))
        _store(self.g_x, rows, g_x)
        _store(self.g_f, rows, g_f)

    def add_all(self, grad: Tensor) -> None:
        """Takes the whole gradient, `[..., n, C]`."""
        grad = by_token(grad, 2)
        for rows in blocks(grad):
            self.add(rows, grad[rows].to(self.dtype))

    def gradients(self) -> Tensors:
        """Returns the gradients by `(x, f, post, res)`, each like its input."""
        x, f, post, res = self.inputs
        maps = maps_like(post, self.g_post), maps_like(res, self.g_res)
        return self.g_x.view(x.shape), self.g_f.view(f.shape), *maps


def outer(weight: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight_i grad`, `[..., n, C]`, rounded once."""
    work = working_dtype(dtype)
    weights, grads = packed(weight, 1), by_token(grad, 1)
    out = grads.new_empty((*weights.shape, grads.shape[1]), dtype=dtype)
    for rows in blocks(out):
        block = _block_of(out, rows, work)
        torch.mul(weights[rows].to(work).unsqueeze(2), grads[rows].to(work).unsqueeze(1), out=block)
        _store(out, rows, block)
    return out.view(*weight.shape, grad.shape[-1])


def packed(maps: Tensor, kept: int) -> Tensor:
    """Maps by token and contiguous: torch multiplies small matrices fast only as they lie so."""
    return by_token(maps, kept).contiguous()


def maps_like(maps: Tensor, by_token: Tensor) -> Tensor:
    """A gradient `[T, ...]` in the shape and dtype of maps, as `map_layout` wants it."""
    kept = by_token.dim() - 1
    lead, shape = maps.shape[: maps.dim() - kept], maps.shape[maps.dim() - kept :]
    return as_maps(as_components(by_token.to(maps.dtype), kept), lead, shape)


def by_token(tensor: Tensor, kept: int) -> Tensor:
    """Makes one axis of all but the last `kept`; also where there are none, or no elements."""
    count = math.prod(tensor.shape[: tensor.dim() - kept])
    return tensor.reshape(count, *tensor.shape[tensor.dim() - kept :])


def blocks(streams: Tensor) -> Iterator[slice]:
    """Slices of tokens of `[T, n, C]`."""
    tokens, n, channels = streams.shape
    elements = BLOCK_ELEMENTS.get(streams.device.type, 2**26)
    if streams.dtype == working_dtype(streams.dtype):
        elements *= 4  # nothing is widened, and fewer blocks wait less for each other's threads
    step = max(1, elements // (n * channels))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _block_of(result: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Where a block of a result is computed: in its place, or apart if it has yet to be rounded."""
    block = result[rows]
    return block if result.dtype == dtype else torch.empty_like(block, dtype=dtype)


def _store(result: Tensor, rows: slice, block: Tensor) -> None:
    if block.dtype != result.dtype:
        result[rows] = block


def add(first: Tensor | None, second: Tensor) -> Tensor:
    """Adds a gradient to one that may be absent or of another shape with as many elements."""
    return second if first is None else second.view(first.shape) + first
