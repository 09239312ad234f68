"""The operators of `mhc_compile.runtime.ops` in torch, with analytic gradients.

Signatures are those of the operators; the work is done in `fused_steps` and `fused_gates`. None as
a gradient counts as zeros; a gradient that nobody needs comes back empty, with the shape [0].
"""

from __future__ import annotations

from torch import Tensor

from mhc_compile.conventions import Convention
from mhc_compile.map_layout import as_maps
from mhc_compile.runtime.fused_gates import (
    apply_gates,
    apply_gates_backward,
    divisor_of,
    norm_divisor,
)
from mhc_compile.runtime.fused_norm import make_norm
from mhc_compile.runtime.fused_steps import (
    NO_NORM,
    MergeBackward,
    Source,
    Tensors,
    add,
    by_token,
    maps_like,
    merge,
    mix,
    mix_backward,
    outer,
    project,
    streams_gradient,
)
from mhc_compile.runtime.op_shapes import streams_of


def coefficients(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """Eq. (14)-(19): `(pre, post, res, proj, square)`."""
    streams, lead, n = by_token(x, 2), x.shape[:-2], x.shape[-2]
    convention = Convention.from_key(rule)
    proj, square = project(streams, phi)
    divisor = norm_divisor(streams, square, convention)
    pre, post, res = apply_gates(proj, divisor.value, alpha, bias, n, convention)
    maps = as_maps(pre, lead, (n,)), as_maps(post, lead, (n,)), as_maps(res, lead, (n, n))
    return *maps, proj, square


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
    source = Source(x, phi, alpha, bias, proj, square, rule, need_phi)
    return streams_gradient(source, g_pre, g_post, g_res)


def maps(
    proj: Tensor, square: Tensor, alpha: Tensor, bias: Tensor, width: int, rule: str
) -> Tensors:
    """Eq. (15)-(19) from `proj: [K, T]` and `square: [T]`: `(pre, post, res)`.

    `width` is n*C, the number of squares that were summed.
    """
    convention = Convention.from_key(rule)
    divisor, n = divisor_of(square, width, convention), streams_of(proj.shape[0])
    results = apply_gates(proj, divisor.value, alpha, bias, n, convention)
    return tuple(
        as_maps(part, square.shape, shape)
        for part, shape in zip(results, ((n,), (n,), (n, n)), strict=True)
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
    """Gradients by `(proj, square, alpha, bias)`."""
    convention = Convention.from_key(rule)
    divisor = divisor_of(square, width, convention)
    g_proj, g_divisor, g_alpha, g_bias = apply_gates_backward(
        g_pre, g_post, g_res, proj, divisor.value, alpha, bias, streams_of(proj.shape[0]),
        convention,
    )  # fmt: skip
    return (
        g_proj,
        g_divisor * divisor.slope / 2,
        g_alpha.to(alpha.dtype),
        g_bias.to(bias.dtype),
    )


def pre(x: Tensor, pre: Tensor) -> Tensor:
    """`h = sum_i pre_i x_i`."""
    return mix(x, pre, NO_NORM)


def pre_backward(g_h: Tensor, x: Tensor, pre: Tensor) -> Tensors:
    """Gradients by `(x, pre)`."""
    _, g_pre, _ = mix_backward(g_h, x, pre, NO_NORM)
    return outer(pre, g_h, x.dtype), maps_like(pre, g_pre)


def pre_norm(
    x: Tensor,
    pre: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    norm: str,
    norm_eps: float,
) -> Tensor:
    """The h of `seam` from its y and its map pre."""
    return mix(x, pre, make_norm(norm, norm_eps, weight, shift))


def post_res(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`y_i = sum_j res_ij x_j + post_i f`."""
    return merge(x, f, post, res)


def post_res_backward(g_y: Tensor, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensors:
    """Gradients by `(x, f, post, res)`."""
    back = MergeBackward(x, f, post, res)
    back.add_all(g_y)
    return back.gradients()


def read(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Tensors:
    """`coefficients`, then `pre`: `(h, pre, post, res, proj, square)`."""
    gates = coefficients(x, phi, alpha, bias, rule)
    return mix(x, gates[0], NO_NORM), *gates


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
    source = Source(x, phi, alpha, bias, proj, square, rule, need_phi)
    if g_h is None:
        return streams_gradient(source, g_pre, g_post, g_res)
    g_mix, more, _ = mix_backward(g_h, x, pre, NO_NORM)
    return streams_gradient(source, add(g_pre, more), g_post, g_res, pre, g_mix)


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
    return y, mix(y, gates[0], make_norm(norm, norm_eps, weight, shift)), *gates


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
    """Gradients by `(x, f, post, res, phi, alpha, bias, weight, shift)`, and h."""
    g_mix, affine = None, (x.new_empty(0), x.new_empty(0))
    the_norm = make_norm(norm, norm_eps, weight, shift)
    if g_h is not None:
        g_mix, more, affine = mix_backward(g_h, y, pre_next, the_norm)
        g_pre = add(g_pre, more)
    source = Source(y, phi, alpha, bias, proj, square, rule, need_phi)
    back = MergeBackward(x, f, post, res)
    parameters = streams_gradient(source, g_pre, g_post, g_res, pre_next, g_mix, g_y, back)
    h = mix(y, pre_next, the_norm) if need_h else x.new_empty(0)
    return *back.gradients(), *parameters[1:], *affine, h


def expand(x: Tensor, n: int) -> Tensor:
    """Copies `[..., C]` into `[..., n, C]`."""
    return x.unsqueeze(-2).repeat(*[1] * (x.dim() - 1), n, 1)


def expand_backward(g_y: Tensor) -> Tensor:
    """Gradient by `x`."""
    return g_y.sum(-2)


def collapse(x: Tensor, weight: Tensor) -> Tensor:
    """`h = sum_i weight_i x_i`, one weight a stream."""
    return mix(x, weight.expand(x.shape[:-1]), NO_NORM)


def collapse_backward(g_h: Tensor, x: Tensor | None, weight: Tensor) -> Tensors:
    """Gradients by `(x, weight)`; x is None where the weight needs none."""
    each = weight.expand(*g_h.shape[:-1], -1)
    g_x = outer(each, g_h, g_h.dtype)
    if x is None:
        return g_x, weight.new_empty(0)
    _, g_each, _ = mix_backward(g_h, x, each, NO_NORM)
    return g_x, g_each.sum(0).to(weight.dtype)
