"""The operators of `runtime.ops` by generated kernels: same names, arguments and results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_compile.codegen.kernel_calls import NAMES, KernelCalls, Pair, kernel_calls
from mhc_compile.codegen.spec import MAX_STREAMS, NORMS
from mhc_compile.codegen.tiles import fits_whole
from mhc_compile.codegen.tuning import tuning_of
from mhc_compile.errors import MHCError

Results = tuple[Tensor, ...]
FEW_TOKENS = 16
"""Up to here, as in decoding, a seam is one launch; on an H100 three launches win beyond."""


def supports(first: Tensor, streams: Tensor | None) -> bool:
    """Whether there are kernels for the device and dtype of a tensor and the number of streams."""
    few = streams is None or streams.dim() < 2 or streams.shape[-2] <= MAX_STREAMS
    return first.is_cuda and first.dtype in NAMES and few


def coefficients(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Results:
    """Eq. (14)-(19): `(pre, post, res, proj, square)`."""
    call = _calls(x, rule)
    _, partial = call.project(call.read_only(x), None, None, None, call.split_phi(phi))
    return _outputs(call, call.gates(partial, alpha, bias))


def coefficients_backward(
    g_pre: Tensor | None, g_post: Tensor | None, g_res: Tensor | None, x: Tensor, phi: Tensor,
    alpha: Tensor, bias: Tensor, proj: Tensor, square: Tensor, rule: str, need_phi: bool = True,
) -> Results:  # fmt: skip
    """Gradients by `(x, phi, alpha, bias)`."""
    return read_backward(
        None, g_pre, g_post, g_res, x, phi, alpha, bias, None, proj, square, rule, need_phi
    )


def pre(x: Tensor, pre: Tensor) -> Tensor:
    """`h = sum_i pre_i x_i`."""
    call = _calls(x)
    h = call.pre(call.read_only(x), call.by_component(pre, call.n), None, None, "none", 0.0)
    return h.view(*call.lead, call.channels)


def pre_backward(g_h: Tensor, x: Tensor, pre: Tensor) -> Results:
    """Gradients by `(x, pre)`."""
    call = _calls(x)
    maps, gradient = call.by_component(pre, call.n), call.single(g_h)
    g_pre, *_ = call.pre_backward(call.read_only(x), maps, gradient)
    g_x = call.spread(maps, gradient).view(x.shape)
    return g_x, call.by_token(g_pre.to(pre.dtype), call.n)


def pre_norm(
    x: Tensor, pre: Tensor, weight: Tensor | None, shift: Tensor | None, norm: str, norm_eps: float
) -> Tensor:
    """The h of `seam` from its y and its map pre."""
    call = _calls(x)
    _check_norm(norm)
    maps = call.by_component(pre, call.n)
    h = call.pre(call.streams(x), maps, weight, shift, norm, norm_eps)
    return h.view(*call.lead, call.channels)


def post_res(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`y_i = sum_j res_ij x_j + post_i f`."""
    call = _calls(x)
    return call.mix(call.read_only(x), call.single(f), *call.mixing(post, res)).view(x.shape)


