"""The operators of `mhc_compile.runtime.ops` as formulas that Inductor generates code from.

One function an operator, by its name and with its arguments; what each computes is said there.
Sinkhorn-Knopp and what surrounds it stay the operators `maps` and `maps_backward`: on T tokens of
K = n*n + 2*n numbers they are too small to fuse and too long to unroll. Sums over streams are
written term by term, because Inductor makes one loop over channels of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhc_compile.map_layout import as_maps
from mhc_compile.runtime.fused_norm import apply_norm, apply_norm_backward, make_norm
from mhc_compile.runtime.precision import working_dtype

Tensors = tuple[Tensor, ...]


def coefficients(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """Eq. (14)-(19)."""
    streams, lead = _rows(x, 2), x.shape[:-2]
    _, n, channels = streams.shape
    proj, square = _project(streams, phi)
    pre, post, res = torch.ops.mhc.maps(proj, square, alpha, bias, n * channels, rule)
    parts = (pre.t(), (n,)), (post.t(), (n,)), (res.permute(1, 2, 0), (n, n))
    return *(as_maps(part, lead, shape) for part, shape in parts), proj, square


def coefficients_backward(
    g_pre: Tensor | None, g_post: Tensor | None, g_res: Tensor | None, x: Tensor, phi: Tensor,
    alpha: Tensor, bias: Tensor, proj: Tensor, square: Tensor, rule: str, need_phi: bool = True,
) -> Tensors:  # fmt: skip
    """Gradients by `(x, phi, alpha, bias)`."""
    return read_backward(
        None,
        g_pre,
        g_post,
        g_res,
        x,
        phi,
        alpha,
        bias,
        x.new_empty(0),
        proj,
        square,
        rule,
        need_phi,
    )


def pre(x: Tensor, pre: Tensor) -> Tensor:
    """`h = sum_i pre_i x_i`."""
    h = _mix(_rows(x, 2), _map_rows(pre, 1))
    return h.to(x.dtype).view(*x.shape[:-2], x.shape[-1])


def pre_backward(g_h: Tensor, x: Tensor, pre: Tensor) -> Tensors:
    """Gradients by `(x, pre)`."""
    work = working_dtype(x.dtype)
    g_x = pre.to(work).unsqueeze(-1) * g_h.to(work).unsqueeze(-2)
    g_pre = _dots(_rows(g_h, 1).to(work), _rows(x, 2).to(work))
    return g_x.to(x.dtype), g_pre.to(pre.dtype).view(pre.shape)


def pre_norm(
    x: Tensor, pre: Tensor, weight: Tensor | None, shift: Tensor | None, norm: str, norm_eps: float
) -> Tensor:
    """The h of `seam` from its y and its map pre."""
    mixed = _mix(_rows(x, 2), _map_rows(pre, 1))
    h = apply_norm(mixed, make_norm(norm, norm_eps, weight, shift))
    return h.to(x.dtype).view(*x.shape[:-2], x.shape[-1])


def post_res(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`y_i = sum_j res_ij x_j + post_i f`."""
    y = _merge(_rows(x, 2), _rows(f, 1), _map_rows(post, 1), _map_rows(res, 2))
    return y.view(x.shape)


