"""Manifold-Constrained Hyper-Connections in plain torch: one function per equation.

Equation numbers are those of arXiv 2512.24880. Every function takes any floating dtype, works in
float32 (float64 for float64 streams) with autocast off, and is differentiable. The streams of one
token are `x: [n, C]`; leading dimensions `...` are free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.conventions import NORM_EPS_PLACES, Convention, get_convention
from mhc_compile.errors import MHCError
from mhc_compile.runtime.checks import (
    check_count,
    check_float,
    check_merge,
    check_shape,
    check_streams,
    collapse_mode,
)
from mhc_compile.runtime.precision import autocast_off, working_dtype
from mhc_compile.runtime.sinkhorn import sinkhorn_knopp

__all__ = [
    "apply_post_res",
    "apply_pre",
    "coefficients",
    "collapse_streams",
    "expand_streams",
    "flatten_streams",
    "gate_logits",
    "hc_coefficients",
    "head_weights",
    "norm_divisor",
    "post_gate",
    "pre_gate",
    "project_streams",
    "res_map",
    "sinkhorn_knopp",
]


def coefficients(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    n: int,
    iters: int | None = None,
    eps: float | None = None,
    convention: str | Convention = "paper",
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the three maps of one sublayer from its residual streams, Eq. (14)-(19).

    An all-zero token has its biases as logits. With the paper's eps of 1e-20 its gradients are
    finite but large: the divisor is 1e-10, so the projection's gradient is scaled by 1e10.

    Args:
        x: `[..., n, C]`, the streams; their order in `phi`'s rows is that of `x.flatten(-2)`.
        phi: `[n*C, n*n + 2*n]`, columns ordered pre, post, res; any norm weight is absorbed in it.
        alpha: `[3]`, the gates of pre, post, res.
        bias: `[n*n + 2*n]`, ordered pre, post, res.
        n: the number of streams.
        iters: Sinkhorn iterations; None is the convention's.
        eps: the eps of the NORM divisor of Eq. 15, not of Sinkhorn; None is the convention's.
        convention: a name in `mhc_compile.conventions.CONVENTIONS` or a `Convention`.

    Returns:
        `pre: [..., n]`, `post: [..., n]`, `res: [..., n, n]` in float32, or float64 for float64 x.
        `res` is always `res[out, in]`, to be applied as `res @ x`: a convention that stores the
        transpose keeps its own order in the columns of `phi` and `bias` and is transposed here.

    Raises:
        MHCError: a shape, a dtype, `n`, `iters` or `eps` is wrong.
        ConfigError: the convention is unknown.

    Example:
        >>> x, phi = torch.randn(5, 2, 8), torch.randn(16, 8)
        >>> pre, post, res = coefficients(x, phi, torch.ones(3), torch.zeros(8), n=2)
        >>> pre.shape, post.shape, res.shape
        (torch.Size([5, 2]), torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """
    rule = get_convention(convention)
    check_streams(x, n)
    projected = project_streams(x, phi)
    divisor = norm_divisor(x, rule.norm_eps if eps is None else eps, place=rule.norm_eps_place)
    pre_logits, post_logits, res_logits = gate_logits(projected, divisor, alpha, bias, n=n)
    return (
        pre_gate(pre_logits, rule.pre_eps),
        post_gate(post_logits, rule.post_multiplier),
        res_map(res_logits, iters, convention=rule),
    )


def flatten_streams(x: Tensor) -> Tensor:
    """Lays the streams of a token end to end: vec(x) of Eq. (14).

    Args:
        x: `[..., n, C]`.

    Returns:
        `[..., n*C]` in x's dtype, stream by stream.

    Raises:
        MHCError: `x` has fewer than two dimensions.

    Example:
        >>> flatten_streams(torch.tensor([[1, 2], [3, 4]])).tolist()
        [1, 2, 3, 4]
    """
    if x.dim() < 2:
        raise MHCError(f"x must have the shape [..., n, C], got {list(x.shape)}")
    return x.flatten(-2)


