"""From products to gates and back, Eq. (15)-(19), on tensors whose last axis is the tokens.

With T tokens and K = n*n + 2*n, `proj: [K, T]` are the raw products vec(x) phi and `square: [T]`
the sums of squares of vec(x). Rows of `proj` are ordered as the columns of phi: pre, post, res.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_compile.conventions import Convention
from mhc_compile.runtime.sinkhorn import iterate, iterate_backward, iteration_dtype, resolve_steps


class Divisor(NamedTuple):
    """The norm divisor r of Eq. (15), `[T]`, and its `slope: [T]`: dr/dx = slope * x."""

    value: Tensor
    slope: Tensor


class Normed(NamedTuple):
    """What both directions start from: `products / r`, the gates per row, and Eq. (16)'s logits."""

    products: Tensor
    gates: Tensor
    logits: Tensor


def norm_divisor(x: Tensor, square: Tensor, rule: Convention) -> Divisor:
    """Computes the norm divisor of the streams `x: [T, n, C]` from their sums of squares."""
    # Elsewhere the question whether to mend would stop the device's queue.
    return divisor_of(square, x.shape[1] * x.shape[2], rule, x if x.device.type == "cpu" else None)


def divisor_of(square: Tensor, width: int, rule: Convention, x: Tensor | None = None) -> Divisor:
    """Computes the norm divisor from sums of `width` squares; sums that overflowed need x."""
    inside = rule.norm_eps_place == "inside"
    mean = square / width + (rule.norm_eps if inside else 0.0)
    zero = mean == 0
    # A root of 0 becomes 1: the divisor of a token of zeros without eps, whose gradient is 0.
    root = torch.where(zero, 1.0, mean.sqrt())
    if x is not None:
        root = _mend_overflow(root, x)
    value = root if inside else torch.where(zero, rule.norm_eps or 1.0, root + rule.norm_eps)
    return Divisor(value, 1 / (width * root))


def _mend_overflow(root: Tensor, x: Tensor) -> Tensor:
    """Recomputes roots that are infinite because squares beyond 3e38 were summed."""
    over = root.isinf()
    if not bool(over.any()):
        return root
    rows = x[over].flatten(1).to(root.dtype)
    peak = rows.abs().amax(1, keepdim=True)
    return root.masked_scatter(over, peak[:, 0] * (rows / peak).square().mean(1).sqrt())


def apply_gates(
    proj: Tensor, divisor: Tensor, alpha: Tensor, bias: Tensor, n: int, rule: Convention
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the maps of Eq. (16)-(19): `pre: [n, T]`, `post: [n, T]`, `res: [n, n, T]`."""
    logits = _normalise(proj, divisor, alpha, bias, n).logits
    gates = torch.sigmoid(logits[: 2 * n])
    pre = gates[:n] + rule.pre_eps
    post = gates[n:] * rule.post_multiplier
    steps = resolve_steps(rule)
    matrices = _matrices(logits, n).to(iteration_dtype(n, logits.dtype, steps))
    res = iterate(matrices, steps)  # [row, column, T]
    res = (res.transpose(0, 1) if rule.res_transposed else res).to(logits.dtype)
    return pre, post, res.contiguous()


def apply_gates_backward(
    g_pre: Tensor | None,
    g_post: Tensor | None,
    g_res: Tensor | None,
    proj: Tensor,
    divisor: Tensor,
    alpha: Tensor,
    bias: Tensor,
    n: int,
    rule: Convention,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes gradients of the maps back; None counts as zeros.

    Returns:
        The gradients by `proj: [K, T]`, the divisor `[T]`, `alpha: [3]` and `bias: [K]`.
    """
    normed = _normalise(proj, divisor, alpha, bias, n)
    logits = normed.logits
    g_logits = torch.zeros_like(logits)
    for part, grad, scale in (
        (slice(0, n), g_pre, 1.0),
        (slice(n, 2 * n), g_post, rule.post_multiplier),
    ):
        if grad is not None:
            gate = torch.sigmoid(logits[part])
            torch.mul(grad.t(), gate * (1 - gate) * scale, out=g_logits[part])
    if g_res is not None:
        steps = resolve_steps(rule)
        matrices = _matrices(logits, n).to(iteration_dtype(n, logits.dtype, steps))
        grad = g_res.permute((2, 1, 0) if rule.res_transposed else (1, 2, 0))
        grad = iterate_backward(grad.to(matrices.dtype).contiguous(), matrices, steps)
        _matrices(g_logits, n).copy_(grad)
    g_proj = g_logits * normed.gates / divisor
    g_divisor = -(g_proj * normed.products).sum(0)
    by_row = (g_logits * normed.products).sum(1)
    g_alpha = torch.stack([part.sum() for part in by_row.split([n, n, n * n])])
    return g_proj, g_divisor, g_alpha, g_logits.sum(1)


def _normalise(proj: Tensor, divisor: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Normed:
    alpha, bias = alpha.to(proj.dtype), bias.to(proj.dtype)
    products = proj / divisor
    gates = torch.cat([alpha[:1].expand(n), alpha[1:2].expand(n), alpha[2:].expand(n * n)])
    gates = gates.unsqueeze(1)
    return Normed(products, gates, products * gates + bias.unsqueeze(1))


def _matrices(rows: Tensor, n: int) -> Tensor:
    return rows[2 * n :].view(n, n, rows.shape[1])