def post_res_backward(g_y: Tensor, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensors:
    """Gradients by `(x, f, post, res)`."""
    return _merge_backward(_rows(g_y, 2).to(working_dtype(x.dtype)), x, f, post, res)


def read(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """`coefficients`, then `pre`."""
    maps = coefficients(x, phi, alpha, bias, rule)
    return pre(x, maps[0]), *maps


def read_backward(
    g_h: Tensor | None, g_pre: Tensor | None, g_post: Tensor | None, g_res: Tensor | None,
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, pre: Tensor, proj: Tensor,
    square: Tensor, rule: str, need_phi: bool = True,
) -> Tensors:  # fmt: skip
    """Gradients by `(x, phi, alpha, bias)`."""
    wide = _rows(x, 2).to(working_dtype(x.dtype))
    g_mix = None
    if g_h is not None:
        g_mix = _rows(g_h, 1).to(wide.dtype)
        g_pre = _add(g_pre, _dots(g_mix, wide))
    grad, *parameters = _project_backward(
        wide, (g_pre, g_post, g_res), phi, alpha, bias, proj, square, rule, need_phi
    )
    if g_mix is not None:
        grad = grad + _map_rows(pre, 1).unsqueeze(2) * g_mix.unsqueeze(1)
    return grad.to(x.dtype).view(x.shape), *parameters


def seam(
    x: Tensor, f: Tensor, post: Tensor, res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    weight: Tensor | None, shift: Tensor | None, norm: str, norm_eps: float, rule: str,
) -> Tensors:  # fmt: skip
    """`post_res`, `read` of its result, norm of h."""
    y = post_res(x, f, post, res)
    maps = coefficients(y, phi, alpha, bias, rule)
    h = apply_norm(
        _mix(_rows(y, 2), _map_rows(maps[0], 1)), make_norm(norm, norm_eps, weight, shift)
    )
    return y, h.to(x.dtype).view(*x.shape[:-2], x.shape[-1]), *maps


def seam_backward(
    g_y: Tensor | None, g_h: Tensor | None, g_pre: Tensor | None, g_post: Tensor | None,
    g_res: Tensor | None, x: Tensor, f: Tensor, post: Tensor, res: Tensor, y: Tensor, phi: Tensor,
    alpha: Tensor, bias: Tensor, weight: Tensor | None, shift: Tensor | None, pre_next: Tensor,
    proj: Tensor, square: Tensor, norm: str, norm_eps: float, rule: str, need_phi: bool = True,
    need_h: bool = False,
) -> Tensors:  # fmt: skip
    """Gradients by `(x, f, post, res, phi, alpha, bias, weight, shift)`, and h."""
    wide, weights = _rows(y, 2).to(working_dtype(y.dtype)), _map_rows(pre_next, 1)
    g_mix, affine = None, [x.new_empty(0), x.new_empty(0)]
    if g_h is not None:
        g_mix = _rows(g_h, 1).to(wide.dtype)
        if norm != "none":
            through = apply_norm_backward(
                g_mix, _mix(wide, weights), make_norm(norm, norm_eps, weight, shift)
            )
            g_mix = through.h
            affine = [
                empty if given is None else grad.to(given.dtype)
                for empty, given, grad in zip(
                    affine, (weight, shift), (through.weight, through.shift), strict=True
                )
            ]
        g_pre = _add(g_pre, _dots(g_mix, wide))
    grad, *parameters = _project_backward(
        wide, (g_pre, g_post, g_res), phi, alpha, bias, proj, square, rule, need_phi
    )
    if g_y is not None:
        grad = grad + _rows(g_y, 2)
    if g_mix is not None:
        grad = grad + weights.unsqueeze(2) * g_mix.unsqueeze(1)
    h = pre_norm(y, pre_next, weight, shift, norm, norm_eps) if need_h else x.new_empty(0)
    return *_merge_backward(grad, x, f, post, res), *parameters, *affine, h


def expand(x: Tensor, n: int) -> Tensor:
    """Copies `[..., C]` into `[..., n, C]`."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]).clone()


def expand_backward(g_y: Tensor) -> Tensor:
    """Gradient by `x`."""
    return g_y.sum(-2)


def collapse(x: Tensor, weight: Tensor) -> Tensor:
    """`h = sum_i weight_i x_i`, one weight a stream."""
    return pre(x, weight.expand(x.shape[:-1]))


def collapse_backward(g_h: Tensor, x: Tensor | None, weight: Tensor) -> Tensors:
    """Gradients by `(x, weight)`; x is None where the weight needs none."""
    each = weight.expand(*g_h.shape[:-1], weight.shape[0])
    if x is None:
        work = working_dtype(g_h.dtype)
        g_x = each.to(work).unsqueeze(-1) * g_h.to(work).unsqueeze(-2)
        return g_x.to(g_h.dtype), weight.new_empty(0)
    g_x, g_each = pre_backward(g_h, x, each)
    return g_x, g_each.reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)


# --- steps, on tokens [T, ...] -----------------------------------------------------------------


def _rows(tensor: Tensor, kept: int) -> Tensor:
    """Makes one axis of all but the last `kept`."""
    count = math.prod(tensor.shape[: tensor.dim() - kept])
    return tensor.reshape(count, *tensor.shape[tensor.dim() - kept :])


def _map_rows(maps: Tensor, kept: int) -> Tensor:
    """The same of maps, of which each component lies apart (`mhc_compile.map_layout`).

    Contiguous, so that what is computed with them is: Inductor makes no copy for it.
    """
    own, count = maps.dim() - kept, maps.dim()
    apart = maps.permute(*range(own, count), *range(own))
    flat = apart.reshape(*apart.shape[:kept], math.prod(maps.shape[:own]))
    return flat.permute(kept, *range(kept)).contiguous()


def _merge(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    wide = x.to(working_dtype(x.dtype))
    y = post.unsqueeze(2) * f.to(wide.dtype).unsqueeze(1)
    for j in range(x.shape[1]):
        y = y + res[:, :, j, None] * wide[:, None, j]
    return y.to(x.dtype)


def _merge_backward(grad: Tensor, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensors:
    """Gradients of a merge by its inputs, `grad: [T, n, C]` in the working dtype."""
    streams, branch = _rows(x, 2).to(grad.dtype), _rows(f, 1).to(grad.dtype)
    weights, matrices = _map_rows(post, 1), _map_rows(res, 2)
    n = grad.shape[1]
    g_x = matrices[:, 0, :, None] * grad[:, None, 0]
    for i in range(1, n):
        g_x = g_x + matrices[:, i, :, None] * grad[:, None, i]
    g_f = _mix(grad, weights)
    g_res = torch.stack([_dots(streams[:, j], grad) for j in range(n)], 2)
    g_post = _dots(branch, grad)
    results = (g_x, g_f, g_post, g_res)
    return tuple(
        value.to(given.dtype).reshape(given.shape)
        for value, given in zip(results, (x, f, post, res), strict=True)
    )


def _mix(x: Tensor, weight: Tensor) -> Tensor:
    """`sum_i weight_i x_i`, `[T, C]` in the working dtype."""
    wide = x.to(working_dtype(x.dtype))
    h = weight[:, 0, None] * wide[:, 0]
    for i in range(1, x.shape[1]):
        h = h + weight[:, i, None] * wide[:, i]
    return h


def _dots(row: Tensor, streams: Tensor) -> Tensor:
    """Products of `row: [T, C]` with each of `streams: [T, n, C]`, `[T, n]`."""
    return (row.unsqueeze(1) * streams).sum(2)


def _project(streams: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """The products `[K, T]` and the sums of squares `[T]`."""
    tokens, n, channels = streams.shape
    wide, phi = streams.to(working_dtype(streams.dtype)), phi.to(working_dtype(streams.dtype))
    if n > 1 and streams.stride(1) == 0:  # copies of one row
        row = wide[:, 0]
        products = row @ phi.view(n, channels, -1).sum(0)
        return products.t().contiguous(), n * (row * row).sum(1)
    products = wide.reshape(tokens, n * channels) @ phi
    return products.t().contiguous(), (wide * wide).sum((1, 2))


def _project_backward(
    wide: Tensor, grads: tuple[Tensor | None, Tensor | None, Tensor | None], phi: Tensor,
    alpha: Tensor, bias: Tensor, proj: Tensor, square: Tensor, rule: str, need_phi: bool,
) -> Tensors:  # fmt: skip
    """The gradients by the streams, as far as the maps depend on them, by phi, alpha and bias."""
    tokens, n, channels = wide.shape
    by_row = [
        None if grad is None else _map_rows(grad, kept)
        for grad, kept in zip(grads, (1, 1, 2), strict=True)
    ]
    g_proj, g_square, g_alpha, g_bias = torch.ops.mhc.maps_backward(
        *by_row, proj, square, alpha, bias, n * channels, rule
    )
    columns = phi.to(wide.dtype)
    grad = (g_proj.t() @ columns.t()).view(tokens, n, channels)
    grad = grad + (2 * g_square).view(-1, 1, 1) * wide
    if need_phi:
        g_phi = (g_proj @ wide.reshape(tokens, n * channels)).t().to(phi.dtype)
    else:
        g_phi = phi.new_empty(0)
    return grad, g_phi, g_alpha, g_bias


def _add(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else second + first.reshape(second.shape)