def project_streams(x: Tensor, phi: Tensor) -> Tensor:
    """Projects the raw streams to the coefficients' logits, Eq. (14): vec(x) phi.

    Args:
        x: `[..., n, C]`.
        phi: `[n*C, K]`; K is n*n + 2*n for a sublayer, n for a head.

    Returns:
        `[..., K]` in float32 or float64. The norm divides it afterwards, see `norm_divisor`.

    Raises:
        MHCError: `phi` is not a floating `[n*C, K]`.

    Example:
        >>> project_streams(torch.ones(2, 3), torch.ones(6, 8)).shape
        torch.Size([8])
    """
    check_float("x", x)
    flat = flatten_streams(x)
    check_float("phi", phi)
    if phi.dim() != 2 or phi.shape[0] != flat.shape[-1]:
        n, channels = x.shape[-2:]
        raise MHCError(
            f"phi must have the shape [n*C, K] = [{n * channels}, K] for streams of "
            f"shape [..., {n}, {channels}], got {list(phi.shape)}"
        )
    dtype = working_dtype(x.dtype)
    with autocast_off(x):
        return flat.to(dtype) @ phi.to(dtype)


def norm_divisor(x: Tensor, eps: float = 1e-20, *, place: str = "inside") -> Tensor:
    """Computes the RMSNorm divisor over all streams of a token, Eq. (15): ||vec(x)|| / sqrt(n C).

    Squares neither overflow nor lose eps: rows beyond 2**48 are scaled down first. A token for
    which the divisor would be 0, with `eps` = 0, gets 1. The gradient at an all-zero token is 0.

    Args:
        x: `[..., n, C]`.
        eps: guards against division by zero.
        place: "inside": sqrt(mean square + eps); "outside": sqrt(mean square) + eps.

    Returns:
        `[...]` in float32 or float64.

    Raises:
        MHCError: `eps` is negative or `place` unknown.

    Example:
        >>> norm_divisor(torch.full((2, 3), 4.0)).item()
        4.0
    """
    if not eps >= 0:
        raise MHCError(f"eps must be a number of at least 0, got {eps!r}")
    if place not in NORM_EPS_PLACES:
        raise MHCError(f"place must be one of {NORM_EPS_PLACES}, got {place!r}")
    check_float("x", x)
    flat = flatten_streams(x).to(working_dtype(x.dtype))
    scale = torch.ones((), dtype=flat.dtype, device=flat.device)
    if x.dtype != torch.float16 and flat.shape[-1] > 0:
        peak = flat.detach().abs().amax(-1)
        scale = torch.where(peak > 2.0**48, peak, scale)
        flat = flat / scale.unsqueeze(-1)
    square = flat.square().mean(-1)
    if place == "inside":
        square = square + eps / scale.square()
    # The root of 0 has an infinite slope, which autograd would multiply with 0.
    zero = square == 0
    root = scale * torch.where(zero, torch.ones_like(square), square).sqrt()
    if place == "inside":
        return root
    return torch.where(zero, torch.full_like(root, eps or 1.0), root + eps)


