"""The norm at the head of a sublayer, forward and backward, on `h: [T, C]`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_compile.errors import MHCError

NORMS = ("none", "rms", "layer")


class Norm(NamedTuple):
    """A sublayer's norm: `kind` is "none", "rms" or "layer"; `weight` and `shift` are `[C]`.

    rms: h * rsqrt(mean(h^2) + eps) * weight; layer: (h - mean) * rsqrt(var + eps) * weight + shift.
    An absent weight is 1, an absent shift 0. "none" uses neither.
    """

    kind: str
    eps: float
    weight: Tensor | None
    shift: Tensor | None


def make_norm(kind: str, eps: float, weight: Tensor | None, shift: Tensor | None) -> Norm:
    """Builds a `Norm`.

    Raises:
        MHCError: the kind is unknown.
    """
    if kind not in NORMS:
        raise MHCError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {kind!r}")
    return Norm(kind, eps, weight, shift)


class NormGradient(NamedTuple):
    """The gradients by h `[T, C]`, weight and shift `[C]`."""

    h: Tensor
    weight: Tensor
    shift: Tensor


def apply_norm(h: Tensor, norm: Norm) -> Tensor:
    """Normalises in h's dtype, which is float32 or float64; weight and shift are cast to it."""
    if norm.kind == "none":
        return h
    out, _ = _standardise(h, norm)
    if norm.weight is not None:
        out = out * norm.weight.to(h.dtype)
    return out if norm.shift is None else out + norm.shift.to(h.dtype)


def apply_norm_backward(grad: Tensor, h: Tensor, norm: Norm) -> NormGradient:
    """Takes the gradient by `apply_norm`'s result back, not for kind "none"."""
    standard, scale = _standardise(h, norm)
    weighted = grad if norm.weight is None else grad * norm.weight.to(h.dtype)
    g_h = weighted - standard * (weighted * standard).mean(-1, keepdim=True)
    if norm.kind == "layer":
        g_h = g_h - weighted.mean(-1, keepdim=True)
    return NormGradient(g_h * scale, (grad * standard).sum(0), grad.sum(0))


def _standardise(h: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Returns h without mean (of "layer") and scale, and what it was multiplied with."""
    if norm.kind == "layer":
        h = h - h.mean(-1, keepdim=True)
    scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps)
    return h * scale, scale
