"""Sinkhorn-Knopp projection onto the doubly stochastic matrices, exact for finite iterations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_compile.conventions import Convention
from mhc_compile.errors import MHCError
from mhc_compile.runtime.precision import working_dtype

# The matrices are worked on as [n (row), n (column), tokens]: every reduction then runs over the
# n outer elements and is vectorised along the tokens. An axis to normalise is the one summed over.
_SUM_AXIS = {"row": 1, "col": 0}


class SinkhornSteps(NamedTuple):
    """What to compute, resolved from the axes; hashable, so it can ride through autograd."""

    steps: tuple[int, ...]  # the summed axis of each normalisation, in order
    softmax: bool  # the first matrix is a row softmax, not exp
    eps: float
    eps_mode: str


def sinkhorn_knopp(
    logits: Tensor,
    iters: int = 20,
    *,
    order: str = "col_row",
    start: str = "exp",
    start_is_step: bool = False,
    eps: float = 0.0,
    eps_mode: str = "none",
) -> Tensor:
    """Projects logits to doubly stochastic matrices by alternating normalisation, Eq. (19).

    M0 = exp(logits), then `iters` times M <- T_r(T_c(M)), where T_c and T_r divide the columns and
    the rows by their sums (arXiv 2512.24880). The keyword arguments are the Sinkhorn axes of
    `mhc_compile.conventions.Convention`; the defaults are the paper's.

    The gradient is the exact one of the finite iteration. Only `logits` is saved for it: the
    backward recomputes the iteration, keeps one vector of n divisors per step and token, and walks
    the steps in reverse. Without eps, logits that differ by hundreds inside one matrix give finite
    values and gradients. A NaN stays in its own matrix. Differentiable twice.

    Args:
        logits: `[..., n, n]`, any floating dtype and strides; rows are the next-to-last axis.
        iters: iterations, each of one column step and one row step; at least 1.
        order: "col_row" or "row_col".
        start: "exp" or "softmax" (over the last axis).
        start_is_step: the softmax start counts as the first row step; needs order "row_col".
        eps: see `eps_mode`.
        eps_mode: "none"; "add": divisors are sum + eps, and eps is added to a softmax start;
            "clamp": divisors are max(sum, eps). With eps, an "exp" start is shifted by the maxima
            of the first axis that is normalised, without which eps would have no scale.

    Returns:
        `[..., n, n]` float32, or float64 for float64 logits; contiguous.

    Raises:
        MHCError: `logits` is not a batch of square floating matrices, or `iters` is below 1.
        ConfigError: the axes are unknown or contradict each other.

    Example:
        >>> m = sinkhorn_knopp(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), iters=20)
        >>> bool(torch.allclose(m.sum(-1), torch.ones(2)))
        True
    """
    rule = _resolve(logits, iters, order, start, start_is_step, eps, eps_mode)
    out: Tensor = _SinkhornKnopp.apply(logits, rule)  # type: ignore[no-untyped-call,unused-ignore]
    return out


def sinkhorn_knopp_unrolled(
    logits: Tensor,
    iters: int = 20,
    *,
    order: str = "col_row",
    start: str = "exp",
    start_is_step: bool = False,
    eps: float = 0.0,
    eps_mode: str = "none",
) -> Tensor:
    """The same map as `sinkhorn_knopp`, as a plain loop that autograd records step by step.

    Kept as the oracle of the tests: nothing is shared with `sinkhorn_knopp` but the checks of the
    arguments. It holds every iterate for the backward.

    Args:
        logits: as in `sinkhorn_knopp`, like all the others.
        iters: see there.
        order: see there.
        start: see there.
        start_is_step: see there.
        eps: see there.
        eps_mode: see there.

    Returns:
        `[..., n, n]` float32, or float64 for float64 logits.

    Raises:
        MHCError: as in `sinkhorn_knopp`.

    Example:
        >>> sinkhorn_knopp_unrolled(torch.zeros(2, 2)).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    _resolve(logits, iters, order, start, start_is_step, eps, eps_mode)
    log_m = logits.to(working_dtype(logits.dtype))
    dims = {"col": -2, "row": -1}
    steps = [dims[name] for name in order.split("_")] * iters
    if start == "softmax":
        log_m = log_m.log_softmax(-1)
        steps = steps[1:] if start_is_step else steps
    if eps_mode == "none":
        for dim in steps:
            log_m = log_m - log_m.logsumexp(dim, keepdim=True)
        return log_m.exp()
    if start == "softmax":
        m = log_m.exp() + (eps if eps_mode == "add" else 0.0)
    else:
        m = (log_m - log_m.amax(steps[0], keepdim=True)).exp()
    for dim in steps:
        total = m.sum(dim, keepdim=True)
        m = m / (total + eps if eps_mode == "add" else total.clamp(min=eps))
    return m


