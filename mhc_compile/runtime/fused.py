"""The operators of `mhc_compile.runtime.ops` in torch, with analytic gradients.

Signatures are those of the operators. Streams are flattened to `x: [T, n, C]` and worked on in
blocks of tokens, so that narrow dtypes are widened a block at a time and a block that is needed
twice is still in the cache. Gates keep the tokens last, see `fused_gates`. None as a gradient
counts as zeros; a gradient that nobody needs comes back empty, with the shape [0].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_compile.conventions import Convention
from mhc_compile.runtime.fused_gates import apply_gates, apply_gates_backward, norm_divisor
from mhc_compile.runtime.fused_norm import Norm, apply_norm, apply_norm_backward, make_norm
from mhc_compile.runtime.precision import working_dtype

Tensors = tuple[Tensor, ...]
BLOCK_ELEMENTS = {"cpu": 2**20}
"""Elements in a block of tokens; devices other than these take larger ones, to launch less."""
_NO_NORM = Norm("none", 0.0, None, None)


def coefficients(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """Eq. (14)-(19): `(pre, post, res, proj, square)`."""
    streams, lead, n = _tokens(x, 2), x.shape[:-2], x.shape[-2]
    convention = Convention.from_key(rule)
    proj, square = _project(streams, phi)
    divisor = norm_divisor(streams, square, convention)
    pre, post, res = apply_gates(proj, divisor.value, alpha, bias, n, convention)
    return pre.view(*lead, n), post.view(*lead, n), res.view(*lead, n, n), proj, square


def coefficients_backward(
    g_pre: Tensor | None,
    g_post: Tensor | None,
    g_res: Tensor | None,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    proj: Tensor,
    square: Tensor,
    rule: str,
    need_phi: bool = True,
) -> Tensors:
    """Gradients by `(x, phi, alpha, bias)`."""
    source = _Source(x, phi, alpha, bias, proj, square, rule, need_phi)
    return _read_backward(source, g_pre, g_post, g_res)


def pre(x: Tensor, pre: Tensor) -> Tensor:
    """`h = sum_i pre_i x_i`."""
    return _mix(x, pre, _NO_NORM)


def pre_backward(g_h: Tensor, x: Tensor, pre: Tensor) -> Tensors:
    """Gradients by `(x, pre)`."""
    _, g_pre, _ = _mix_backward(g_h, x, pre, _NO_NORM)
    return _outer(pre, g_h, x.dtype), g_pre.to(pre.dtype).view(pre.shape)


def post_res(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`y_i = sum_j res_ij x_j + post_i f`."""
    dtype = working_dtype(x.dtype)
    streams, branch, weight, matrices = _tokens(x, 2), _tokens(f, 1), _tokens(post, 1), _tokens(res, 2)
    y = streams.new_empty(streams.shape)
    for rows in _blocks(streams):
        out = _block_of(y, rows, dtype)
        torch.bmm(matrices[rows].to(dtype), streams[rows].to(dtype), out=out)
        out.addcmul_(weight[rows].to(dtype).unsqueeze(2), branch[rows].to(dtype).unsqueeze(1))
        _store(y, rows, out)
    return y.view(x.shape)


