"""What rewritten models call: the operators of `mhc_compile.runtime.ops` behind checked arguments.

Each function equals its namesake in `mhc_compile.reference`, in one operator with an analytic
gradient. They are differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_compile.errors import MHCError
from mhc_compile.runtime import ops as _ops  # noqa: F401  # registers torch.ops.mhc
from mhc_compile.runtime.checks import (
    check_count,
    check_device,
    check_float,
    check_merge,
    check_phi,
    check_shape,
    check_streams,
    collapse_mode,
)
from mhc_compile.runtime.high_priority import on_offered_stream
from mhc_compile.runtime.precision import working_dtype
from mhc_compile.runtime.recording import recording


def read_streams(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes a sublayer's maps and its input, Eq. (14)-(19) and h = sum_i pre_i x_i.

    Args:
        x: `[..., n, C]`.
        phi: `[n*C, n*n + 2*n]`, columns ordered pre, post, res.
        alpha: `[3]`.
        bias: `[n*n + 2*n]`.
        rule: the numerical axes, `Convention.key()`.

    Returns:
        `h: [..., C]` in x's dtype; `pre: [..., n]`, `post: [..., n]` and `res: [..., n, n]` as
        `res[out, in]` in float32, or float64 for float64 x.

    Raises:
        MHCError: a shape, a dtype or a device is wrong.

    Example:
        >>> from mhc_compile.conventions import get_convention
        >>> parts = torch.randn(2, 4), torch.randn(8, 8), torch.ones(3), torch.zeros(8)
        >>> h, pre, post, res = read_streams(*parts, get_convention("paper").key())
        >>> h.shape, res.shape
        (torch.Size([4]), torch.Size([2, 2]))
    """
    _check_projection(x, phi, alpha, bias)
    h, pre, post, res, _, _ = torch.ops.mhc.read(x, phi, alpha, bias, rule)
    if (noted := recording()) is not None:
        noted.read(x, pre, h)
    return h, pre, post, res


def coefficients(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a sublayer's maps alone: pre, post and res of `read_streams`."""
    _check_projection(x, phi, alpha, bias)
    pre, post, res, _, _ = torch.ops.mhc.coefficients(x, phi, alpha, bias, rule)
    return pre, post, res


def apply_pre(x: Tensor, pre: Tensor) -> Tensor:
    """Mixes the streams to the sublayer's input, see `reference.apply_pre`."""
    check_streams(x)
    check_shape("pre", pre, x.shape[:-1], "x.shape[:-1]")
    check_device("pre", pre, x)
    h: Tensor = torch.ops.mhc.pre(x, pre)
    if (noted := recording()) is not None:
        noted.read(x, pre, h)
    return h


def apply_post_res(
    x: Tensor, f: Tensor, post: Tensor, res: Tensor, *, after_mlp: bool = False
) -> Tensor:
    """Merges a sublayer's output into the streams, see `reference.apply_post_res`.

    `after_mlp` lets it run on the stream that `high_priority` offers, unless it is compiled.
    """
    check_merge(x, f, post, res)
    for name, tensor in (("f", f), ("post", post), ("res", res)):
        check_device(name, tensor, x)
    if after_mlp and not torch.compiler.is_compiling():
        y = on_offered_stream(torch.ops.mhc.post_res, x, f, post, res)
    else:
        y = torch.ops.mhc.post_res(x, f, post, res)
    if (noted := recording()) is not None:
        noted.merged(x, f, post, res, y)
    return y


def expand_streams(x: Tensor, n: int) -> Tensor:
    """Copies one tensor into n residual streams: `[..., C]` to `[..., n, C]`."""
    check_count("n", n)
    if x.dim() < 1:
        raise MHCError("x must have the shape [..., C], got a scalar")
    streams: Tensor = torch.ops.mhc.expand(x, n)
    if (noted := recording()) is not None:
        noted.expanded(x, n, streams)
    return streams


def collapse_streams(x: Tensor, weight: Tensor | None = None, mode: str | None = None) -> Tensor:
    """Joins n residual streams, see `reference.collapse_streams`."""
    check_streams(x)
    n = x.shape[-2]
    mode = collapse_mode(weight, mode)
    if weight is None:
        each = 1 / n if mode == "mean" else 1.0
        weight = torch.full((n,), each, dtype=working_dtype(x.dtype), device=x.device)
    if weight.dim() != 1:
        check_float("weight", weight)
        return apply_pre(x, weight)
    check_shape("weight", weight, (n,), "[n] or [..., n] like x")
    check_device("weight", weight, x)
    h: Tensor = torch.ops.mhc.collapse(x, weight)
    return h


def _check_projection(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> None:
    check_streams(x)
    n = x.shape[-2]
    check_phi(phi, x)
    check_shape("alpha", alpha, (3,), "[3]")
    check_shape("bias", bias, (n * n + 2 * n,), "[n*n + 2*n]")
    for name, tensor in (("phi", phi), ("alpha", alpha), ("bias", bias)):
        check_device(name, tensor, x)