def _resolve(
    logits: Tensor,
    iters: int,
    order: str,
    start: str,
    start_is_step: bool,
    eps: float,
    eps_mode: str,
) -> SinkhornSteps:
    if not logits.is_floating_point():
        raise MHCError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or logits.shape[-1] < 1:
        raise MHCError(
            f"logits must be square matrices [..., n, n] with n >= 1, "
            f"got shape {list(logits.shape)}"
        )
    if isinstance(iters, bool) or not isinstance(iters, int) or iters < 1:
        raise MHCError(f"iters must be an integer of at least 1, got {iters!r}")
    convention = Convention(
        "sinkhorn_knopp",
        sinkhorn_order=order,
        sinkhorn_start=start,
        sinkhorn_start_is_step=start_is_step,
        sinkhorn_eps=eps,
        sinkhorn_eps_mode=eps_mode,
        sinkhorn_iters=iters,
    )
    return resolve_steps(convention)


def resolve_steps(rule: Convention) -> SinkhornSteps:
    """Resolves the Sinkhorn axes and iterations of a convention for the functions below.

    Example:
        >>> len(resolve_steps(Convention("short", sinkhorn_iters=3)).steps)
        6
    """
    steps = [_SUM_AXIS[name] for name in rule.sinkhorn_order.split("_")] * rule.sinkhorn_iters
    softmax = rule.sinkhorn_start == "softmax"
    if softmax and rule.sinkhorn_start_is_step:
        steps = steps[1:]
    if softmax and rule.sinkhorn_eps_mode == "none":
        # Without eps a softmax is a row step like any other.
        steps, softmax = [_SUM_AXIS["row"], *steps], False
    return SinkhornSteps(tuple(steps), softmax, rule.sinkhorn_eps, rule.sinkhorn_eps_mode)


def iteration_dtype(n: int, dtype: torch.dtype, rule: SinkhornSteps) -> torch.dtype:
    """Returns float64 where an element below float32's range could grow into sight again.

    Without eps the divisors lie in [1/n, n], so an element grows at most n-fold a step. float32
    reaches down 87 nats; an element that ends 16 nats below 1 is out of sight. At 20 iterations
    this is float32 up to n = 6.
    """
    growth = (len(rule.steps) - 2) * math.log(n)
    if rule.eps_mode == "none" and growth > 87 - 16:
        return torch.float64
    return working_dtype(dtype)