def gate_logits(
    projected: Tensor, divisor: Tensor, alpha: Tensor, bias: Tensor, *, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises, gates and shifts the projection, Eq. (16): alpha * projected / divisor + bias.

    Args:
        projected: `[..., n*n + 2*n]`, from `project_streams`, ordered pre, post, res.
        divisor: `[...]`, from `norm_divisor`.
        alpha: `[3]`.
        bias: `[n*n + 2*n]`.
        n: the number of streams.

    Returns:
        The logits of pre `[..., n]`, post `[..., n]` and res `[..., n, n]`, row by row.

    Raises:
        MHCError: a shape or dtype is wrong.

    Example:
        >>> ones = torch.ones(3)
        >>> [part.item() for part in gate_logits(ones, torch.tensor(2.0), ones, ones, n=1)]
        [1.5, 1.5, 1.5]
    """
    columns = n * n + 2 * n
    if projected.shape[-1:] != (columns,):
        raise MHCError(
            f"phi must have n*n + 2*n = {columns} columns for n = {n}, "
            f"got {projected.shape[-1] if projected.dim() else 0}"
        )
    check_shape("alpha", alpha, (3,), "[3]")
    check_shape("bias", bias, (columns,), "[n*n + 2*n]")
    alpha, bias = alpha.to(projected.dtype), bias.to(projected.dtype)
    normed = projected / divisor.unsqueeze(-1)
    pre, post, res = torch.split(normed, [n, n, n * n], dim=-1)
    pre_bias, post_bias, res_bias = torch.split(bias, [n, n, n * n])
    return (
        alpha[0] * pre + pre_bias,
        alpha[1] * post + post_bias,
        (alpha[2] * res + res_bias).reshape(*res.shape[:-1], n, n),
    )


def pre_gate(logits: Tensor, pre_eps: float = 0.0) -> Tensor:
    """Computes the pre map, Eq. (17): sigmoid(logits) + pre_eps.

    Args:
        logits: `[..., n]`.
        pre_eps: 0 in the paper.

    Returns:
        `[..., n]`, the weight of each stream in the sublayer's input.

    Example:
        >>> pre_gate(torch.zeros(2)).tolist()
        [0.5, 0.5]
    """
    return torch.sigmoid(logits) + pre_eps


def post_gate(logits: Tensor, multiplier: float = 2.0) -> Tensor:
    """Computes the post map, Eq. (18): multiplier * sigmoid(logits).

    Args:
        logits: `[..., n]`.
        multiplier: 2 in the paper, so that zero logits give 1.

    Returns:
        `[..., n]`, the weight with which the sublayer's output enters each stream.

    Example:
        >>> post_gate(torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    return multiplier * torch.sigmoid(logits)


def res_map(
    logits: Tensor, iters: int | None = None, *, convention: str | Convention = "paper"
) -> Tensor:
    """Computes the residual map, Eq. (19), by the convention's Sinkhorn-Knopp rule.

    Args:
        logits: `[..., n, n]`, in the convention's own orientation.
        iters: Sinkhorn iterations; None is the convention's.
        convention: a name or a `Convention`.

    Returns:
        `[..., n, n]` as `res[out, in]`, float32 or float64.

    Raises:
        MHCError: `logits` is not square, or `iters` is below 1.

    Example:
        >>> res_map(torch.zeros(2, 2)).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    rule = get_convention(convention)
    count = rule.sinkhorn_iters if iters is None else iters
    res = sinkhorn_knopp(logits, count, **rule.sinkhorn_axes())
    return res.transpose(-1, -2) if rule.res_transposed else res


def apply_pre(x: Tensor, pre: Tensor) -> Tensor:
    """Mixes the streams to the sublayer's input: h = sum_i pre_i x_i.

    Args:
        x: `[..., n, C]`.
        pre: `[..., n]`.

    Returns:
        `[..., C]` in x's dtype, accumulated in float32 (float64 for float64 x).

    Raises:
        MHCError: `pre` does not match `x`.

    Example:
        >>> apply_pre(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])).tolist()
        [31.0, 42.0]
    """
    check_streams(x)
    check_shape("pre", pre, x.shape[:-1], "x.shape[:-1]")
    dtype = working_dtype(x.dtype)
    with autocast_off(x):
        h = pre.to(dtype).unsqueeze(-2) @ x.to(dtype)
    return h.squeeze(-2).to(x.dtype)


def apply_post_res(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Merges a sublayer's output into the streams: x'_i = sum_j res_ij x_j + post_i f.

    Args:
        x: `[..., n, C]`, the streams that entered the sublayer.
        f: `[..., C]`, the sublayer's output.
        post: `[..., n]`.
        res: `[..., n, n]` as `res[out, in]`; it acts as `res @ x`.

    Returns:
        `[..., n, C]` in x's dtype, accumulated in float32 (float64 for float64 x).

    Raises:
        MHCError: `f`, `post` or `res` does not match `x`.

    Example:
        >>> x, f = torch.tensor([[1.0], [2.0]]), torch.tensor([10.0])
        >>> res = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
        >>> apply_post_res(x, f, torch.tensor([1.0, 0.0]), res).tolist()
        [[12.0], [1.5]]
    """
    check_merge(x, f, post, res)
    dtype = working_dtype(x.dtype)
    with autocast_off(x):
        mixed = res.to(dtype) @ x.to(dtype)
    return (mixed + post.to(dtype).unsqueeze(-1) * f.to(dtype).unsqueeze(-2)).to(x.dtype)