def post_res_backward(g_y: Tensor, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensors:
    """Gradients by `(x, f, post, res)`."""
    merge = _MergeBackward(x, f, post, res)
    grad = _tokens(g_y, 2)
    for rows in _blocks(grad):
        merge.add(rows, grad[rows].to(merge.dtype))
    return merge.gradients()


def read(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """`coefficients`, then `pre`: `(h, pre, post, res, proj, square)`."""
    gates = coefficients(x, phi, alpha, bias, rule)
    return _mix(x, gates[0], _NO_NORM), *gates


def read_backward(
    g_h: Tensor | None,
    g_pre: Tensor | None,
    g_post: Tensor | None,
    g_res: Tensor | None,
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    pre: Tensor,
    proj: Tensor,
    square: Tensor,
    rule: str,
    need_phi: bool = True,
) -> Tensors:
    """Gradients by `(x, phi, alpha, bias)`."""
    source = _Source(x, phi, alpha, bias, proj, square, rule, need_phi)
    if g_h is None:
        return _read_backward(source, g_pre, g_post, g_res)
    g_mix, more, _ = _mix_backward(g_h, x, pre, _NO_NORM)
    return _read_backward(source, _sum(g_pre, more), g_post, g_res, pre, g_mix)


def seam(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    norm: str,
    norm_eps: float,
    rule: str,
) -> Tensors:
    """`post_res`, `read` of its result, norm of h: `(y, h, pre, post, res, proj, square)`."""
    y = post_res(x, f, post, res)
    gates = coefficients(y, phi, alpha, bias, rule)
    return y, _mix(y, gates[0], make_norm(norm, norm_eps, weight, shift)), *gates


def seam_backward(
    g_y: Tensor | None,
    g_h: Tensor | None,
    g_pre: Tensor | None,
    g_post: Tensor | None,
    g_res: Tensor | None,
    x: Tensor,
    f: Tensor,
    post: Tensor,
    res: Tensor,
    y: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    pre_next: Tensor,
    proj: Tensor,
    square: Tensor,
    norm: str,
    norm_eps: float,
    rule: str,
    need_phi: bool = True,
) -> Tensors:
    """Gradients by `(x, f, post, res, phi, alpha, bias, weight, shift)`."""
    g_mix, affine = None, (x.new_empty(0), x.new_empty(0))
    if g_h is not None:
        g_mix, more, affine = _mix_backward(
            g_h, y, pre_next, make_norm(norm, norm_eps, weight, shift)
        )
        g_pre = _sum(g_pre, more)
    source = _Source(y, phi, alpha, bias, proj, square, rule, need_phi)
    merge = _MergeBackward(x, f, post, res)
    parameters = _read_backward(source, g_pre, g_post, g_res, pre_next, g_mix, g_y, merge)
    return *merge.gradients(), *parameters[1:], *affine


def expand(x: Tensor, n: int) -> Tensor:
    """Copies `[..., C]` into `[..., n, C]`."""
    return x.unsqueeze(-2).repeat(*[1] * (x.dim() - 1), n, 1)


def expand_backward(g_y: Tensor) -> Tensor:
    """Gradient by `x`."""
    return g_y.sum(-2)


def collapse(x: Tensor, weight: Tensor) -> Tensor:
    """`h = sum_i weight_i x_i`, one weight a stream."""
    return _mix(x, weight.expand(x.shape[:-1]), _NO_NORM)


def collapse_backward(g_h: Tensor, x: Tensor | None, weight: Tensor) -> Tensors:
    """Gradients by `(x, weight)`; x is None where the weight needs none."""
    each = weight.expand(*g_h.shape[:-1], -1)
    g_x = _outer(each, g_h, g_h.dtype)
    if x is None:
        return g_x, weight.new_empty(0)
    _, g_each, _ = _mix_backward(g_h, x, each, _NO_NORM)
    return g_x, g_each.sum(0).to(weight.dtype)


class _Source(NamedTuple):
    """What a read started from and what it kept for the backward."""

    x: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    proj: Tensor
    square: Tensor
    rule: str
    need_phi: bool


def _project(streams: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the products `[K, T]` and the sums of squares `[T]`."""
    dtype = working_dtype(streams.dtype)
    flat, phi = streams.flatten(1), phi.to(dtype)
    products = flat.new_empty((flat.shape[0], phi.shape[1]), dtype=dtype)
    for rows in _blocks(streams):
        torch.mm(flat[rows].to(dtype), phi, out=products[rows])
    square = torch.linalg.vector_norm(flat, dim=1, dtype=dtype).square()
    return products.t().contiguous(), square


def _mix(x: Tensor, pre: Tensor, norm: Norm) -> Tensor:
    """The normed mix `[..., C]`; what the norm reads is not rounded to x's dtype."""
    dtype, streams, weight = working_dtype(x.dtype), _tokens(x, 2), _tokens(pre, 1)
    h = streams.new_empty((streams.shape[0], streams.shape[2]))
    for rows in _blocks(streams):
        mixed = torch.bmm(weight[rows].to(dtype).unsqueeze(1), streams[rows].to(dtype))
        h[rows] = apply_norm(mixed.squeeze(1), norm)
    return h.view(*x.shape[:-2], x.shape[-1])


def _mix_backward(
    g_h: Tensor, x: Tensor, pre: Tensor, norm: Norm
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Returns gradients by the mix `[T, C]`, by pre `[T, n]` and by the norm's weight and shift."""
    dtype, streams, grad = working_dtype(x.dtype), _tokens(x, 2), _tokens(g_h, 1)
    plain = norm.kind == "none"
    g_mix = grad if plain else grad.new_empty(grad.shape, dtype=dtype)
    g_pre = streams.new_empty(streams.shape[:2], dtype=dtype)
    g_weight, g_shift = (streams.new_zeros(streams.shape[2], dtype=dtype) for _ in range(2))
    weight = _tokens(pre, 1)
    for rows in _blocks(streams):
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


def _read_backward(
    source: _Source,
    g_pre: Tensor | None,
    g_post: Tensor | None,
    g_res: Tensor | None,
    pre: Tensor | None = None,
    g_mix: Tensor | None = None,
    g_y: Tensor | None = None,
    merge: _MergeBackward | None = None,
) -> Tensors:
    """Gradients by `(x, phi, alpha, bias)` of what was read.

    g_x = g_y + pre g_mix + g_proj phi^T + (dr/dx) g_r. With `merge` each block of it goes there
    instead of into a tensor of its own.
    """
    streams, n = _tokens(source.x, 2), source.x.shape[-2]
    dtype, convention = working_dtype(streams.dtype), Convention.from_key(source.rule)
    divisor = norm_divisor(streams, source.square, convention)
    g_proj, g_divisor, g_alpha, g_bias = apply_gates_backward(
        *(None if g is None else _tokens(g, k) for g, k in ((g_pre, 1), (g_post, 1), (g_res, 2))),
        source.proj, divisor.value, source.alpha, source.bias, n, convention,
    )  # fmt: skip
    scale = (g_divisor * divisor.slope).view(-1, 1, 1)
    phi = source.phi.to(dtype)
    g_phi = phi.new_zeros(phi.shape[::-1] if source.need_phi else (0,))
    g_x = streams.new_empty(streams.shape if merge is None else (0,))
    for rows in _blocks(streams):
        block = streams[rows].to(dtype)
        out = torch.empty_like(block) if merge else _block_of(g_x, rows, dtype)
        if g_y is None:
            torch.mul(block, scale[rows], out=out)
        else:
            torch.addcmul(_tokens(g_y, 2)[rows].to(dtype), block, scale[rows], out=out)
        out.flatten(1).addmm_(g_proj[:, rows].t(), phi.t())
        if pre is not None and g_mix is not None:
            weight = _tokens(pre, 1)[rows].to(dtype).unsqueeze(2)
            out.addcmul_(weight, g_mix[rows].to(dtype).unsqueeze(1))
        if source.need_phi:
            g_phi.addmm_(g_proj[:, rows], block.flatten(1))
        if merge is None:
            _store(g_x, rows, out)
        else:
            merge.add(rows, out)
    return (
        g_x.view(source.x.shape) if merge is None else g_x,
        g_phi.t().to(source.phi.dtype).contiguous() if source.need_phi else g_phi,
        g_alpha.to(source.alpha.dtype),
        g_bias.to(source.bias.dtype),
    )


class _MergeBackward:
    """Gradients of `post_res`, block by block."""

    def __init__(self, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> None:
        self.inputs = (x, f, post, res)
        self.dtype = working_dtype(x.dtype)
        self.x, self.f = _tokens(x, 2), _tokens(f, 1)
        self.post, self.res = _tokens(post, 1), _tokens(res, 2)
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

    def gradients(self) -> Tensors:
        """Returns the gradients by `(x, f, post, res)`, each like its input."""
        results = (self.g_x, self.g_f, self.g_post, self.g_res)
        return tuple(
            grad.to(given.dtype).view(given.shape)
            for grad, given in zip(results, self.inputs, strict=True)
        )


def _outer(weight: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight_i grad`, `[..., n, C]`, rounded once."""
    work = working_dtype(dtype)
    weights, grads = _tokens(weight, 1), _tokens(grad, 1)
    out = grads.new_empty((*weights.shape, grads.shape[1]), dtype=dtype)
    for rows in _blocks(out):
        block = _block_of(out, rows, work)
        torch.mul(weights[rows].to(work).unsqueeze(2), grads[rows].to(work).unsqueeze(1), out=block)
        _store(out, rows, block)
    return out.view(*weight.shape, grad.shape[-1])


def _tokens(tensor: Tensor, kept: int) -> Tensor:
    """Makes one axis of all but the last `kept`; also where there are none, or no elements."""
    count = math.prod(tensor.shape[: tensor.dim() - kept])
    return tensor.reshape(count, *tensor.shape[tensor.dim() - kept :])


def _blocks(streams: Tensor) -> Iterator[slice]:
    """Slices of tokens of `[T, n, C]`."""
    tokens, n, channels = streams.shape
    step = max(1, BLOCK_ELEMENTS.get(streams.device.type, 2**26) // (n * channels))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _block_of(result: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Where a block of a result is computed: in its place, or apart if it has yet to be rounded."""
    block = result[rows]
    return block if result.dtype == dtype else torch.empty_like(block, dtype=dtype)


def _store(result: Tensor, rows: slice, block: Tensor) -> None:
    if block.dtype != result.dtype:
        result[rows] = block


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else second.view(first.shape) + first
