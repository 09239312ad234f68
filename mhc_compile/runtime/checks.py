"""Checks of arguments: each raises an `MHCError` that names the argument and what it may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_compile.errors import MHCError


def check_count(name: str, value: int) -> None:
    """Takes integers of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MHCError(f"{name} must be an integer of at least 1, got {value!r}")


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_float(name: str, tensor: Tensor) -> None:
    """Takes floating dtypes of at least 16 bits: torch does not compute with the smaller ones."""
    if tensor.dtype not in FLOATS:
        raise MHCError(
            f"{name} must have a floating dtype (bfloat16, float16, float32, float64), "
            f"got {tensor.dtype}"
        )


def check_streams(x: Tensor, n: int | None = None) -> None:
    """Takes floating streams `[..., n, C]`."""
    check_float("x", x)
    if n is not None:
        check_count("n", n)
    if x.dim() < 2 or x.shape[-1] < 1 or x.shape[-2] < 1 or (n is not None and x.shape[-2] != n):
        streams = "n" if n is None else f"n={n}"
        raise MHCError(f"x must have the shape [..., {streams}, C], got {list(x.shape)}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], formula: str) -> None:
    """Takes a floating tensor of exactly this shape; `formula` says where the shape comes from."""
    check_float(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise MHCError(
            f"{name} must have the shape {formula} = {list(shape)}, got {list(tensor.shape)}"
        )


def check_merge(x: Tensor, f: Tensor, post: Tensor, res: Tensor) -> None:
    """Takes what `apply_post_res` does."""
    check_streams(x)
    n = x.shape[-2]
    check_shape("f", f, (*x.shape[:-2], x.shape[-1]), "[..., C] like x")
    check_shape("post", post, x.shape[:-1], "x.shape[:-1]")
    check_shape("res", res, (*x.shape[:-2], n, n), "[..., n, n] like x")


def collapse_mode(weight: Tensor | None, mode: str | None) -> str:
    """The way to collapse streams; the default is "learned" with a weight, else "mean"."""
    mode = mode or ("mean" if weight is None else "learned")
    if mode not in ("mean", "sum", "learned"):
        raise MHCError(f"mode must be one of 'mean', 'sum', 'learned', got {mode!r}")
    if (weight is not None) != (mode == "learned"):
        state = "missing" if weight is None else "given"
        raise MHCError(
            f"weight goes with mode='learned' and no other: it is {state}, mode={mode!r}"
        )
    return mode


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Takes tensors on the device of the streams `x`."""
    if tensor.device != x.device:
        raise MHCError(
            f"{name} must be on the device of x, {x.device}, got {tensor.device}; "
            f"move it with {name}.to(x.device), or the module that holds it with .to(...)"
        )


def check_phi(phi: Tensor, x: Tensor) -> None:
    """Takes the projection `[n*C, n*n + 2*n]` of the streams `x`, and names its transpose."""
    n, channels = x.shape[-2:]
    right = (n * channels, n * n + 2 * n)
    remedy = ""
    if tuple(phi.shape) == right[::-1] and right[0] != right[1]:
        remedy = "; it is transposed, pass phi.T"
    elif tuple(phi.shape[1:]) == right[1:] and phi.dim() == 2:
        remedy = "; rows are those of x.flatten(-2), stream by stream"
    check_float("phi", phi)
    if tuple(phi.shape) != right:
        raise MHCError(
            f"phi must have the shape [n*C, n*n + 2*n] = {list(right)} for streams "
            f"[..., {n}, {channels}], got {list(phi.shape)}{remedy}"
        )