def hc_coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, n: int, eps: float = 1e-20
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the unconstrained maps of Hyper-Connections (arXiv 2409.19606), Eq. (5) of mHC.

    With x~_j the RMSNorm of stream j over its own C channels: pre_i = alpha_pre tanh(theta_pre .
    x~_i) + bias_i, post_i likewise, res_ij = alpha_res tanh(theta_res_i . x~_j) + bias_ij.

    Args:
        x: `[..., n, C]`.
        phi: `[C, n + 2]`, columns theta_pre (1), theta_post (1), theta_res (n, one an output).
        alpha: `[3]`, the gates of pre, post, res.
        bias: `[n*n + 2*n]`, ordered pre, post, res (row by row).
        n: the number of streams.
        eps: inside the root of the RMSNorm.

    Returns:
        `pre: [..., n]`, `post: [..., n]`, `res: [..., n, n]` as `res[out, in]`; float32, or
        float64 for float64 x.

    Raises:
        MHCError: a shape, a dtype, `n` or `eps` is wrong.

    Example:
        >>> bias = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
        >>> pre, post, res = hc_coefficients(
        ...     torch.randn(2, 4), torch.zeros(4, 4), torch.ones(3), bias, n=2
        ... )
        >>> res.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    check_streams(x, n)
    channels = x.shape[-1]
    check_shape("phi", phi, (channels, n + 2), "[C, n + 2]")
    check_shape("alpha", alpha, (3,), "[3]")
    check_shape("bias", bias, (n * n + 2 * n,), "[n*n + 2*n]")
    streams = x.unsqueeze(-2)  # each stream becomes a group [1, C] with a norm of its own
    divisor = norm_divisor(streams, eps).unsqueeze(-1)
    scores = torch.tanh(project_streams(streams, phi) / divisor)
    alpha, bias = alpha.to(scores.dtype), bias.to(scores.dtype)
    pre_bias, post_bias, res_bias = torch.split(bias, [n, n, n * n])
    pre = alpha[0] * scores[..., 0] + pre_bias
    post = alpha[1] * scores[..., 1] + post_bias
    res = alpha[2] * scores[..., 2:].transpose(-1, -2) + res_bias.reshape(n, n)
    return pre, post, res


def head_weights(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor | float,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    pre_eps: float = 1e-6,
    place: str = "inside",
) -> Tensor:
    """Computes DeepSeek-V4's learned weights for collapsing the streams after the last block.

    They are a pre map of their own: Eq. (14)-(17) with n columns, sigmoid(alpha vec(x) phi /
    sqrt(mean square + eps) + bias) + pre_eps, as in `DeepseekV4HyperHead` of transformers.
    Collapse with `apply_pre` or `collapse_streams`.

    Args:
        x: `[..., n, C]`.
        phi: `[n*C, n]`.
        alpha: one number, or a tensor of one element.
        bias: `[n]`.
        eps: of the norm divisor.
        pre_eps: added to the sigmoid.
        place: of eps, see `norm_divisor`.

    Returns:
        `[..., n]` in float32, or float64 for float64 x.

    Raises:
        MHCError: a shape or dtype is wrong.

    Example:
        >>> head_weights(torch.randn(2, 4), torch.zeros(8, 2), 1.0, torch.zeros(2), pre_eps=0.0)
        tensor([0.5000, 0.5000])
    """
    check_streams(x)
    n, channels = x.shape[-2:]
    check_shape("phi", phi, (n * channels, n), "[n*C, n]")
    check_shape("bias", bias, (n,), "[n]")
    if isinstance(alpha, Tensor):
        if alpha.numel() != 1:
            raise MHCError(f"alpha must have one element, got shape {list(alpha.shape)}")
        alpha = alpha.reshape(()).to(working_dtype(x.dtype))
    normed = project_streams(x, phi) / norm_divisor(x, eps, place=place).unsqueeze(-1)
    return pre_gate(alpha * normed + bias.to(normed.dtype), pre_eps)


