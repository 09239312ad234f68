"""Shapes, dtypes and strides of what the operators of `mhc_compile.runtime.ops` return.

One function an operator, by its name: what torch.compile, torch.export and the meta device run in
the operator's place. Results are contiguous, but for maps and their gradients: these lie component
by component, see `mhc_compile.map_layout`. The order of gradients is that of the operator's inputs;
a gradient that nobody needs has the shape [0].
"""

from __future__ import annotations

import math

from torch import Tensor

from mhc_compile.map_layout import as_maps
from mhc_compile.runtime.precision import working_dtype

Tensors = tuple[Tensor, ...]


def coefficients(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """Pre and post `[..., n]`, res `[..., n, n]`, proj `[n*n + 2*n, T]`, square `[T]`."""
    lead, n, dtype = x.shape[:-2], x.shape[-2], working_dtype(x.dtype)
    tokens = math.prod(lead)
    maps = (
        as_maps(x.new_empty((*shape, *lead), dtype=dtype), lead, shape)
        for shape in ((n,), (n,), (n, n))
    )
    kept = (x.new_empty(shape, dtype=dtype) for shape in ((phi.shape[1], tokens), (tokens,)))
    return *maps, *kept


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
    """Like x, phi, alpha, bias."""
    return _like(x), _like(phi, need_phi), _like(alpha), _like(bias)


def maps(
    proj: Tensor, square: Tensor, alpha: Tensor, bias: Tensor, width: int, rule: str
) -> Tensors:
    """Pre and post `[T, n]`, res `[T, n, n]`."""
    n, tokens = streams_of(proj.shape[0]), proj.shape[1]
    return tuple(
        as_maps(proj.new_empty((*shape, tokens)), (tokens,), shape)
        for shape in ((n,), (n,), (n, n))
    )


def maps_backward(
    g_pre: Tensor | None,
    g_post: Tensor | None,
    g_res: Tensor | None,
    proj: Tensor,
    square: Tensor,
    alpha: Tensor,
    bias: Tensor,
    width: int,
    rule: str,
) -> Tensors:
    """Like proj, square, alpha, bias."""
    return _like(proj), _like(square), _like(alpha), _like(bias)


def streams_of(maps: int) -> int:
    """The number of streams n of which there are `n*n + 2*n` maps."""
    return math.isqrt(int(maps) + 1) - 1


def pre(x: Tensor, pre: Tensor) -> Tensor:
    """`[..., C]` in x's dtype."""
    return x.new_empty((*x.shape[:-2], x.shape[-1]))


def pre_backward(g_h: Tensor, x: Tensor, pre: Tensor) -> Tensors:
    """Like x, pre."""
    return _like(x), _like_maps(pre, 1)


def pre_norm(
    x: Tensor,
    pre: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    norm: str,
    norm_eps: float,
) -> Tensor:
    """`[..., C]` in x's dtype."""
    return x.new_empty((*x.shape[:-2], x.shape[-1]))


def post_res(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Like x."""
    return _like(x)


def post_res_backward(g_y: Tensor, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensors:
    """Like x, f, post, res."""
    return _like(x), _like(f), _like_maps(post, 1), _like_maps(res, 2)


def read(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """H like `pre`'s, then `coefficients`'."""
    gates = coefficients(x, phi, alpha, bias, rule)
    return pre(x, gates[0]), *gates


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
    """Like x, phi, alpha, bias."""
    return _like(x), _like(phi, need_phi), _like(alpha), _like(bias)


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
    """Y like x, then `read`'s."""
    return _like(x), *read(x, phi, alpha, bias, rule)


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
    need_h: bool = False,
) -> Tensors:
    """Like x, f, post, res, phi, alpha, bias, weight, shift, then `pre`'s h."""
    used = g_h is not None and norm != "none"
    affine = (_like(x if t is None else t, used and t is not None) for t in (weight, shift))
    parameters = _like(phi, need_phi), _like(alpha), _like(bias)
    maps = _like_maps(post, 1), _like_maps(res, 2)
    h = pre(y, pre_next) if need_h else _like(x, False)
    return _like(x), _like(f), *maps, *parameters, *affine, h


def expand(x: Tensor, n: int) -> Tensor:
    """`[..., n, C]`."""
    return x.new_empty((*x.shape[:-1], n, x.shape[-1]))


def expand_backward(g_y: Tensor) -> Tensor:
    """`[..., C]`."""
    return g_y.new_empty((*g_y.shape[:-2], g_y.shape[-1]))


def collapse(x: Tensor, weight: Tensor) -> Tensor:
    """`[..., C]` in x's dtype."""
    return x.new_empty((*x.shape[:-2], x.shape[-1]))


def collapse_backward(g_h: Tensor, x: Tensor | None, weight: Tensor) -> Tensors:
    """Like x, weight."""
    g_x = g_h.new_empty((*g_h.shape[:-1], weight.shape[0], g_h.shape[-1]))
    return g_x, _like(weight, x is not None)


def _like_maps(maps: Tensor, kept: int) -> Tensor:
    lead, shape = maps.shape[: maps.dim() - kept], maps.shape[maps.dim() - kept :]
    return as_maps(maps.new_empty((*shape, *lead)), lead, shape)


def _like(tensor: Tensor, needed: bool = True) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else (0,))