def _to_token_last(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    n = matrices.shape[-1]
    return matrices.reshape(-1, n, n).permute(1, 2, 0).to(dtype).contiguous()


def _from_token_last(matrices: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return matrices.permute(2, 0, 1).reshape(shape).to(dtype).contiguous()


def _log_normalise(log_m: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Returns the normalised logarithm and its exponential; both stay exact after a large shift."""
    shifted = log_m - log_m.amax(axis, keepdim=True).detach()
    m = shifted.exp()
    total = m.sum(axis, keepdim=True)
    return shifted - total.log(), m / total


def _first_matrix(logits: Tensor, rule: SinkhornSteps) -> tuple[Tensor, int]:
    """Returns the matrix from which plain divisions are safe, and how many steps led to it.

    Without eps, one step along each axis in the log domain is enough: afterwards the sums that were
    just normalised are 1 and no other sum exceeds n, so every later divisor lies in [1/n, n] and
    only elements below the smallest float are lost, of which `iteration_dtype` takes care. With
    eps, no divisor is below eps.
    """
    if rule.eps_mode == "none":
        log_m = logits
        for axis in rule.steps[:2]:
            log_m, m = _log_normalise(log_m, axis)
        return m, len(rule.steps[:2])
    if rule.softmax:
        softmax = logits.softmax(_SUM_AXIS["row"])
        return (softmax + rule.eps if rule.eps_mode == "add" else softmax), 0
    return (logits - logits.amax(rule.steps[0], keepdim=True)).exp(), 0


def _divisor(m: Tensor, axis: int, rule: SinkhornSteps) -> Tensor:
    total = m.sum(axis, keepdim=True)
    if rule.eps_mode == "add":
        return total + rule.eps
    return total.clamp(min=rule.eps) if rule.eps_mode == "clamp" else total


def _log_gradient_step(
    grad: Tensor, m: Tensor, axis: int, divisor: Tensor, rule: SinkhornSteps
) -> Tensor:
    """Takes the gradient by log M back through one step, from the step's own result `m`.

    d log M' = d log M - sum(M' d log M), whatever eps is: with eps, M / divisor is still M'.
    """
    total = grad.sum(axis, keepdim=True)
    if rule.eps_mode == "clamp":
        total = torch.where(divisor > rule.eps, total, torch.zeros_like(total))
    return grad - m * total


def _first_matrix_gradient(
    grad: Tensor, logits: Tensor, first: Tensor, rule: SinkhornSteps
) -> Tensor:
    """Takes the gradient by the logarithm of `_first_matrix`'s result back to the logits."""
    if rule.eps_mode == "none":
        early = _log_normalise(logits, rule.steps[0])[1]
        grad = grad - first * grad.sum(rule.steps[1], keepdim=True)
        return grad - early * grad.sum(rule.steps[0], keepdim=True)
    if rule.softmax:
        axis = _SUM_AXIS["row"]
        softmax = logits.softmax(axis)
        weighted = grad * (softmax / first) if rule.eps_mode == "add" else grad
        return weighted - softmax * weighted.sum(axis, keepdim=True)
    # With eps the shift by the maxima changes the result, so it has a gradient: ties share it.
    axis = rule.steps[0]
    peak = (logits == logits.amax(axis, keepdim=True)).to(grad.dtype)
    share = peak / peak.sum(axis, keepdim=True)
    return grad - share * grad.sum(axis, keepdim=True)


def iterate(logits: Tensor, rule: SinkhornSteps) -> Tensor:
    """Runs the steps on `logits: [n (row), n (column), tokens]`; returns the same shape."""
    m, done = _first_matrix(logits, rule)
    for axis in rule.steps[done:]:
        m = m / _divisor(m, axis, rule)
    return m


def iterate_backward(grad_out: Tensor, logits: Tensor, rule: SinkhornSteps) -> Tensor:
    """Takes the gradient by `iterate`'s result back to its logits, all `[n, n, tokens]`.

    The iteration is recomputed; one vector of n divisors per step and token is kept.
    """
    first, done = _first_matrix(logits, rule)
    m, tail, divisors = first, rule.steps[done:], []
    for axis in tail:
        divisors.append(_divisor(m, axis, rule))
        m = m / divisors[-1]

    grad = grad_out * m
    for axis, divisor in zip(reversed(tail), reversed(divisors), strict=True):
        grad = _log_gradient_step(grad, m, axis, divisor, rule)
        m = m * divisor
    return _first_matrix_gradient(grad, logits, first, rule)


class _SinkhornKnopp(torch.autograd.Function):
    """Saves the logits alone; see `sinkhorn_knopp`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rule: SinkhornSteps) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.rule = rule
        m = iterate(_to_token_last(logits, _dtype_of(logits, rule)), rule)
        return _from_token_last(m, logits.shape, working_dtype(logits.dtype))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        log_m = _to_token_last(logits, _dtype_of(logits, ctx.rule))
        grad = iterate_backward(_to_token_last(grad_out, log_m.dtype), log_m, ctx.rule)
        return _from_token_last(grad, logits.shape, logits.dtype), None


def _dtype_of(logits: Tensor, rule: SinkhornSteps) -> torch.dtype:
    return iteration_dtype(logits.shape[-1], logits.dtype, rule)