def post_res_backward(g_y: Tensor, x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Results:
    """Gradients by `(x, f, post, res)`."""
    call = _calls(x)
    n = call.n
    g_x, g_f, dots = call.mix_backward(
        call.read_only(x), call.single(f), *call.mixing(post, res), call.streams(g_y)
    )
    g_res, g_post = dots[:, : n * n].sum(0).to(res.dtype), dots[:, n * n :].sum(0).to(post.dtype)
    maps = call.by_token(g_post, n), call.by_token(g_res, n, n)
    return g_x.view(x.shape), g_f.view(f.shape), *maps


def read(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str) -> Results:
    """`coefficients`, then `pre`: `(h, pre, post, res, proj, square)`."""
    call = _calls(x, rule)
    streams = call.read_only(x)
    _, partial = call.project(streams, None, None, None, call.split_phi(phi))
    h, gates = call.read(streams, partial, alpha, bias, None, None, "none", 0.0)
    return h.view(*call.lead, call.channels), *_outputs(call, gates)


def read_backward(
    g_h: Tensor | None, g_pre: Tensor | None, g_post: Tensor | None, g_res: Tensor | None,
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, pre: Tensor | None, proj: Tensor,
    square: Tensor, rule: str, need_phi: bool = True,
) -> Results:  # fmt: skip
    """Gradients by `(x, phi, alpha, bias)`."""
    call = _calls(x, rule)
    streams = call.read_only(x)
    terms = [] if g_pre is None else [call.by_component(g_pre, call.n)]
    if g_h is None or pre is None:  # h was not used
        maps = call.by_component(None, call.n)
        gradient = torch.zeros(call.tokens, call.channels, dtype=x.dtype, device=x.device)
    else:
        maps, gradient = call.by_component(pre, call.n), call.single(g_h)
        terms.append(call.pre_backward(streams, maps, gradient)[0])
    dh, scale, sums = _gates_backward(call, (alpha, bias), proj, square, terms, g_post, g_res)
    shares = call.phi_backward(streams, dh) if need_phi else None
    g_x = call.read_backward(streams, None, maps, gradient, call.pad_phi(phi), dh, scale)
    like = {"phi": phi, "alpha": alpha, "bias": bias}
    added = call.add_shares(sums, shares, (None, None), None, like)
    return g_x.view(x.shape), *added.values()


def seam(
    x: Tensor, f: Tensor, post: Tensor, res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    weight: Tensor | None, shift: Tensor | None, norm: str, norm_eps: float, rule: str,
) -> Results:  # fmt: skip
    """`post_res`, `read` of its result, norm of h: `(y, h, pre, post, res, proj, square)`."""
    call = _calls(x, rule)
    _check_norm(norm)
    once = call.tokens <= FEW_TOKENS and fits_whole(call.base)
    streams = call.streams(x) if once else call.read_only(x)
    mixed = streams, call.single(f), *call.mixing(post, res)
    if once:
        y, h, gates = call.seam_once(*mixed, phi, alpha, bias, weight, shift, norm, norm_eps)
    else:
        y, partial = call.project(*mixed, call.split_phi(phi))
        h, gates = call.read(y, partial, alpha, bias, weight, shift, norm, norm_eps)
    return y.view(x.shape), h.view(*call.lead, call.channels), *_outputs(call, gates)


def seam_backward(
    g_y: Tensor | None, g_h: Tensor | None, g_pre: Tensor | None, g_post: Tensor | None,
    g_res: Tensor | None, x: Tensor, f: Tensor, post: Tensor, res: Tensor, y: Tensor, phi: Tensor,
    alpha: Tensor, bias: Tensor, weight: Tensor | None, shift: Tensor | None, pre_next: Tensor,
    proj: Tensor, square: Tensor, norm: str, norm_eps: float, rule: str, need_phi: bool = True,
    need_h: bool = False,
) -> Results:  # fmt: skip
    """Gradients by `(x, f, post, res, phi, alpha, bias, weight, shift)`, and h."""
    call = _calls(x, rule)
    _check_norm(norm)
    mixed = call.read_only(x), call.single(f), *call.mixing(post, res)
    flat_y = call.streams(y)
    flat_g = torch.zeros_like(flat_y) if g_y is None else call.streams(g_y)
    maps = call.by_component(pre_next, call.n)
    terms = [] if g_pre is None else [call.by_component(g_pre, call.n)]
    affine: Sequence[Tensor | None] = (None, None)
    norms = None
    whole, norm_of_h, h = fits_whole(call.base), (weight, shift, norm, norm_eps), None
    at_once = need_h and whole and shift is None  # for more memory does not suffice on every GPU
    if g_h is None:
        gradient = torch.zeros_like(mixed[1])
    else:
        term, gradient, norms, h, affine = call.pre_backward(
            flat_y, maps, call.single(g_h), *norm_of_h, at_once
        )
        terms.append(term)
    if need_h and h is None:
        h = call.pre(flat_y, maps, *norm_of_h)
    # The norm whose gradient is left to the kernels that follow, and its weight.
    left = ("none", None) if norms is None else (norm, weight)
    dh, own, sums = _gates_backward(
        call, (alpha, bias), proj, square, terms, g_post, g_res,
        (mixed[3], mixed[2], maps) if whole else (), left[0], norms,
    )  # fmt: skip
    shares = call.phi_backward(flat_y, dh) if need_phi else None
    padded = call.pad_phi(phi)
    if whole:
        g_x, g_f, dots = call.seam_backward(*mixed[:2], flat_g, gradient, own, padded, dh, *left)
    else:
        flat_g = call.read_backward(flat_y, flat_g, maps, gradient, padded, dh, own)
        g_x, g_f, dots = call.mix_backward(*mixed, flat_g)
    like = {"post": post, "res": res, "phi": phi, "alpha": alpha, "bias": bias,
            "weight": x if weight is None else weight,
            "shift": x if shift is None else shift}  # fmt: skip
    g_post, g_res, *others = call.add_shares(sums, shares, affine, dots, like).values()
    maps_gradients = call.by_token(g_post, call.n), call.by_token(g_res, call.n, call.n)
    again = x.new_empty(0) if h is None else h.view(*call.lead, call.channels)
    return g_x.view(x.shape), g_f.view(f.shape), *maps_gradients, *others, again


def expand(x: Tensor, n: int) -> Tensor:
    """Copies `[..., C]` into `[..., n, C]`; torch joins, but does not expand, by wide loads."""
    joined = torch.cat([x.contiguous()] * n, -1)
    return joined.view(*x.shape[:-1], n, x.shape[-1])


def expand_backward(g_y: Tensor) -> Tensor:
    """Gradient by `x`."""
    return g_y.sum(-2)


def collapse(x: Tensor, weight: Tensor) -> Tensor:
    """`h = sum_i weight_i x_i`, one weight a stream."""
    return pre(x, weight.expand(x.shape[:-1]))


def collapse_backward(g_h: Tensor, x: Tensor | None, weight: Tensor) -> Results:
    """Gradients by `(x, weight)`; x is None where the weight needs none."""
    each = weight.expand(*g_h.shape[:-1], -1)
    if x is not None:
        g_x, g_each = pre_backward(g_h, x, each)
        return g_x, g_each.reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
    like = g_h.unsqueeze(-2).expand(*each.shape, -1)
    if weight.shape[0] > MAX_STREAMS:  # nothing told `supports` of them
        return (each.unsqueeze(-1) * like).to(g_h.dtype), weight.new_empty(0)
    call = _calls(like)
    g_x = call.spread(call.by_component(each, call.n), call.single(g_h)).view(like.shape)
    return g_x, weight.new_empty(0)


def _calls(x: Tensor, rule: str | None = None) -> KernelCalls:
    if x.shape[-2] > MAX_STREAMS:
        raise MHCError(
            f"there are kernels for up to {MAX_STREAMS} streams, got {x.shape[-2]}; the operators "
            "torch.ops.mhc.* run in torch then"
        )
    return kernel_calls(x.shape, x.dtype, x.device, rule, tuning_of(x.device))


def _outputs(call: KernelCalls, gates: tuple[Tensor, ...]) -> Results:
    pre, post, res, proj, square = gates
    n = call.n
    return call.by_token(pre, n), call.by_token(post, n), call.by_token(res, n, n), proj, square


def _gates_backward(
    call: KernelCalls, parameters: tuple[Tensor, Tensor], proj: Tensor, square: Tensor,
    terms: list[Tensor], g_post: Tensor | None, g_res: Tensor | None,
    mixed: Sequence[Tensor] = (), norm: str = "none", norms: Tensor | None = None,
) -> tuple[Pair, Tensor, Tensor]:  # fmt: skip
    """As `KernelCalls.gates_backward`; pre's gradient is the sum of `terms`."""
    terms = terms or [call.by_component(None, call.n)]
    g_pre = terms[0].unsqueeze(0) if len(terms) == 1 else torch.stack(terms)
    maps = call.by_component(g_post, call.n), call.by_component(g_res, call.n, call.n)
    return call.gates_backward(proj, square, *parameters, g_pre, *maps, mixed, norm, norms)


def _check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise MHCError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