def expand_streams(x: Tensor, n: int) -> Tensor:
    """Copies a hidden state into n residual streams, as the models do behind the embedding.

    Args:
        x: `[..., C]`.
        n: the number of streams, at least 1.

    Returns:
        `[..., n, C]` in x's dtype, in memory of its own.

    Raises:
        MHCError: `n` is not a positive integer, or `x` is a scalar.

    Example:
        >>> expand_streams(torch.tensor([1.0, 2.0]), 2).tolist()
        [[1.0, 2.0], [1.0, 2.0]]
    """
    check_count("n", n)
    if x.dim() < 1:
        raise MHCError("x must have the shape [..., C], got a scalar")
    return x.unsqueeze(-2).repeat(*[1] * (x.dim() - 1), n, 1)


def maps_like(maps: Tensor, x: Tensor, axes: int) -> Tensor:
    """Gives post (one axis) or res (two) the leading axes of the same tokens in another shape.

    Args:
        maps: `[..., n]` or `[..., n, n]`.
        x: streams `[..., n, C]` of as many tokens in the same order.
        axes: how many axes of `maps` do not count tokens.

    Returns:
        `maps` as a view with x's leading axes.

    Example:
        >>> maps_like(torch.ones(6, 4), torch.ones(2, 3, 4, 8), 1).shape
        torch.Size([2, 3, 4])
    """
    return maps.reshape(*x.shape[:-2], *maps.shape[maps.dim() - axes :])


def stack_parts(results: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Stacks the parts that a function gave for each stream: `[..., C]` to `[..., n, C]`.

    Args:
        results: one tuple a stream.

    Returns:
        One tensor a part, streams in its last axis but one.

    Example:
        >>> stack_parts([(torch.ones(2),), (torch.zeros(2),)])[0].tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    return tuple(torch.stack(parts, -2) for parts in zip(*results, strict=True))


def collapse_streams(x: Tensor, weight: Tensor | None = None, mode: str | None = None) -> Tensor:
    """Collapses the residual streams to one hidden state.

    Args:
        x: `[..., n, C]`.
        weight: with "learned": `[n]`, or `[..., n]` such as `head_weights` gives for each token.
        mode: "mean", "sum", or "learned" (the weighted sum); None is "learned" if there is a
            weight, else "mean".

    Returns:
        `[..., C]` in x's dtype, accumulated in float32 (float64 for float64 x).

    Raises:
        MHCError: `mode` is unknown, or it and `weight` do not fit together, or a shape is wrong.

    Example:
        >>> collapse_streams(torch.tensor([[1.0], [3.0]]), mode="mean").tolist()
        [2.0]
    """
    check_streams(x)
    mode = collapse_mode(weight, mode)
    if weight is None:
        total = x.sum(-2, dtype=working_dtype(x.dtype))
        return (total / x.shape[-2] if mode == "mean" else total).to(x.dtype)
    if weight.dim() != 1:
        return apply_pre(x, weight)
    check_shape("weight", weight, (x.shape[-2],), "[n] or [..., n] like x")
    return apply_pre(x, weight.expand(x.shape[:-1]))
